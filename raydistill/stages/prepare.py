"""prepare: decode every image to upright RGB, drop duplicates, split, shuffle, and write parquet shards.

No shard has train images with a label and others without, so who visits the labelled ones more often reads no others.
The directory of decoded images does not depend on the seed, the splits or the labels. So all seeds share it, and a
killed command resumes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from raydistill.cluster.plan import Plan
from raydistill.cluster.restarts import new_tries, trying
from raydistill.config import SHARD_BYTES, Images, RunConfig
from raydistill.data.chunks import chunk_ranges, chunks, decode_isolated
from raydistill.data.jpeg import refuse_other_jpegs, stored
from raydistill.data.sample import (
    SPLITS,
    SampleSet,
    encode_images,
    encode_shard,
    refuse_other_sizes,
    samples_from_json,
    shard_name,
)
from raydistill.data.sources.columns import Entries, entry_name
from raydistill.data.sources.listing import Listing
from raydistill.data.sources.reading import UNREADABLE
from raydistill.data.splits import Decoded, Drawn, draw, lacking_classes, sample_set, without_duplicates
from raydistill.errors import DataError
from raydistill.escaping import counted, quoted
from raydistill.execution import Execution
from raydistill.identity import decoded_directory
from raydistill.runtime.progress import Progress
from raydistill.secrets import redacted_tree
from raydistill.storage.directory import StageDirectory, free_bytes, refuse_small_disk
from raydistill.storage.filesystems import write_bytes
from raydistill.storage.state import read_state
from raydistill.storage.tables import read_table, values

_PART_BYTES = 4 * SHARD_BYTES  # of pixels that a task brings together, some shards
_ID = re.compile("[0-9a-f]{32}")
_FEW_IMAGES = 256
_TRIED = 32  # images to decode for an estimate of the size of all

# Of an entry's image: its shard's number, its place in the order of all shards, and its label; -1 for none.
_FACT = np.dtype([("shard", np.int32), ("position", np.int64), ("label", np.int32)])
_DECODED = pa.schema(
    [
        pa.field("index", pa.int64()),  # of the entry in the listing
        pa.field("sample_id", pa.string()),
        pa.field("image", pa.binary()),  # the working image as shards hold it; empty for a refused image
        pa.field("reason", pa.string()),
    ]
)


def prepare_samples(
    config: RunConfig, listing: Listing, directory: StageDirectory, plan: Plan, progress: Progress
) -> SampleSet:
    """Decode, drop duplicates, split, shuffle, write shards. `refused.json` lists the refused files.

    Raises DataError: too many bad files (without waiting for the rest), or a class without a good train image;
    ConfigError: the disk may be too small.
    """
    left = directory.begin()
    files, known = _decode_images(config, listing.entries, decoded_directory(config, listing), plan, progress)
    kept_S, refused = without_duplicates(known)
    drawn = draw(config, known, kept_S)
    if drawn.num_left_out:
        most = config.images.num_unlabelled
        progress.line(f"prepare   {drawn.num_left_out} unlabelled images are left out: images.num_unlabelled={most}")
    _check_train(known.entries, drawn.splits["train"])
    for what, names in lacking_classes(known.entries, drawn.splits).items():
        progress.line(
            f"prepare   {what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        )
    samples = sample_set(config, directory.path, known, drawn, len(refused))
    _write(samples, directory, left, known, drawn, files, config.images, plan, progress)
    directory.write_json("refused.json", redacted_tree(refused))
    directory.finish(dataclasses.asdict(samples))
    return samples


def _decode_images(
    config: RunConfig, entries: Entries, directory: StageDirectory, plan: Plan, progress: Progress
) -> tuple[dict[str, slice], Decoded]:
    """Decode the images that no earlier run has decoded; returns the files, each with the entries that it holds, and
    what is known of each entry."""
    finished, ranges = directory.begin(), chunk_ranges(entries, config.images)
    names = [f"{k:05d}.parquet" for k in range(len(ranges))]
    is_there = np.array([name in finished for name in names])
    files = {f"{directory.path}/{name}": slice(*ends) for name, ends in zip(names, ranges.tolist(), strict=True)}
    _refuse_small_disk(config, entries, int(np.diff(ranges)[~is_there].sum()))
    parts = [
        {"file": file, "first": which.start, "end": which.stop, "is_there": there}
        for (file, which), there in zip(files.items(), is_there.tolist(), strict=True)
    ]
    decoded = _decoded(config, entries, parts, plan)
    ids_N, reasons, seen = np.zeros(len(entries), "S16"), dict[int, str](), 0
    with progress.task("prepare", len(entries), "images") as advance:
        for block in decoded:
            index, why = block["index"].to_numpy(), values(block["reason"])
            ids = (i if not reason else "0" * 32 for i, reason in zip(values(block["sample_id"]), why, strict=True))
            ids_N[index] = np.frombuffer(bytes.fromhex("".join(ids)), "S16")
            reasons |= {number: reason for number, reason in zip(index.tolist(), why, strict=True) if reason}
            seen += len(index)
            refuse_too_many_bad(config.images, entries, reasons, seen, len(entries))
            again = int(is_there[np.searchsorted(ranges[:, 0], index, "right") - 1].sum())
            advance(again, worked=False)  # an earlier run decoded these
            advance(len(index) - again)
    return files, Decoded(entries, ids_N, reasons)


def _decoded(config: RunConfig, entries: Entries, parts: list[dict[str, Any]], plan: Plan) -> Iterator[pa.Table]:
    """What the tasks found. Few images are decoded by this process: starting tasks takes longer."""
    if len(entries) <= _FEW_IMAGES and config.cluster.address is None:
        decode = _DecodeChunk(config.images, lambda: entries)
        yield from (decode({name: np.array([value]) for name, value in part.items()}) for part in parts)
        return
    shared = partial(ray.get, ray.put(entries))
    blocks = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        _DecodeChunk(config.images, shared, new_tries()), batch_size=1, batch_format="numpy", num_cpus=plan.decode_cpus
    )
    yield from blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _refuse_small_disk(config: RunConfig, entries: Entries, num_to_decode: int) -> None:
    """Raises ConfigError if the images to decode, and all images once more in shards, may not fit on the disk. It
    compresses some for an estimate only if the uncompressed pixels would not fit."""
    images = config.images
    if 2 * len(entries) * images.size**2 * 3 <= free_bytes(config):
        return
    some = entries[:: max(len(entries) // _TRIED, 1)]
    pixels = [found["image"] for chunk in chunks(some, images) for found in decode_isolated(chunk, images)]
    sizes = [pa.compress(stored(one, images), codec="lz4").size for one in pixels]
    what = f"prepare: {len(entries):,} images of {images.size} pixels, decoded and then in shards,"
    need = (len(entries) + num_to_decode) * sum(sizes) / len(sizes)
    refuse_small_disk(config, what, need, "lower images.size, choose another workspace")


class _DecodeChunk:
    """One Ray Data task: decodes some files and gives a row for each, so a bad file costs no other. The images go into
    one file, which a later run reuses. If it cannot read a file, it writes none, and a later run tries again."""

    def __init__(self, images: Images, entries: Callable[[], Entries], tries: Any = None) -> None:
        self._images, self._entries, self._tries = images, entries, tries

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        file, first, end, is_there = (batch[name][0] for name in ("file", "first", "end", "is_there"))
        if is_there:
            known = _read_decoded(str(file), ["index", "sample_id", "reason"])
            is_whole = sorted(values(known["index"])) == list(range(first, end))
            facts = zip(values(known["sample_id"]), values(known["reason"]), strict=True)
            if is_whole and all(not why.startswith(UNREADABLE) if why else _ID.fullmatch(i) for i, why in facts):
                return known
        chunk = self._entries().places(int(first), int(end))
        with trying(self._tries, f"{len(chunk)} images, {quoted(chunk[0][1])} the first"):
            rows = [one | {"image": stored(one["image"], self._images)} for one in decode_isolated(chunk, self._images)]
        table = pa.Table.from_pylist(rows, schema=_DECODED)
        write_bytes(str(file), encode_images(table))
        return table.drop_columns(["image"])


def refuse_too_many_bad(images: Images, entries: Entries, reasons: Mapping[int, str], seen: int, total: int) -> None:
    """Raises DataError: `reasons` not to use entries, of the `seen` ones so far, are too many of the `total`."""
    if len(reasons) > images.max_bad_share * total:
        some = "; ".join(f"{entry_name(entries[n])}: {reason}" for n, reason in islice(reasons.items(), 5))
        so_far = f", after {seen} images" if seen < total else ""
        raise DataError(
            f"{len(reasons)} of {total} images cannot be used, above images.max_bad_share={images.max_bad_share}"
            f"{so_far}: {some}{' …' if len(reasons) > 5 else ''}; repair or remove them, or raise images.max_bad_share"
        )


def _check_train(entries: Entries, train_S: np.ndarray) -> None:
    counts = entries[train_S].label_counts()
    if lacking := [name for name in entries.labels if not counts[name]]:
        raise DataError(
            f"no usable train image of {', '.join(map(repr, lacking[:5]))} is left after bad files and duplicates; "
            "add some, or remove the class from the data"
        )


def _write(
    samples: SampleSet,
    directory: StageDirectory,
    there: Collection[str],
    known: Decoded,
    drawn: Drawn,
    files: Mapping[str, slice],
    images: Images,
    plan: Plan,
    progress: Progress,
) -> None:
    """Bring the decoded images of each shard together with Ray Data, whose tasks write the shards. Those that a killed
    run has written stay: `there` are the files of the directory."""
    rows_of = {shard_name(split, k): rows for split in SPLITS for k, rows in enumerate(samples.shards[split])}
    done = {name for name in _shards_there(directory, there, samples) if name in rows_of}
    numbers_S = np.concatenate([drawn.splits[split] for split in SPLITS])
    facts_N = np.full(len(known.entries), -1, _FACT)
    facts_N["shard"][numbers_S] = np.repeat(np.arange(len(rows_of)), list(rows_of.values()))
    facts_N["position"][numbers_S] = np.arange(len(numbers_S))
    for split in SPLITS:
        labelled_S = drawn.splits[split][: samples.num_labelled[split]]
        facts_N["label"][labelled_S] = known.entries.label_N[labelled_S]
    is_done = np.array([name in done for name in rows_of])
    facts_N["shard"][numbers_S[is_done[facts_N["shard"][numbers_S]]]] = -1
    wanted = [file for file, which in files.items() if (facts_N["shard"][which] >= 0).any()]
    left, found = {name: rows for name, rows in rows_of.items() if name not in done}, dict[str, int]()
    with progress.task("shards", len(numbers_S), "images", done=len(numbers_S) - sum(left.values())) as advance:
        for block in _written(wanted, facts_N, [*rows_of], directory.path, images, plan) if left else ():
            found |= zip(values(block["shard"]), values(block["rows"]), strict=True)
            advance(sum(values(block["rows"])))
    assert found == left, "every sample reaches its shard"


def _shards_there(directory: StageDirectory, files: Collection[str], samples: SampleSet) -> set[str]:
    """The names of shards that an earlier run of this order has written. Those of another order are removed: a file
    that could not be read then can be read now."""
    order = {"ids": samples.ids, "labels": samples.labels}
    there = {name.removesuffix(".parquet") for name in files if name.endswith(".parquet")}
    if read_state(f"{directory.path}/order.json", dict[str, Any]) == order:
        return there
    for name in there:
        directory.fs.remove(f"{directory.place}/{name}.parquet")
    directory.write_json("order.json", order)
    return set()


def _written(
    files: list[str], facts_N: np.ndarray, names: list[str], path: str, images: Images, plan: Plan
) -> Iterator[pa.Table]:
    """Write the images with a shard in `facts_N` into it; gives how many `rows` each `shard` has got."""
    shared = ray.put(facts_N)
    refuse_others = refuse_other_jpegs if images.store == "jpeg" else refuse_other_sizes

    def place(batch: dict[str, np.ndarray]) -> pa.Table:
        facts_N, placed = ray.get(shared), []
        for file in map(str, batch["file"]):
            block = _read_decoded(file, ["index", "sample_id", "image"])
            facts_R = facts_N[block["index"].to_numpy()]
            kept = block.filter(pa.array(facts_R["shard"] >= 0)).drop_columns(["index"])
            refuse_others(kept, images.size, file)
            facts_R = facts_R[facts_R["shard"] >= 0]
            for name in facts_R.dtype.names or ():
                kept = kept.append_column(name, pa.array(facts_R[name]))
            placed.append(kept)
        return pa.concat_tables(placed)

    def write(rows: pa.Table) -> pa.Table:
        (shard,) = set(values(rows["shard"]))
        label_R, split = rows["label"].to_numpy(), names[shard].rpartition("-")[0]
        rows = rows.set_column(rows.schema.get_field_index("label"), "label", pa.array(label_R, mask=label_R < 0))
        for name, value in (("source", "real"), ("split", split)):
            rows = rows.append_column(name, pa.array([value] * len(rows)))
        write_bytes(f"{path}/{names[shard]}.parquet", encode_shard(rows.sort_by("position")))
        return pa.table({"shard": [names[shard]], "rows": [len(rows)]})

    pixels = 3 * images.size**2 * int((facts_N["shard"] >= 0).sum())
    if pixels <= _PART_BYTES:  # one task would do it all, and starting Ray's shuffle takes seconds
        rows = place({"file": np.array(files, object)})
        yield from (write(rows.filter(pc.equal(rows["shard"], shard))) for shard in pc.unique(rows["shard"]))
        return
    num_tasks = min(max(2 * math.ceil(plan.cpus), pixels // SHARD_BYTES), len(files))
    placed = ray.data.from_items([{"file": file} for file in files], override_num_blocks=num_tasks).map_batches(
        place, batch_size=None, batch_format="numpy", num_cpus=plan.decode_cpus
    )
    parts = min(max(2 * math.ceil(plan.cpus), pixels // _PART_BYTES), len(names))
    written = placed.groupby("shard", num_partitions=parts).map_groups(
        write, batch_format="pyarrow", num_cpus=plan.decode_cpus
    )
    yield from written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _read_decoded(file: str, columns: list[str]) -> pa.Table:
    return read_table(file, pa.schema([_DECODED.field(name) for name in columns]))


def prepare(execution: Execution) -> None:
    config, progress, work = execution.config, execution.progress, execution.work

    def make(_: Any) -> None:
        prepare_samples(config, work.listing, work.prepared, execution.plan(), progress)

    execution.record.uses({"decoded": decoded_directory(config, work.listing).path})
    samples = execution.outcome.samples = samples_from_json(execution.result(work.prepared, make))
    counts = []
    for split in (split for split, shards in samples.shards.items() if shards):
        rows, labelled = samples.num_rows(split), samples.num_labelled[split]
        counts.append(f"{rows} {split}" + (f" ({labelled} labelled)" if labelled < rows else ""))
    progress.line(f"samples:  {', '.join(counts)}; {len(samples.classes)} classes")
    if samples.num_refused:
        progress.line(f"          {samples.num_refused} refused; see the reasons in {samples.path}/refused.json")
    for what, count in work.listing.ignored.items():
        progress.line(f"          ignored: {counted(count, what)}")
    for what, count in work.listing.notes.items():
        progress.line(f"          note: {counted(count, what)}")
    execution.tracker.parent.data(config, samples)

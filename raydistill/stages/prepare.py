"""prepare: decode every image to upright RGB, drop duplicates, split, shuffle, and write parquet shards.

No shard has train images with a label and others without, so who visits the labelled ones more often reads no others.
The directory of decoded images does not depend on the seed, the splits or the labels. So all seeds share it, and a
killed command resumes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from raydistill.cluster.plan import Plan
from raydistill.cluster.restarts import new_tries, trying
from raydistill.config import SHARD_BYTES, Images, RunConfig
from raydistill.data.chunks import Chunk, decode_isolated
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
from raydistill.data.sources.listing import Entry, Listing, entry_name
from raydistill.data.sources.reading import UNREADABLE
from raydistill.data.splits import Decoded, Drawn, draw, lacking_classes, without_duplicates
from raydistill.errors import DataError
from raydistill.escaping import counted, quoted
from raydistill.execution import Execution
from raydistill.identity import decoded_directory
from raydistill.runtime.progress import Progress
from raydistill.secrets import redacted_tree
from raydistill.storage.directory import StageDirectory, free_bytes, refuse_small_disk
from raydistill.storage.filesystems import exists, write_bytes
from raydistill.storage.tables import read_table, values

# Images of a task and of a file of decoded images: small enough to use all CPUs, large enough for few files.
_FEWEST_TOGETHER, _MOST_TOGETHER, _FILES = 32, 256, 256
_PART_BYTES = 4 * SHARD_BYTES  # of pixels that a task brings together, some shards
_TRIED = 32  # images to decode for an estimate of the size of all

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
    directory.begin()
    files, known = _decode_images(config, listing, plan, progress)
    kept, refused = without_duplicates(known)
    drawn = draw(config, listing, kept)
    if drawn.num_left_out:
        most = config.images.num_unlabelled
        progress.line(f"prepare   {drawn.num_left_out} unlabelled images are left out: images.num_unlabelled={most}")
    _check_train(listing, drawn.splits["train"])
    for what, names in lacking_classes(listing, drawn.splits).items():
        progress.line(
            f"prepare   {what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        )
    written = _write(config, listing, directory, drawn, files, plan, progress)
    result = dataclasses.replace(written, num_refused=len(refused))
    directory.write_json("refused.json", redacted_tree(refused))
    directory.finish(dataclasses.asdict(result))
    return result


def _decode_images(
    config: RunConfig, listing: Listing, plan: Plan, progress: Progress
) -> tuple[list[str], list[Decoded]]:
    """Decode the images that no earlier run has decoded; returns the files and what is known of each entry."""
    directory = decoded_directory(config, listing)
    directory.begin()
    together = {
        f"{directory.path}/{k:05d}.parquet": chunk for k, chunk in enumerate(chunks(listing.entries, config.images))
    }
    _refuse_small_disk(config, listing, together)
    parts = [{"file": file, "chunk": json.dumps(chunk)} for file, chunk in together.items()]
    decoded = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        _DecodeChunk(config.images, new_tries()), batch_size=1, batch_format="numpy", num_cpus=plan.decode_cpus
    )
    known, bad = list[Decoded](), list[Decoded]()
    found = {index for part in parts if exists(part["file"]) for index, _, _ in together[part["file"]]}
    with progress.task("prepare", len(listing.entries), "images") as advance:
        for block in decoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            columns = (values(block[name]) for name in ("index", "sample_id", "reason"))
            known += (new := [Decoded(listing.entries[index], i, why) for index, i, why in zip(*columns, strict=True)])
            bad += (d for d in new if d.reason)
            refuse_too_many_bad(config.images, bad, len(known), len(listing.entries))
            read_again = sum(index in found for index in values(block["index"]))
            advance(read_again, worked=False)  # an earlier run decoded these
            advance(len(block) - read_again)
    known.sort(key=lambda d: (d.entry.path, d.entry.row or 0))
    return [part["file"] for part in parts], known


def _refuse_small_disk(config: RunConfig, listing: Listing, together: Mapping[str, Chunk]) -> None:
    """Raises ConfigError if the images to decode, and all images once more in shards, may not fit on the disk. It
    compresses some for an estimate only if the uncompressed pixels would not fit."""
    entries, images = listing.entries, config.images
    if 2 * len(entries) * images.size**2 * 3 <= free_bytes(config):
        return
    some = entries[:: max(len(entries) // _TRIED, 1)]
    pixels = [found["image"] for chunk in chunks(some, images) for found in decode_isolated(chunk, images)]
    sizes = [pa.compress(stored(one, images), codec="lz4").size for one in pixels]
    count = len(entries) + sum(len(chunk) for file, chunk in together.items() if not exists(file))
    what = f"prepare: {len(entries):,} images of {images.size} pixels, decoded and then in shards,"
    refuse_small_disk(config, what, count * sum(sizes) / len(sizes), "lower images.size, choose another workspace")


def chunks(entries: Sequence[Entry], images: Images) -> Iterator[Chunk]:
    """Index, path and row of the entries of one read: rows of one parquet file, or some files."""
    together = min(max(len(entries) // _FILES, _FEWEST_TOGETHER), _MOST_TOGETHER, SHARD_BYTES // (3 * images.size**2))
    chunk: Chunk = []
    for index, entry in enumerate(entries):
        if len(chunk) == together or (chunk and entry.row is not None and chunk[0][1] != entry.path):
            yield chunk
            chunk = []
        chunk.append((index, entry.path, entry.row))
    yield chunk


class _DecodeChunk:
    """One Ray Data task: decodes some files and gives a row for each, so a bad file costs no other. The images go into
    one file, which a later run reuses. If it cannot read a file, it writes none, and a later run tries again."""

    def __init__(self, images: Images, tries: Any = None) -> None:
        self._images, self._tries = images, tries

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        file, chunk = str(batch["file"][0]), json.loads(str(batch["chunk"][0]))
        if exists(file):
            known = _read_decoded(file, ["index", "sample_id", "reason"])
            is_whole = sorted(values(known["index"])) == [index for index, _, _ in chunk]
            if is_whole and not any(reason.startswith(UNREADABLE) for reason in values(known["reason"])):
                return known
        with trying(self._tries, f"{len(chunk)} images, {quoted(chunk[0][1])} the first"):
            rows = [one | {"image": stored(one["image"], self._images)} for one in decode_isolated(chunk, self._images)]
        table = pa.Table.from_pylist(rows, schema=_DECODED)
        write_bytes(file, encode_images(table))
        return table.drop_columns(["image"])


def refuse_too_many_bad(images: Images, bad: Sequence[Decoded], seen: int, total: int) -> None:
    """Raises DataError: `bad`, of the `seen` images so far, are too many of the `total`."""
    if len(bad) > images.max_bad_share * total:
        some = "; ".join(f"{entry_name(d.entry)}: {d.reason}" for d in bad[:5])
        so_far = f", after {seen} images" if seen < total else ""
        raise DataError(
            f"{len(bad)} of {total} images cannot be used, above images.max_bad_share={images.max_bad_share}{so_far}: "
            f"{some}{' …' if len(bad) > 5 else ''}; repair or remove them, or raise images.max_bad_share"
        )


def _check_train(listing: Listing, train: list[Decoded]) -> None:
    counts = Counter(d.entry.label for d in train)
    if lacking := [name for name in listing.classes if not counts[name]]:
        raise DataError(
            f"no usable train image of {', '.join(map(repr, lacking[:5]))} is left after bad files and duplicates; "
            "add some, or remove the class from the data"
        )


def _write(
    config: RunConfig,
    listing: Listing,
    directory: StageDirectory,
    drawn: Drawn,
    files: list[str],
    plan: Plan,
    progress: Progress,
) -> SampleSet:
    """Bring the decoded images of each shard together with Ray Data, whose tasks write the shards."""
    index_of = {name: number for number, name in enumerate(listing.classes)}
    entry_index = {(e.path, e.row): number for number, e in enumerate(listing.entries)}
    size = config.images.rows_per_shard
    rows, names, shard_of_row = [], list[tuple[str, int]](), list[int]()
    for split, members in drawn.splits.items():
        border = len(drawn.labelled) if split == "train" else 0
        starts = [*range(0, border, size), *range(border, len(members), size), len(members)]
        for number, (first, end) in enumerate(pairwise(starts)):
            shard_of_row += [len(names)] * (end - first)
            names.append((shard_name(split, number), end - first))
        for d in members:
            keeps = d.entry.label and (split != "train" or d.id in drawn.labelled)
            label = index_of[d.entry.label] if keeps and d.entry.label else None
            rows.append((entry_index[d.entry.path, d.entry.row], d.id, label, split))
    facts = pa.table(
        {
            "shard": pa.array(shard_of_row, pa.int32()),
            "position": pa.array(range(len(rows)), pa.int64()),
            "sample_id": [r[1] for r in rows],
            "label": pa.array([r[2] for r in rows], pa.int32()),
            "source": ["real"] * len(rows),
            "split": [r[3] for r in rows],
        }
    )
    fact_of_entry = np.full(len(listing.entries), -1)
    fact_of_entry[[r[0] for r in rows]] = np.arange(len(rows))
    places, found = [f"{directory.path}/{name}.parquet" for name, _ in names], dict[int, int]()
    with progress.task("shards", len(rows), "images") as advance:
        for block in _written(files, facts, fact_of_entry, places, config.images, plan):
            found |= zip(values(block["shard"]), values(block["rows"]), strict=True)
            advance(sum(values(block["rows"])))
    assert found == dict(enumerate(count for _, count in names)), "every sample reaches its shard"
    return SampleSet(
        path=directory.path,
        classes=listing.classes,
        size=config.images.size,
        shards={split: tuple(count for name, count in names if name.startswith(f"{split}-")) for split in SPLITS},
        num_labelled={s: sum(r[2] is not None for r in rows if r[3] == s) for s in SPLITS},
        num_refused=0,
        ids={s: _digest_of_ids([d.id for d in members], drawn) for s, members in drawn.splits.items()},
        labels={s: _digest([listing.classes, *((r[1], r[2]) for r in rows if r[3] == s)]) for s in SPLITS},
        store=config.images.store,
    )


def _written(
    files: list[str], facts: pa.Table, fact_of_entry: np.ndarray, shards: list[str], images: Images, plan: Plan
) -> Iterator[pa.Table]:
    """Write the rows of `facts` with their images into their shards; gives how many `rows` each `shard` has got.
    `fact_of_entry` is the row of each entry, or -1."""
    shared = ray.put((facts, fact_of_entry))
    refuse_others = refuse_other_jpegs if images.store == "jpeg" else refuse_other_sizes

    def place(batch: dict[str, np.ndarray]) -> pa.Table:
        facts, fact_of_entry = ray.get(shared)
        file = str(batch["file"][0])
        block = _read_decoded(file, ["index", "image"])
        places = fact_of_entry[block["index"].to_numpy()]
        kept = block.filter(pa.array(places >= 0))
        refuse_others(kept, images.size, file)
        return facts.take(places[places >= 0]).append_column("image", kept["image"])

    def write(rows: pa.Table) -> pa.Table:
        (shard,) = set(values(rows["shard"]))
        write_bytes(shards[shard], encode_shard(rows.sort_by("position")))
        return pa.table({"shard": [shard], "rows": [len(rows)]})

    placed = ray.data.from_items([{"file": file} for file in files], override_num_blocks=len(files)).map_batches(
        place, batch_size=1, batch_format="numpy", num_cpus=plan.decode_cpus
    )
    pixels = 3 * images.size**2 * len(facts)
    parts = min(max(2 * math.ceil(plan.cpus), pixels // _PART_BYTES), len(shards))
    written = placed.groupby("shard", num_partitions=parts).map_groups(
        write, batch_format="pyarrow", num_cpus=plan.decode_cpus
    )
    yield from written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _read_decoded(file: str, columns: list[str]) -> pa.Table:
    return read_table(file, pa.schema([_DECODED.field(name) for name in columns]))


def _digest_of_ids(ids: list[str], drawn: Drawn) -> str:
    """Also of the place where labelled images end: a shard ends there, and soft targets line up with shards."""
    border = sum(i in drawn.labelled for i in ids)
    return _digest([*ids[:border], None, *ids[border:]] if 0 < border < len(ids) else ids)


def _digest(values: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


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

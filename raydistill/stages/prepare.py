"""prepare: every usable image, upright RGB, content-addressed, split and permuted, in parquet shards.

Images are decoded into a directory of their own first, which no seed, split or choice of labels has a say in: so they
are decoded once for all seeds, and a command that was killed goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from pyarrow import parquet as pq

from raydistill.cluster.plan import Plan
from raydistill.cluster.restarts import new_tries, trying
from raydistill.config import SHARD_BYTES, Images, RunConfig
from raydistill.data.chunks import Chunk, decode_isolated
from raydistill.data.sample import (
    SPLITS,
    SampleSet,
    encode_shard,
    samples_from_json,
    seeded_rank,
    shard_name,
)
from raydistill.data.sources.listing import Entry, Listing, entry_name
from raydistill.data.sources.reading import UNREADABLE
from raydistill.errors import DataError
from raydistill.execution import Execution
from raydistill.identity import decoded_directory
from raydistill.runtime.progress import Progress
from raydistill.secrets import redacted_tree
from raydistill.storage.directory import StageDirectory, free_bytes, refuse_small_disk
from raydistill.storage.filesystems import exists, write_bytes
from raydistill.storage.tables import read_table, values
from raydistill.strangers import written

# Of a task, and of a file of decoded images: work for all CPUs where there are few, and not too many files else.
_FEWEST_TOGETHER, _MOST_TOGETHER, _FILES = 32, 256, 256
_TRIED = 32  # decoded to tell how large all will be

_DECODED = pa.schema(
    [
        pa.field("index", pa.int64()),  # of the entry in the listing
        pa.field("sample_id", pa.string()),
        pa.field("image", pa.binary()),  # PNG at the working size; empty where there is a reason
        pa.field("reason", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Decoded:
    """What is known of an entry once it is decoded: its id, or the reason why there is none."""

    entry: Entry
    id: str
    reason: str


def prepare_samples(
    config: RunConfig, listing: Listing, directory: StageDirectory, plan: Plan, progress: Progress
) -> SampleSet:
    """Decode, drop duplicates, split, permute, write shards. Refused files are listed in `refused.json`.

    Raises DataError: too many bad files, as soon as they are, or a class without a single good train image; ConfigError
    where the disk may be too small.
    """
    directory.begin()
    files, known = _decode_images(config, listing, plan, progress)
    kept, refused = without_duplicates(known)
    splits = draw_splits(config, listing, kept)
    labelled = draw_labelled(config, listing, splits["train"])
    num_train = len(splits["train"])
    splits["train"] = fewer_unlabelled(config, splits["train"], labelled)
    if fewer := num_train - len(splits["train"]):
        most = config.images.num_unlabelled
        progress.line(f"prepare   {fewer} unlabelled images are left out: images.num_unlabelled={most}")
    _check_train(config.images, listing, splits["train"])
    for what, names in lacking_classes(listing, splits).items():
        progress.line(f"prepare   {len(names)} {what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}")
    result = _write(config, listing, directory, splits, labelled, files, len(refused), plan)
    directory.write_json("refused.json", redacted_tree(refused))
    directory.finish(dataclasses.asdict(result))
    return result


def _decode_images(
    config: RunConfig, listing: Listing, plan: Plan, progress: Progress
) -> tuple[list[str], list[Decoded]]:
    """The files of decoded images, those that are there already left as they are, and what is known of each entry."""
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
            advance(read_again, worked=False)  # a killed run had decoded these
            advance(len(block) - read_again)
    known.sort(key=lambda d: (d.entry.path, d.entry.row or 0))
    return [part["file"] for part in parts], known


def _refuse_small_disk(config: RunConfig, listing: Listing, together: Mapping[str, Chunk]) -> None:
    """Raises ConfigError where the decoded images that are still to come, and all of them once more in shards, may not
    fit. PNG is no larger than the pixels, so some are decoded only where those would not fit."""
    entries, images = listing.entries, config.images
    if 2 * len(entries) * images.size**2 * 3 <= free_bytes(config):
        return
    some = entries[:: max(len(entries) // _TRIED, 1)]
    sizes = [len(found["image"]) for chunk in chunks(some, images) for found in decode_isolated(chunk, images)]
    count = len(entries) + sum(len(chunk) for file, chunk in together.items() if not exists(file))
    what = f"prepare: {len(entries):,} images of {images.size} pixels, decoded and then in shards,"
    refuse_small_disk(config, what, count * sum(sizes) / len(sizes), "lower images.size, choose another workspace")


def chunks(entries: Sequence[Entry], images: Images) -> Iterator[Chunk]:
    """Index, path and row of entries that are read together: rows of one parquet file, or some files."""
    together = min(max(len(entries) // _FILES, _FEWEST_TOGETHER), _MOST_TOGETHER, SHARD_BYTES // (3 * images.size**2))
    chunk: Chunk = []
    for index, entry in enumerate(entries):
        if len(chunk) == together or (chunk and entry.row is not None and chunk[0][1] != entry.path):
            yield chunk
            chunk = []
        chunk.append((index, entry.path, entry.row))
    yield chunk


class _DecodeChunk:
    """One Ray Data task: some files in, a row for each out, so that a bad one takes nothing along. Their images go into
    one file, which a later run finds; unless one could not be read, which may be over by then."""

    def __init__(self, images: Images, tries: Any = None) -> None:
        self._images, self._tries = images, tries

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        file, chunk = str(batch["file"][0]), json.loads(str(batch["chunk"][0]))
        if exists(file):
            known = _read_decoded(file, ["index", "sample_id", "reason"])
            is_whole = sorted(values(known["index"])) == [index for index, _, _ in chunk]
            if is_whole and not any(reason.startswith(UNREADABLE) for reason in values(known["reason"])):
                return known
        with trying(self._tries, f"{len(chunk)} images, {written(chunk[0][1])} the first"):
            rows = decode_isolated(chunk, self._images)
        table = pa.Table.from_pylist(rows, schema=_DECODED)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="none", use_dictionary=False)  # PNGs are compressed
        write_bytes(file, sink.getvalue().to_pybytes())
        return table.drop_columns(["image"])


def refuse_too_many_bad(images: Images, bad: Sequence[Decoded], seen: int, total: int) -> None:
    """The bad ones among the images seen so far, out of all of them. Raises DataError."""
    if len(bad) > images.max_bad_share * total:
        some = "; ".join(f"{entry_name(d.entry)}: {d.reason}" for d in bad[:5])
        so_far = f", with {seen} looked at" if seen < total else ""
        raise DataError(
            f"{len(bad)} of {total} images cannot be used, above images.max_bad_share={images.max_bad_share}{so_far}: "
            f"{some}{' …' if len(bad) > 5 else ''}"
        )


def without_duplicates(known: list[Decoded]) -> tuple[list[Decoded], list[dict[str, str]]]:
    """One entry for each distinct file. Of copies the test split's stays, then val's, then a labelled one; an image
    under two labels belongs to neither."""
    refused = [{"path": entry_name(d.entry), "reason": d.reason} for d in known if d.reason]
    copies: dict[str, list[Decoded]] = defaultdict(list)
    for d in known:
        if not d.reason:
            copies[d.id].append(d)
    kept = []
    for group in copies.values():
        labels = sorted({d.entry.label for d in group if d.entry.label})
        if len(labels) > 1:
            reason = f"the same file stands under {len(labels)} labels: {', '.join(labels)}"
            refused += [{"path": entry_name(d.entry), "reason": reason} for d in group]
            continue
        order = {"test": 0, "val": 1}
        first, *others = sorted(group, key=lambda d: (order.get(d.entry.split or "", 2), d.entry.label is None))
        kept.append(first)
        refused += [{"path": entry_name(d.entry), "reason": f"a copy of {entry_name(first.entry)}"} for d in others]
    return kept, refused


def draw_splits(config: RunConfig, listing: Listing, kept: list[Decoded]) -> dict[str, list[Decoded]]:
    """The splits that the data names; of classes without a named one, seeded shares drawn by content."""
    splits: dict[str, list[Decoded]] = {split: [] for split in SPLITS}
    to_share: dict[str, list[Decoded]] = defaultdict(list)
    has_val, has_test = listing.has_split("val"), listing.has_split("test")
    for d in kept:
        if d.entry.label and (d.entry.split is None or (d.entry.split == "train" and not has_val)):
            to_share[d.entry.label].append(d)
        else:
            splits[d.entry.split or "train"].append(d)
    # A test split is drawn only where the data names none at all.
    test_share = 0.0 if has_val or has_test else config.images.test_share
    val_share = 0.0 if has_val else config.images.val_share
    for group in to_share.values():
        group.sort(key=lambda d: seeded_rank(config.seed, "split", d.id))
        num_test = _share_of(len(group), test_share, spare=2 if val_share else 1)
        num_val = _share_of(len(group) - num_test, val_share, spare=1)
        splits["test"] += group[:num_test]
        splits["val"] += group[num_test : num_test + num_val]
        splits["train"] += group[num_test + num_val :]
    for rows in splits.values():
        rows.sort(key=lambda d: seeded_rank(config.seed, "order", d.id))
    return splits


def _share_of(count: int, share: float, spare: int) -> int:
    """At least one where a share is asked for, while `spare` images are left over."""
    return min(max(round(count * share), 1), max(count - spare, 0)) if share else 0


def draw_labelled(config: RunConfig, listing: Listing, train: list[Decoded]) -> set[str]:
    """Ids of train samples that keep their label: all, or `images.num_labelled` of them, each class in proportion."""
    by_class: dict[str, list[str]] = {name: [] for name in listing.classes}
    for d in train:
        if d.entry.label:
            by_class[d.entry.label].append(d.id)
    wanted, total = config.images.num_labelled, sum(map(len, by_class.values()))
    if wanted is None or wanted >= total:
        return {i for ids in by_class.values() for i in ids}
    if wanted < len(by_class):
        raise DataError(
            f"images.num_labelled={wanted} is fewer than the {len(by_class)} classes; give each at least one"
        )
    exact = {name: max(1.0, wanted * len(ids) / total) for name, ids in by_class.items()}
    counts = {name: int(value) for name, value in exact.items()}
    # Largest remainders first, until the number is met; then, if the minimum of one overshot it, largest classes first.
    order = sorted(exact, key=lambda name: counts[name] - exact[name])
    for step in range(wanted - sum(counts.values())):
        counts[order[step % len(order)]] += 1
    for _ in range(sum(counts.values()) - wanted):
        counts[max(counts, key=lambda name: counts[name])] -= 1
    ranked = {n: sorted(ids, key=lambda i: seeded_rank(config.seed, "label", i)) for n, ids in by_class.items()}
    return {i for name, ids in ranked.items() for i in ids[: counts[name]]}


def lacking_classes(listing: Listing, splits: dict[str, list[Decoded]]) -> dict[str, list[str]]:
    """Classes with too few images in a split, by what they lack."""
    counts = {split: Counter(d.entry.label for d in members) for split, members in splits.items()}
    found = {"classes with a single train image": [c for c in listing.classes if counts["train"][c] == 1]}
    for split in ("val", "test"):
        if splits[split]:
            found[f"classes without a {split} image"] = [c for c in listing.classes if not counts[split][c]]
    return {what: names for what, names in found.items() if names}


def _check_train(images: Images, listing: Listing, train: list[Decoded]) -> None:
    counts = Counter(d.entry.label for d in train)
    if lacking := [name for name in listing.classes if not counts[name]]:
        raise DataError(
            f"no usable train image is left of {', '.join(map(repr, lacking[:5]))} after bad files and duplicates; "
            "add some, or take the class out of the data"
        )


def _write(
    config: RunConfig,
    listing: Listing,
    directory: StageDirectory,
    splits: dict[str, list[Decoded]],
    labelled: set[str],
    files: list[str],
    num_refused: int,
    plan: Plan,
) -> SampleSet:
    """Sort the decoded images into place with Ray Data and write them shard by shard."""
    index_of = {name: number for number, name in enumerate(listing.classes)}
    entry_index = {(e.path, e.row): number for number, e in enumerate(listing.entries)}
    size = config.images.rows_per_shard
    rows, names = [], []
    for split, members in splits.items():
        for first in range(0, len(members), size):
            names.append((shard_name(split, first // size), len(members[first : first + size])))
        for d in members:
            keeps = d.entry.label and (split != "train" or d.id in labelled)
            label = index_of[d.entry.label] if keeps and d.entry.label else None
            rows.append((entry_index[d.entry.path, d.entry.row], d.id, label, split))
    facts = pa.table(
        {
            "position": pa.array(range(len(rows)), pa.int64()),
            "sample_id": [r[1] for r in rows],
            "label": pa.array([r[2] for r in rows], pa.int32()),
            "source": ["real"] * len(rows),
            "split": [r[3] for r in rows],
        }
    )
    fact_of_entry = np.full(len(listing.entries), -1)
    fact_of_entry[[r[0] for r in rows]] = np.arange(len(rows))
    shared = ray.put((facts, fact_of_entry))

    def place(batch: dict[str, np.ndarray]) -> pa.Table:
        facts, fact_of_entry = ray.get(shared)
        block = _read_decoded(str(batch["file"][0]), ["index", "image"])
        places = fact_of_entry[block["index"].to_numpy()]
        return facts.take(places[places >= 0]).append_column("image", block["image"].filter(pa.array(places >= 0)))

    placed = ray.data.from_items([{"file": file} for file in files], override_num_blocks=len(files)).map_batches(
        place, batch_size=1, batch_format="numpy", num_cpus=plan.decode_cpus
    )
    buffer: pa.Table | None = None
    pending = iter(names)
    expected = next(pending, None)
    for block in placed.sort("position").iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        buffer = block if buffer is None else pa.concat_tables([buffer, block])
        while expected and buffer.num_rows >= expected[1]:
            directory.write(f"{expected[0]}.parquet", encode_shard(buffer.slice(0, expected[1])))
            buffer, expected = buffer.slice(expected[1]), next(pending, None)
    assert expected is None, "every shard is written"
    assert buffer is None or buffer.num_rows == 0, "every sample reaches a shard"
    digests = {s: _digest([d.id for d in members]) for s, members in splits.items()}
    shards = {split: tuple(count for name, count in names if name.startswith(f"{split}-")) for split in SPLITS}
    counts = {s: sum(r[2] is not None for r in rows if r[3] == s) for s in SPLITS}
    labels = {s: _digest([listing.classes, *((r[1], r[2]) for r in rows if r[3] == s)]) for s in SPLITS}
    return SampleSet(directory.path, listing.classes, config.images.size, shards, counts, num_refused, digests, labels)


def _read_decoded(file: str, columns: list[str]) -> pa.Table:
    return read_table(file, pa.schema([_DECODED.field(name) for name in columns]))


def _digest(values: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def fewer_unlabelled(config: RunConfig, train: list[Decoded], labelled: set[str]) -> list[Decoded]:
    """Without the unlabelled samples beyond `images.num_unlabelled`."""
    most = config.images.num_unlabelled
    others = sorted((d.id for d in train if d.id not in labelled), key=lambda i: seeded_rank(config.seed, "pool", i))
    left_out = set() if most is None else set(others[most:])
    return [d for d in train if d.id not in left_out]


def prepare(execution: Execution) -> None:
    config, progress, work = execution.config, execution.progress, execution.work

    def make(_: Any) -> None:
        prepare_samples(config, work.listing, work.prepared, execution.plan(), progress)

    samples = execution.outcome.samples = samples_from_json(execution.result(work.prepared, make))
    counts = []
    for split in (split for split, shards in samples.shards.items() if shards):
        rows, labelled = samples.num_rows(split), samples.num_labelled[split]
        counts.append(f"{rows} {split}" + (f" ({labelled} labelled)" if labelled < rows else ""))
    progress.line(f"samples:  {', '.join(counts)}; {len(samples.classes)} classes")
    if samples.num_refused:
        progress.line(f"          {samples.num_refused} refused, each with its reason: {samples.path}/refused.json")
    for what, count in work.listing.ignored.items():
        progress.line(f"          {count} ignored: {what}")
    for what, count in work.listing.notes.items():
        progress.line(f"          mind: {count} {what}")
    execution.tracker.parent.data(config, samples)

"""The row that flows through every stage, the shards that hold rows, and the order in which training visits them.

| column    | type   | meaning                                                                   |
|-----------|--------|---------------------------------------------------------------------------|
| sample_id | string | 32 hex digits: BLAKE2b-128 of the original file's bytes                   |
| image     | binary | the working image, upright and square: 3 bytes a pixel, red, green, blue; |
|           |        | in shards with `images.store: jpeg`, a JPEG of it                         |
| label     | int32  | index into the one class list; null for an unlabelled image               |
| source    | string | "real" or "generated"                                                     |
| split     | string | "train", "val" or "test"; unlabelled images are in "train"                |
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import AfterValidator, NonNegativeInt

from raydistill.errors import CheckpointError
from raydistill.storage.state import result_of
from raydistill.storage.tables import read_table, values

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)
SPLITS = ("train", "val", "test")
# Shards whose rows are shuffled together. Each shard is already a fair sample, so a few mix well.
WINDOW_SHARDS = 8


def _with_train(by_split: dict[str, Any]) -> dict[str, Any]:
    if "train" not in by_split:
        raise ValueError("it lacks the split train")
    return by_split


@dataclass(frozen=True)
class SampleSet:
    """The result of `prepare`. Equal hashes in `ids` mean equal images; equal hashes in `labels` mean equal labels."""

    path: str
    classes: tuple[str, ...]
    size: int
    shards: Annotated[dict[str, tuple[NonNegativeInt, ...]], AfterValidator(_with_train)]  # split -> rows of each shard
    num_labelled: Annotated[dict[str, NonNegativeInt], AfterValidator(_with_train)]
    num_refused: NonNegativeInt
    ids: Annotated[dict[str, str], AfterValidator(_with_train)]  # split -> hash of its sample ids in order
    labels: Annotated[dict[str, str], AfterValidator(_with_train)]  # split -> hash of its classes and of all labels
    store: Literal["pixels", "jpeg"] = "pixels"  # what the shards' column `image` holds

    def num_rows(self, split: str) -> int:
        return sum(self.shards.get(split, ()))


def samples_from_json(done: dict[str, Any]) -> SampleSet:
    """The result of a finished `prepare`, from its DONE marker."""
    return result_of(done, str(done.get("path")), SampleSet)


def sample_id(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def seeded_rank(seed: int, purpose: str, sample: str) -> str:
    """A hex number that depends only on the seed and the image. Sorted by it, images keep their order when others are
    added or removed."""
    return hashlib.blake2b(f"{seed}/{purpose}/{sample}".encode(), digest_size=16).hexdigest()


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}"


def encode_shard(rows: pa.Table) -> bytes:
    """Parquet bytes of rows in SCHEMA."""
    return encode_images(rows.select(SCHEMA.names).cast(SCHEMA))


def encode_images(rows: pa.Table) -> bytes:
    """Parquet bytes of a table with pixels. LZ4 unpacks 13 times as many clip-art images a second as PNG, for a fifth
    more bytes, and some hundred times as many photographs, for half as many again."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="lz4", use_dictionary=False, write_statistics=False)
    return sink.getvalue().to_pybytes()


def decode_shard(data: bytes, path: str = "a shard") -> pa.Table:
    """Raises CheckpointError, which names the path."""
    return read_table(path, SCHEMA, data)


def refuse_other_sizes(table: pa.Table, side: int, path: str) -> None:
    """Raises CheckpointError if an image of the table is not `side` x `side` pixels."""
    if any(size != 3 * side**2 for size in values(pc.unique(pc.binary_length(table["image"])))):
        raise CheckpointError(
            f"{path} is damaged (an image is not {side} x {side} pixels); delete it and run the command again"
        )


def working_images(table: pa.Table, side: int) -> np.ndarray:
    """(R, H, H, 3) uint8 working images of rows in SCHEMA, where possible without a copy, so they are read-only."""
    column = table["image"].combine_chunks()
    if not len(column):
        return np.empty((0, side, side, 3), np.uint8)
    first = np.frombuffer(column.buffers()[1], np.int32)[column.offset]
    return np.frombuffer(column.buffers()[2], np.uint8, len(column) * 3 * side**2, first).reshape(-1, side, side, 3)


@dataclass(frozen=True)
class Visits:
    """Rows to visit, in order: shard (V,), row in the shard (V,), and how often each was visited before (V,)."""

    shard: np.ndarray
    row: np.ndarray
    visit: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, which: slice) -> Visits:
        return Visits(self.shard[which], self.row[which], self.visit[which])

    @staticmethod
    def concat(parts: Sequence[Visits]) -> Visits:
        columns = zip(*((p.shard, p.row, p.visit) for p in parts), strict=True)
        return Visits(*(np.concatenate(column) for column in columns))


def visit_order(rows_of_shard: Sequence[np.ndarray], seed: int, start: int = 0) -> Iterator[Visits]:
    """The endless, deterministic order in which training visits rows: window after window, pass after pass.

    `rows_of_shard[k]` lists the rows of shard k that take part. Each pass visits every row once: shards in a seeded
    order, the rows of WINDOW_SHARDS shards shuffled together. The order depends on the seed and the pass alone, so all
    workers and resumed runs share it. The first `start` visits are skipped.
    """
    sizes = np.array([len(rows) for rows in rows_of_shard])
    total = int(sizes.sum())
    if total == 0:
        raise ValueError("visit_order: there are no rows to visit")
    number, skip = divmod(start, total)
    while True:
        order = np.random.default_rng([seed, number]).permutation(len(sizes))
        for first in range(0, len(order), WINDOW_SHARDS):
            window = order[first : first + WINDOW_SHARDS]
            length = int(sizes[window].sum())
            if skip >= length:
                skip -= length
                continue
            # One more than `first`: numpy takes the seeds [a, b] and [a, b, 0] as equal.
            shuffle = np.random.default_rng([seed, number, first + 1]).permutation(length)[skip:]
            shard = np.repeat(window, sizes[window])[shuffle]
            row = np.concatenate([rows_of_shard[k] for k in window])[shuffle]
            yield Visits(shard, row, np.full(len(row), number))
            skip = 0
        number += 1


@dataclass(frozen=True)
class Pools:
    """Rows of each shard, by pool. Of all visits `generated_share` goes to generated rows; of the rest,
    `labelled_share` goes to labelled rows."""

    labelled: Sequence[np.ndarray]
    others: Sequence[np.ndarray]
    labelled_share: float
    generated: Sequence[np.ndarray] = ()
    generated_share: float = 0.0

    def visits_of(self, total: int) -> tuple[int, int, int]:
        """How many of the first `total` visits go to each pool."""
        generated = int(np.floor(total * self.generated_share + 1e-9))
        labelled = int(np.floor((total - generated) * self.labelled_share + 1e-9))
        return labelled, total - generated - labelled, generated


def batch_order(pools: Pools, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Visits]:
    """Endless global batches of exactly `batch_size` visits from `start_step` on.

    The split of a batch is the difference of rounded running totals. So the shares hold over any stretch, and every row
    of a pool is visited equally often, whatever the batch size: no last batch is short, and none is dropped.
    """
    begun = pools.visits_of(start_step * batch_size)
    seeds = (seed * 2, seed * 2 + 1, 2**34 + seed)
    rows = (pools.labelled, pools.others, pools.generated)
    orders = [visit_order(*each) if sum(map(len, each[0])) else None for each in zip(rows, seeds, begun, strict=True)]
    left: list[Visits | None] = [None, None, None]

    def take(pool: int, count: int) -> Iterator[Visits]:
        while count:
            order = orders[pool]
            assert order is not None, "a pool without rows has a share of 0"
            block = left[pool] or next(order)
            yield block[:count]
            left[pool] = block[count:] if len(block) > count else None
            count -= min(count, len(block))

    for step in itertools.count(start_step + 1):
        ended = pools.visits_of(step * batch_size)
        yield Visits.concat([part for pool in range(3) for part in take(pool, ended[pool] - begun[pool])])
        begun = ended

"""The row that flows through every stage, and the shards that hold rows.

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
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import AfterValidator, NonNegativeInt

from raydistill.errors import damaged_file
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


def seeded_ranks(seed: int, purpose: str, ids_N: np.ndarray) -> np.ndarray:
    """(N,) the bytes of `seeded_rank` of images whose ids are given as their 16 bytes."""
    begun, names = hashlib.blake2b(f"{seed}/{purpose}/".encode(), digest_size=16), ids_N.tobytes().hex().encode()
    ranks = bytearray()
    for first in range(0, len(names), 32):
        rank = begun.copy()
        rank.update(names[first : first + 32])
        ranks += rank.digest()
    return np.frombuffer(ranks, "S16")


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}"


def encode_shard(rows: pa.Table) -> bytes:
    """Parquet bytes of rows in SCHEMA."""
    return encode_images(rows.select(SCHEMA.names).cast(SCHEMA))


def encode_images(rows: pa.Table) -> bytes:
    """Parquet bytes of a table with pixels, whose pages have checksums. LZ4 unpacks 13 times as many clip-art images a
    second as PNG, for a fifth more bytes, and some hundred times as many photographs, for half as many again."""
    sink, plain = pa.BufferOutputStream(), {"use_dictionary": False, "write_statistics": False}
    pq.write_table(rows, sink, compression="lz4", write_page_checksum=True, **plain)
    return sink.getvalue().to_pybytes()


def decode_shard(data: bytes, path: str = "a shard") -> pa.Table:
    """Raises CheckpointError, which names the path."""
    return read_table(path, SCHEMA, data)


def refuse_other_sizes(table: pa.Table, side: int, path: str) -> None:
    """Raises CheckpointError if an image of the table is not `side` x `side` pixels."""
    if any(size != 3 * side**2 for size in values(pc.unique(pc.binary_length(table["image"])))):
        raise damaged_file(path, f"an image is not {side} x {side} pixels")


def working_images(table: pa.Table, side: int) -> np.ndarray:
    """(R, H, H, 3) uint8 working images of rows in SCHEMA, where possible without a copy, so they are read-only."""
    column = table["image"].combine_chunks()
    if not len(column):
        return np.empty((0, side, side, 3), np.uint8)
    first = np.frombuffer(column.buffers()[1], np.int32)[column.offset]
    return np.frombuffer(column.buffers()[2], np.uint8, len(column) * 3 * side**2, first).reshape(-1, side, side, 3)

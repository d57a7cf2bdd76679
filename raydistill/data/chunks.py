"""Work on one chunk of a data set's pictures: read them, then decode or inspect each. Isolated processes do it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from raydistill.config import SHARD_BYTES, Images
from raydistill.data.decode import Facts, decode, decode_with_facts, large_alone
from raydistill.data.isolation import Killed, run_isolated
from raydistill.data.near_duplicates import contrast, difference_hash
from raydistill.data.sample import sample_id
from raydistill.data.sources.columns import Entries
from raydistill.data.sources.reading import read_pictures
from raydistill.errors import DataError
from raydistill.runtime import metrics
from raydistill.secrets import redacted

Place = tuple[int, str, int | None]  # of an entry: its index in the listing, its path and its row
Chunk = list[Place]
# Images of a task and of a file of decoded images: small enough to use all CPUs, large enough for few files.
_FEWEST_TOGETHER, _MOST_TOGETHER, _FILES = 32, 256, 256
_redacted = functools.lru_cache(maxsize=64)(redacted)  # a table may name a million missing files


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of inspecting a picture. It is small, because it passes between processes. `reason` says why the
    picture cannot be used; then the other fields are empty."""

    reason: str
    id: str = ""
    facts: Facts | None = None
    hash: bytes = b""
    contrast: float = 0.0


def chunk_ranges(entries: Entries, images: Images) -> np.ndarray:
    """(chunks, 2): the first entry of each read, and the one after its last: rows of one file, or some files."""
    together = min(max(len(entries) // _FILES, _FEWEST_TOGETHER), _MOST_TOGETHER, SHARD_BYTES // (3 * images.size**2))
    is_other_file = (entries.path_N[1:] != entries.path_N[:-1]) & (entries.row_N[1:] >= 0)
    of_files = [0, *(np.flatnonzero(is_other_file) + 1).tolist(), len(entries)]
    starts = [start for first, end in pairwise(of_files) for start in range(first, end, together)]
    return np.stack([starts, [*starts[1:], len(entries)]], axis=1)


def chunks(entries: Entries, images: Images) -> Iterator[Chunk]:
    """The places of each read."""
    return (entries.places(first, end) for first, end in chunk_ranges(entries, images).tolist())


def read_chunk(chunk: Sequence[Place], images: Images) -> Iterator[tuple[int, bytes | None, str]]:
    """Index and bytes of each picture, or None and the reason. No other large file is in memory while one is read and
    used."""
    for part in [chunk] if chunk[0][2] is not None else [[place] for place in chunk]:
        places = [(path, row) for _, path, row in part]
        with large_alone(0 if places[0][1] is not None else _size(places[0][0])):
            for number, data, reason in read_pictures(places, images.max_bytes, images.path):
                yield part[number][0], data, reason


def _size(path: str) -> int:
    """In bytes; 0 for a file that is missing or not on this machine."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


def inspect_chunk(chunk: Sequence[Place], images: Images) -> Iterator[Inspection]:
    """One for each picture, in order."""
    for _, data, reason in read_chunk(chunk, images):
        if data is None:
            yield Inspection(_redacted(reason))
            continue
        try:
            picture, facts = decode_with_facts(data, images.size, images.fit, images.max_pixels)
        except DataError as error:
            yield Inspection(str(error))
        else:
            grey = picture.convert("L")
            yield Inspection("", sample_id(data), facts, difference_hash(grey), contrast(grey))


def decode_chunk(chunk: Sequence[Place], images: Images) -> Iterator[dict[str, Any]]:
    """Rows with the pixels of the working image, or with the reason why there is none."""
    for index, data, reason in read_chunk(chunk, images):
        if data is None:
            yield _refused(index, _redacted(reason))
            continue
        try:
            image = decode(data, images.size, images.fit, images.max_pixels).tobytes()
            yield {"index": index, "sample_id": sample_id(data), "image": image, "reason": ""}
        except DataError as error:
            yield _refused(index, str(error))


def decode_isolated(chunk: Sequence[Place], images: Images) -> list[dict[str, Any]]:
    """`decode_chunk` in an isolated process: a picture that kills the process is refused like any other."""
    found = run_isolated(partial(decode_chunk, images=images), chunk)
    rows = zip(chunk, found, strict=True)
    metrics.count("raydistill_images_prepared", len(chunk), "prepare")
    return [_refused(place[0], one) if isinstance(one, Killed) else one for place, one in rows]


def _refused(index: int, reason: str) -> dict[str, Any]:
    return {"index": index, "sample_id": "", "image": b"", "reason": reason}

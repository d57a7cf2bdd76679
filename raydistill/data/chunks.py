"""Some pictures of a set, read and then decoded or looked at: the work that is done in processes apart."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raydistill.config import Images
from raydistill.data.decode import Facts, decode, decode_with_facts, encode, large_alone
from raydistill.data.likeness import contrast, difference_hash
from raydistill.data.sample import sample_id
from raydistill.data.sources.reading import read_pictures
from raydistill.errors import DataError

Place = tuple[int, str, int | None]  # of an entry in its listing the index, path and row


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look at a picture told: what goes from a process to the next is kept small. `reason`: why it cannot be
    used; then there is nothing else."""

    reason: str
    id: str = ""
    facts: Facts | None = None
    hash: bytes = b""
    contrast: float = 0.0


def read_chunk(chunk: Sequence[Place], images: Images) -> Iterator[tuple[int, bytes | None, str]]:
    """Index and bytes of each, or None and the reason. A large file is read, and decoded by whoever asked, alone."""
    for part in [chunk] if chunk[0][2] is not None else [[place] for place in chunk]:
        places = [(path, row) for _, path, row in part]
        with large_alone(0 if places[0][1] is not None else _size(places[0][0])):
            for number, data, reason in read_pictures(places, images.max_bytes, images.path):
                yield part[number][0], data, reason


def _size(path: str) -> int:
    """0 of what is not on this machine, or not there."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


def looked_at(chunk: Sequence[Place], images: Images) -> Iterator[Seen]:
    """One for each, in order."""
    for _, data, reason in read_chunk(chunk, images):
        try:
            if data is None:
                raise DataError(reason)
            picture, facts = decode_with_facts(data, images.size, images.fit, images.max_pixels)
        except DataError as error:
            yield Seen(str(error))
        else:
            grey = picture.convert("L")
            yield Seen("", sample_id(data), facts, difference_hash(grey), contrast(grey))


def decoded_rows(chunk: Sequence[Place], images: Images) -> Iterator[dict[str, Any]]:
    """The decoded images as PNG, or the reason why there is none."""
    for index, data, reason in read_chunk(chunk, images):
        identity, image = "", b""
        if data is not None:
            try:
                image = encode(decode(data, images.size, images.fit, images.max_pixels))
                identity = sample_id(data)
            except DataError as error:
                reason = str(error)
        yield row_of(index, identity, image, reason)


def row_of(index: int, identity: str = "", image: bytes = b"", reason: str = "") -> dict[str, Any]:
    return {"index": index, "sample_id": identity, "image": image, "reason": reason}

"""Sizes from Arrow's own headers, before anything is unpacked. No Python library gives them.

Sources: Arrow's Message.fbs and File.fbs, and FlatBuffers' internals. Damage raises EOFError, ValueError or
LookupError.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_LONGEST_MESSAGE = 16 << 20
_OLD_COMPRESSION = b"ARROW:experimental_compression"  # of Arrow 0.17 alone, beside the sizes that are looked at


@dataclass(frozen=True, slots=True)
class Message:
    """Where it begins and ends, its rows, the bytes of its body, packed and unpacked, and the dictionary that it is or,
    as a delta, adds to."""

    is_batch: bool  # otherwise a dictionary or a schema
    start: int
    end: int
    rows: int = 0
    packed: int = 0
    unpacked: int = 0
    dictionary: int = 0
    is_delta: bool = False


def stream(file: Any, start: int, size: int) -> Iterator[Message]:
    """The messages from `start` on, up to the end of the stream."""
    while start + 8 <= size and (found := message(file, start, size)) is not None:
        yield found
        start = found.end


def blocks(file: Any, footer: bytes, size: int) -> Iterator[Message]:
    """The messages that an Arrow file's footer names: the dictionaries, then the batches, each in file order. A footer
    could name one message many times, and each would be read."""
    root = _indirect(footer, 0)
    for slot in (2, 3):
        end = 0
        for at in _vector(footer, root, slot, 24):
            start, metadata = struct.unpack_from("<qi", footer, at)
            found = message(file, start, size, start + metadata)
            if found is None:
                raise ValueError("a block without a message")
            if start < end:
                raise ValueError("its blocks overlap, or lie in another order than they have")
            end = found.end
            yield found


def message(file: Any, start: int, size: int, body: int = 0) -> Message | None:
    """None at the end of the stream."""
    if not (0 <= start <= size and 0 <= body <= size):
        raise ValueError("a block without a place")
    file.seek(start)
    marker, length = struct.unpack("<Ii", _bytes(file, 8))
    before = 8 if marker == 0xFFFFFFFF else 4  # the format until 2019
    length = length if before == 8 else marker
    if not length:
        return None
    if not 0 < length <= min(size - start, _LONGEST_MESSAGE):
        raise EOFError(f"a header of {length:,} bytes, where {min(size - start, _LONGEST_MESSAGE):,} are the most")
    file.seek(start + before)
    data, body = _bytes(file, length), body or start + before + length
    if _OLD_COMPRESSION in data:
        raise ValueError("it is compressed as Arrow 0.17 did; write it again")
    root = _indirect(data, 0)
    kind, header, packed = (_field(data, root, slot) for slot in (1, 2, 3))
    packed = struct.unpack_from("<q", data, packed)[0] if packed else 0
    if not 0 <= packed <= size - body:
        raise EOFError("it ends too early")
    kind, table = data[kind] if kind else 0, _indirect(data, header)
    if kind not in (2, 3):
        return Message(False, start, body + packed)
    dictionary, is_delta = 0, False
    if kind == 2:
        number, delta = _field(data, table, 0), _field(data, table, 2)
        dictionary = struct.unpack_from("<q", data, number)[0] if number else 0
        is_delta, table = bool(delta and data[delta]), _indirect(data, _field(data, table, 1))
    rows, compression = _field(data, table, 0), _field(data, table, 3)
    unpacked = 0
    for at in _vector(data, table, 2, 16):
        offset, own = struct.unpack_from("<qq", data, at)
        if compression and own:
            file.seek(min(max(body + offset, 0), size))
            stated = struct.unpack("<q", _bytes(file, 8))[0]
            own = own if stated == -1 else stated
        unpacked += max(own, 0)
    num_rows = struct.unpack_from("<q", data, rows)[0] if rows else 0
    if num_rows < 0:
        raise ValueError("a batch of less than no rows")
    return Message(kind == 3, start, body + packed, num_rows, packed, unpacked, dictionary, is_delta)


def _indirect(data: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: bytes, table: int, slot: int) -> int:
    """The position of a table's field; 0 if it has none."""
    entries = table - struct.unpack_from("<i", data, table)[0]
    place = 4 + 2 * slot
    if place >= struct.unpack_from("<H", data, entries)[0]:
        return 0
    offset = struct.unpack_from("<H", data, entries + place)[0]
    return table + offset if offset else 0


def _vector(data: bytes, table: int, slot: int, width: int) -> Iterator[int]:
    """The position of each struct of a table's vector."""
    if at := _field(data, table, slot):
        at = _indirect(data, at)
        for k in range(struct.unpack_from("<I", data, at)[0]):
            yield at + 4 + width * k


def _bytes(stream: Any, count: int) -> bytes:
    data: bytes = stream.read(count)
    if len(data) < count:
        raise EOFError("it ends too early")
    return data

"""Sizes from parquet's own headers, before anything is unpacked. No Python library gives them.

Sources: parquet-format's parquet.thrift, and Thrift's compact protocol. Damage raises EOFError, ValueError or
LookupError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_LONGEST_HEADERS = (1 << 12, 1 << 20)  # bytes of most pages' headers, and of all
# Reads, of about half a microsecond each, of a page's header and of a footer.
_MOST_STEPS, _MOST_STEPS_OF_ALL = 1 << 9, 1 << 22
# Pages that a column chunk may always have, and bytes and rows for each further page.
_ALWAYS_PAGES, _FEWEST_BYTES, _FEWEST_ROWS = 16, 256, 1024
_DICTIONARY_PAGE, _DELTA_BYTE_ARRAY = 2, 7
_BOOL, _BYTE, _INTEGERS, _DOUBLE, _BYTES, _LIST, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12
_FIXED = {_BYTE: 1, _DOUBLE: 8}


class _Thrift:
    """Bytes in Thrift's compact protocol, read in a limited number of steps: a few bytes could need minutes."""

    __slots__ = ("_data", "_left", "at")

    def __init__(self, data: bytes, most: int) -> None:
        self._data, self._left, self.at = data, most, 0

    def take(self, count: int) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise ValueError("headers of too many parts; write fewer and larger ones")
        if count > len(self._data) - self.at:
            raise EOFError("it ends too early")
        self.at += count
        return self._data[self.at - count : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        data, at = self._data, self.at
        value = data[at] if at < len(data) else 255
        if value > 127 or self._left < 1:
            return self._long()
        self.at, self._left = at + 1, self._left - 1
        return value

    def _long(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            if (shift := shift + 7) > 63:
                raise ValueError("a number that is too long")

    def integer(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A column of a row group, from the footer. Arrow's own object for it aborts the process on some damage."""

    path: str
    packed: int
    unpacked: int
    start: int


def pages(file: Any, chunk: Chunk, num_rows: int) -> Iterator[tuple[int, int, bool]]:
    """The bytes of each page of a column chunk, packed and unpacked, and whether many rows may repeat some of them: a
    dictionary's values, or the beginning of earlier values (DELTA_BYTE_ARRAY)."""
    start, end = chunk.start, chunk.start + chunk.packed
    left = _ALWAYS_PAGES + chunk.packed // _FEWEST_BYTES + num_rows // _FEWEST_ROWS
    while start < end:
        if (left := left - 1) < 0:
            raise ValueError(f"a column of {chunk.packed:,} bytes in too many pages; write larger ones")
        for longest in _LONGEST_HEADERS:
            file.seek(start)
            stream = _Thrift(file.read(min(longest, end - start)), _MOST_STEPS)
            with contextlib.suppress(EOFError):
                header = {number: _value(stream, kind) for number, kind in _fields(stream)}
                break
        else:
            raise EOFError("a page without a header")
        unpacked, packed = _whole(header, 2), _whole(header, 3)
        if unpacked is None or packed is None or min(unpacked, packed) < 0:
            raise ValueError("a page without a size")
        is_delta = _DELTA_BYTE_ARRAY in (_whole(header.get(5), 2), _whole(header.get(8), 4))
        yield packed, unpacked, is_delta or header.get(1) == _DICTIONARY_PAGE
        start += stream.at + packed


def footer(data: bytes) -> tuple[int, list[tuple[int, list[Chunk]]]]:
    """How deep a parquet file's columns are nested, and the rows and columns of each row group. Nothing else is kept:
    each byte of it might become a Python object."""
    stream, levels, groups = _Thrift(data, _MOST_STEPS_OF_ALL), 0, list[tuple[int, list[Chunk]]]()
    for number, kind in _fields(stream):
        if number == 2:
            levels = _levels(stream, kind)
        elif number == 4:
            groups = [_group(stream) for _ in _elements(stream, kind, _STRUCT)]
        else:
            _skip(stream, kind)
    return levels, groups


def _group(stream: _Thrift) -> tuple[int, list[Chunk]]:
    rows, chunks = None, list[Chunk]()
    for number, kind in _fields(stream):
        if number == 1:
            chunks = [_chunk(stream) for _ in _elements(stream, kind, _STRUCT)]
        elif number == 3 and kind in _INTEGERS:
            rows = stream.integer()
        else:
            _skip(stream, kind)
    if rows is None:
        raise ValueError("a row group without a number of rows")
    return rows, chunks


def _chunk(stream: _Thrift) -> Chunk:
    path, told = b"", dict[int, int]()
    for number, kind in _fields(stream):
        if number in (8, 9):
            raise ValueError("a column is encrypted")
        if (number, kind) != (3, _STRUCT):
            _skip(stream, kind)
            continue
        for inner, own in _fields(stream):
            if inner == 3:
                path = b".".join(stream.take(stream.varint()) for _ in _elements(stream, own, _BYTES))
            elif inner in (6, 7, 9, 11) and own in _INTEGERS:
                told[inner] = stream.integer()
            else:
                _skip(stream, own)
    if lacking := {6, 7, 9} - told.keys():
        raise ValueError(f"a column without {'a place' if lacking == {9} else 'a size'}")
    starts = [told[9], *(start for start in [told.get(11, 0)] if start > 0)]
    return Chunk(path.decode(errors="replace"), told[7], told[6], min(starts))


def _levels(stream: _Thrift, kind: int) -> int:
    deepest, left = 0, [1]  # for each group from the root down, the number of children still to come
    for _ in _elements(stream, kind, _STRUCT):
        while len(left) > 1 and not left[-1]:
            left.pop()
        left[-1] -= 1
        deepest = max(deepest, len(left))
        for number, own in _fields(stream):
            if number == 5 and own in _INTEGERS:
                left += [children] if (children := stream.integer()) else []
            else:
                _skip(stream, own)
    return deepest


def _whole(fields: Any, number: int) -> int | None:
    """A whole number in a struct's fields. Damage puts other types there."""
    value = fields.get(number) if isinstance(fields, dict) else None
    return value if isinstance(value, int) else None


def _fields(stream: _Thrift) -> Iterator[tuple[int, int]]:
    """Number and type of a struct's fields. The caller reads each value before the next field."""
    number = 0
    while head := stream.byte():
        number = number + (head >> 4) if head >> 4 else stream.integer()
        yield number, head & 15


def _value(stream: _Thrift, kind: int) -> Any:
    """A whole number, or those of a struct. Nothing else is kept."""
    if kind in _INTEGERS:
        return stream.integer()
    if kind == _BYTE:
        return stream.byte()
    if kind == _STRUCT:
        return {number: _value(stream, own) for number, own in _fields(stream)}
    _skip(stream, kind)
    return None


def _skip(stream: _Thrift, kind: int) -> None:
    if kind in _INTEGERS:
        stream.varint()
    elif kind in _FIXED:
        stream.take(_FIXED[kind])
    elif kind == _BYTES:
        stream.take(stream.varint())
    elif kind in _LIST:
        count, own = _length(stream)
        for _ in range(count):
            _skip(stream, _BYTE if own in _BOOL else own)
    elif kind == _STRUCT:
        for _, own in _fields(stream):
            _skip(stream, own)
    elif kind not in _BOOL:
        raise ValueError("a header of another kind")


def _elements(stream: _Thrift, kind: int, wanted: int) -> Iterator[int]:
    """The items of a list of the wanted type. The caller reads each before the next."""
    count, own = _length(stream) if kind in _LIST else (1, 0)
    if count and own != wanted:
        raise ValueError("a list of another kind")
    yield from range(count)


def _length(stream: _Thrift) -> tuple[int, int]:
    """The size of a list, and the type of its items."""
    head = stream.byte()
    return head >> 4 if head >> 4 < 15 else stream.varint(), head & 15

"""Sizes from parquet's own headers, before anything is unpacked. No Python library gives them.

Arrow reads the same headers again. Thrift skips a field of another type than the declared one, cuts long numbers off,
and lets the last of equal fields count, so a file could show Arrow other sizes than us. No program writes such headers,
so they are refused.

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
_DICTIONARY_PAGE, _DELTA_BYTE_ARRAY, _LEFT_OUT = 2, 7, 100
_BOOL, _BYTE, _I16, _I32, _I64, _DOUBLE, _BYTES, _LIST, _SET, _STRUCT = (1, 2), 3, 4, 5, 6, 7, 8, 9, 10, 12
_BITS, _FIXED = {_I16: 16, _I32: 32, _I64: 64}, {_BYTE: 1, _DOUBLE: 8}

# Parquet's fields: their types, and the fields of a struct, or the type and fields of a list's items. Complete for the
# numbers that are used, and for lists: Thrift reads items of the declared type, whatever type a list states.
_Type = tuple[int, Any]
_Fields = dict[int, _Type]
_number: _Type = (_I32, {})
_long: _Type = (_I64, {})
_struct: _Type = (_STRUCT, {})
_COLUMN: _Fields = {
    2: (_LIST, _number), 3: (_LIST, (_BYTES, {})), 5: _long, 6: _long, 7: _long, 8: (_LIST, _struct), 9: _long,
    11: _long, 13: (_LIST, _struct), 16: (_STRUCT, {2: (_LIST, _long), 3: (_LIST, _long)}),
    17: (_STRUCT, {2: (_LIST, _number)}),
}  # fmt: skip
_CHUNK: _Fields = {3: (_STRUCT, _COLUMN)}
_GROUP: _Fields = {1: (_LIST, (_STRUCT, _CHUNK)), 3: _long, 4: (_LIST, _struct)}
_ELEMENT: _Fields = {5: _number}
_FOOTER: _Fields = {
    2: (_LIST, (_STRUCT, _ELEMENT)), 3: _long, 4: (_LIST, (_STRUCT, _GROUP)), 5: (_LIST, _struct), 7: (_LIST, _struct)
}  # fmt: skip
_DATA_PAGES = {0: 5, 3: 8}  # by type, the field that describes the page
_PAGE: _Fields = {
    1: _number, 2: _number, 3: _number, 5: (_STRUCT, {1: _number, 2: _number}), 8: (_STRUCT, {1: _number, 4: _number})
}  # fmt: skip


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

    def integer(self, kind: int) -> int:
        value = self.varint()
        if value >> _BITS[kind]:
            raise ValueError("a number that is too long")
        return value >> 1 ^ -(value & 1)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A column of a row group, from the footer. Arrow's own object for it aborts the process on some damage."""

    packed: int
    unpacked: int
    values: int
    start: int


def pages(file: Any, chunk: Chunk, num_rows: int) -> Iterator[tuple[int, int, bool]]:
    """The bytes of each page of a column chunk, packed and unpacked, and whether many rows may repeat some of them: a
    dictionary's values, or the beginning of earlier values (DELTA_BYTE_ARRAY)."""
    start, end, values = chunk.start, chunk.start + chunk.packed, 0
    left = _ALWAYS_PAGES + chunk.packed // _FEWEST_BYTES + num_rows // _FEWEST_ROWS
    while start < end:
        if (left := left - 1) < 0:
            raise ValueError(f"a column of {chunk.packed:,} bytes in too many pages; write larger ones")
        for longest in _LONGEST_HEADERS:
            file.seek(start)
            stream = _Thrift(file.read(min(longest, end - start)), _MOST_STEPS)
            with contextlib.suppress(EOFError):
                header = _read(stream, _PAGE)
                break
        else:
            raise EOFError("a page without a header")
        unpacked, packed = header.get(2, -1), header.get(3, -1)
        if min(unpacked, packed) < 0:
            raise ValueError("a page without a size")
        start += stream.at + packed
        values += header.get(_DATA_PAGES.get(header.get(1, -1), 0), {}).get(1, 0)
        is_delta = _DELTA_BYTE_ARRAY in (header.get(5, {}).get(2), header.get(8, {}).get(4))
        yield packed, unpacked, is_delta or header.get(1) == _DICTIONARY_PAGE
    # Before 1.2.9 parquet-mr left the header of a dictionary out of its column's size. Arrow reads on for its values.
    if start > end + _LEFT_OUT or values < chunk.values:
        raise ValueError("a column that does not end with its pages")


def footer(data: bytes) -> tuple[int, list[tuple[int, list[Chunk]]]]:
    """How deep a parquet file's columns are nested, and the rows and columns of each row group. Nothing else is kept:
    each byte of it might become a Python object."""
    stream, levels, groups = _Thrift(data, _MOST_STEPS_OF_ALL), 0, list[tuple[int, list[Chunk]]]()
    for number, kind, inner in _fields(stream, _FOOTER):
        if number == 2:
            levels = _levels(stream)
        elif number == 4:
            groups = [_group(stream) for _ in range(_length(stream, _STRUCT)[0])]
        else:
            _skip(stream, kind, inner)
    return levels, groups


def _group(stream: _Thrift) -> tuple[int, list[Chunk]]:
    rows, chunks = None, list[Chunk]()
    for number, kind, inner in _fields(stream, _GROUP):
        if number == 1:
            chunks = [_chunk(stream) for _ in range(_length(stream, _STRUCT)[0])]
        elif number == 3:
            rows = stream.integer(kind)
        else:
            _skip(stream, kind, inner)
    if rows is None:
        raise ValueError("a row group without a number of rows")
    return rows, chunks


def _chunk(stream: _Thrift) -> Chunk:
    told = dict[int, int]()
    for number, kind, inner in _fields(stream, _CHUNK):
        if number in (8, 9):
            raise ValueError("a column is encrypted")
        if number != 3:
            _skip(stream, kind, inner)
            continue
        for own, type_, held in _fields(stream, _COLUMN):
            if own in (5, 6, 7, 9, 11):
                told[own] = stream.integer(type_)
            else:
                _skip(stream, type_, held)
    if lacking := {5, 6, 7, 9} - told.keys():
        raise ValueError(f"a column without {'a place' if lacking == {9} else 'a size'}")
    starts = [told[9], *(start for start in [told.get(11, 0)] if start > 0)]
    return Chunk(told[7], told[6], told[5], min(starts))


def _levels(stream: _Thrift) -> int:
    deepest, left = 0, [1]  # for each group from the root down, the number of children still to come
    for _ in range(_length(stream, _STRUCT)[0]):
        while len(left) > 1 and not left[-1]:
            left.pop()
        left[-1] -= 1
        deepest = max(deepest, len(left))
        for number, kind, inner in _fields(stream, _ELEMENT):
            if number == 5:
                left += [children] if (children := stream.integer(kind)) else []
            else:
                _skip(stream, kind, inner)
    return deepest


def _fields(stream: _Thrift, declared: _Fields) -> Iterator[tuple[int, int, Any]]:
    """Number, type and content of a struct's fields. The caller reads each value before the next field."""
    number = 0
    while head := stream.byte():
        kind, before = head & 15, number
        number = before + (head >> 4) if head >> 4 else stream.integer(_I16)
        if not before < number < 1 << 15:
            raise ValueError("fields that are repeated, or in another order than their numbers")
        wanted, inner = declared.get(number, (kind, {}))
        if kind != wanted:
            raise ValueError(f"a field of another type than parquet's (field {number})")
        yield number, kind, inner


def _read(stream: _Thrift, declared: _Fields) -> dict[int, Any]:
    """Its declared numbers and structs. Nothing else is kept."""
    found = dict[int, Any]()
    for number, kind, inner in _fields(stream, declared):
        if number not in declared:
            _skip(stream, kind, inner)
        else:
            found[number] = _read(stream, inner) if kind == _STRUCT else stream.integer(kind)
    return found


def _skip(stream: _Thrift, kind: int, inner: Any) -> None:
    if kind in _BITS:
        stream.varint()
    elif kind == _BYTES:
        stream.take(stream.varint())
    elif kind == _STRUCT:
        for _, own, held in _fields(stream, inner):
            _skip(stream, own, held)
    elif kind in (_LIST, _SET):
        wanted, held = inner or (None, {})
        count, own = _length(stream, wanted)
        for _ in range(count):
            _skip(stream, _BYTE if own in _BOOL else own, held)
    elif kind in _FIXED:
        stream.take(_FIXED[kind])
    elif kind not in _BOOL:
        raise ValueError("a header of another kind")


def _length(stream: _Thrift, wanted: int | None) -> tuple[int, int]:
    """The size of a list, and the type of its items, which has to be the wanted one."""
    head = stream.byte()
    count, kind = head >> 4 if head >> 4 < 15 else stream.varint(), head & 15
    if count and wanted not in (None, kind):
        raise ValueError("a list of another kind")
    return count, kind

"""Columns of tables: their plain values, and the types that are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from raydistill.errors import DataError
from raydistill.escaping import quoted, shortened

# Under the second name, of the same length, Arrow ignores the key.
EXTENSION, NO_EXTENSION = b"ARROW:extension:name", b"arrow.extension.name"
_MOST_DIGITS = 76  # of any decimal


def values(column: Any) -> list[Any]:
    """The values of an array or of a table's column. Raises DataError if reading them may run code."""
    if found := _extension(pa.field("", column.type)):
        raise DataError(f"a column is of the extension type {found[1]}, whose values may be code")
    return list(column.to_pylist())


def longest(column: Any) -> int:
    """Bytes of the longest text in an array; 0 for other values."""
    types, texts = pa.types, column
    while isinstance(texts, pa.DictionaryArray):
        texts = texts.dictionary.take(texts.indices.unique())  # very many batches may have one dictionary
    if types.is_fixed_size_binary(texts.type):
        return int(texts.type.byte_width)
    if types.is_string_view(texts.type) or types.is_binary_view(texts.type):  # Arrow has no function for their lengths
        return max((len(text.as_buffer()) for text in texts if text.is_valid), default=0)
    tests = (types.is_string, types.is_binary, types.is_large_string, types.is_large_binary)
    return (pc.max(pc.binary_length(texts)).as_py() or 0) if any(test(texts.type) for test in tests) else 0


def validate(column: Any, known: dict[Any, Any], *place: Any) -> None:
    """Validates an array of plain values in full, but a dictionary that the `known` one of its place is only once: many
    batches may have one. Raises pa.ArrowInvalid."""
    types, kind = pa.types, column.type
    if types.is_struct(kind):
        column.validate()
        for k in range(kind.num_fields):
            validate(column.field(k), known, *place, k)
    elif types.is_dictionary(kind) and not types.is_dictionary(kind.value_type):
        column.validate()
        column.indices.validate(full=True)
        own, before = column.dictionary, known.get(place)
        if before is None or _places(own) != _places(before):
            own.validate(full=True)
            known[place] = own
        pa.DictionaryArray.from_arrays(column.indices, pa.nulls(len(own)))  # compares the indices with the length
    else:
        column.validate(full=True)


def _places(column: Any) -> list[int]:
    """Where an array lies in memory. While it is kept, no other array lies there."""
    return [len(column), column.offset, *(buffer.address if buffer else 0 for buffer in column.buffers())]


def bytes_of_views(column: Any) -> int:
    """Of all rows together, if these may share their bytes; 0 for other types. The column may be damaged."""
    types, kind = pa.types, column.type
    if types.is_struct(kind):
        return sum(bytes_of_views(column.field(k)) for k in range(kind.num_fields))
    buffer = column.buffers()[1] if types.is_string_view(kind) or types.is_binary_view(kind) else None
    if buffer is None or buffer.size < 16 * (column.offset + len(column)):
        return 0
    lengths = np.frombuffer(buffer, np.int32, 4 * len(column), 16 * column.offset)[::4]
    return int(lengths[column.is_valid().to_numpy(zero_copy_only=False)].clip(0).sum(dtype=np.int64))


def named(name: str) -> str:
    """A column's name in messages."""
    return shortened(quoted(name))


def neutral_schema(message: bytes) -> pa.Schema:
    """An Arrow schema of a file, without extension types."""
    return pa.ipc.read_schema(pa.py_buffer(neutral(message)))


def neutral(header: bytes) -> bytes:
    return header.replace(EXTENSION, NO_EXTENSION)


def _extension(field: pa.Field, path: str = "") -> tuple[str, str] | None:
    """The place of an extension type in a column, and its name."""
    kind, path = field.type, f"{path}.{field.name}" if path else field.name
    name = (field.metadata or {}).get(NO_EXTENSION)
    if name is not None or isinstance(kind, pa.BaseExtensionType):
        return named(path), named(kind.extension_name if name is None else name.decode(errors="replace"))
    inner = [pa.field("", kind.value_type)] if pa.types.is_dictionary(kind) else map(kind.field, range(kind.num_fields))
    return next(filter(None, (_extension(one, path) for one in inner)), None)


def refuse_extensions(schema: pa.Schema, header: bytes, shown: str) -> None:
    """Raises DataError, also if the file's `header` names a type in a place that only other readers look at."""
    found = next(filter(None, map(_extension, schema)), None)
    if found or EXTENSION in header:
        where = (
            f"the column {found[0]} is of the extension type {found[1]}"
            if found
            else "a column is of an extension type"
        )
        raise DataError(
            f"{shown}: {where}, whose values may be code and are not read; write the pictures as bytes and the labels "
            "as text"
        )


def refuse_other_types(schema: pa.Schema, columns: Sequence[str], shown: str, lists: bool = False) -> None:
    """Raises DataError for a column that is not plain; with `lists`, one of numbers is."""
    for name in columns:
        if lists and _is_numbers(schema.field(name).type):
            continue
        if not _is_plain(kind := schema.field(name).type):
            advice = "write the pictures as bytes and the labels as text or whole numbers"
            if pa.types.is_nested(kind) and not pa.types.is_struct(kind):
                advice = "multi-label data is not supported, an image has one class"
            raise DataError(f"{shown}: the column {named(name)} holds {named(str(kind))}, which is not read; {advice}")


def _is_numbers(kind: Any) -> bool:
    types = pa.types
    return types.is_list(kind) and (types.is_integer(kind.value_type) or types.is_floating(kind.value_type))


def _is_plain(kind: Any, is_inner: bool = False) -> bool:
    types = pa.types
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type, is_inner=True)
    if types.is_decimal(kind):
        return abs(kind.scale) <= _MOST_DIGITS
    if types.is_struct(kind) and not is_inner:
        return all(_is_plain(kind.field(k).type, is_inner=True) for k in range(kind.num_fields))
    tests = (
        types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary, types.is_string,
        types.is_large_string, types.is_string_view, types.is_integer, types.is_floating, types.is_boolean,
        types.is_null,
    )  # fmt: skip
    return any(test(kind) for test in tests)

"""The only code that opens parquet, feather and Arrow files, untrusted ones and our own. It gives plain values and runs
no code.

A file can name extension types. Libraries register such types whose values are pickles, so reading one runs code from
the file. So Arrow never sees the names of those types: the schema is read without them, and a column that has one is
refused.

A few bytes may unpack to very many. Headers give the sizes of pages and buffers before they are unpacked, and anything
too large is refused.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from raydistill.errors import DataError, damaged_file, reason_of
from raydistill.escaping import quoted
from raydistill.storage.filesystems import open_filesystem, refuse_unread, version_of
from raydistill.storage.tables.arrow import ArrowFile
from raydistill.storage.tables.columns import longest, named, values
from raydistill.storage.tables.parquet import ParquetFile
from raydistill.storage.tables.parts import Batches, is_bomb, refuse_few_bytes

__all__ = [
    "SUFFIXES",
    "Batches",
    "Table",
    "longest",
    "named",
    "open_table",
    "read_foreign_table",
    "read_table",
    "refuse_few_bytes",
    "rows_of",
    "values",
]
SUFFIXES = (".parquet", ".arrow", ".feather")
Table = ParquetFile | ArrowFile
_DAMAGES = (pa.ArrowException, OSError, EOFError, LookupError, ValueError, MemoryError, ArithmeticError, RecursionError,
            struct.error, TypeError, AttributeError)  # fmt: skip


@contextlib.contextmanager
def open_table(path: str) -> Iterator[Table]:
    """An untrusted file. Raises DataError with its name: the file is damaged, of another kind or a bomb, or a column is
    not plain."""
    shown = quoted(path)
    suffix = PurePosixPath(path).suffix.lower().lstrip(".")
    try:
        with _opened(path) as file:
            known = _known(path, version_of(path, file))
            table = ParquetFile(file, shown, known) if suffix == "parquet" else ArrowFile(file, shown, known)
            if twice := [name for name, count in Counter(table.schema.names).items() if count > 1]:
                raise DataError(f"{shown}: there are several columns {named(min(twice))}; keep one")
            yield table
    except _DAMAGES as error:
        refuse_unread(error, shown)
        article = "an" if suffix == "arrow" else "a"
        raise DataError(f"{shown}: not {article} {suffix} file, or a damaged one ({reason_of(error)})") from None


def read_table(path: str, schema: pa.Schema, data: bytes | None = None) -> pa.Table:
    """The columns of the schema, in exactly its types, of a parquet file of ours, or of its bytes. Raises
    FileNotFoundError, and CheckpointError with the path: a column is missing or of another type, or the file is
    damaged (workspaces are shared)."""
    try:
        return _exactly(path, schema, data)
    except (DataError, *_DAMAGES) as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the system; Arrow's own have no number
            raise
        reason = reason_of(error).removeprefix(f"{path}: ")
        raise damaged_file(path, reason) from None


def read_foreign_table(path: str, schema: pa.Schema, data: bytes) -> pa.Table:
    """The same of the bytes of a stranger's parquet file. Raises DataError."""
    try:
        return _exactly(path, schema, data)
    except (DataError, *_DAMAGES) as error:
        raise DataError(f"{quoted(path)}: {reason_of(error).removeprefix(f'{path}: ')}") from None


def _exactly(path: str, schema: pa.Schema, data: bytes | None) -> pa.Table:
    with pa.BufferReader(data) if data is not None else _opened(path) as file:
        table, batches, total = ParquetFile(file, path, {}), [], 0
        if not table.schema.names:  # a file without rows
            return schema.empty_table()
        for field in schema:
            if field.name not in table.schema.names or table.schema.field(field.name).type != field.type:
                raise ValueError(f"it has no column {field.name} of the type {field.type}")
        for _, batch in table.read(schema.names, lists=True):  # only those of the schema
            batches.append(batch.select(schema.names))
            total += batch.nbytes
            if is_bomb(table.size, total):
                raise ValueError(f"its {table.size:,} bytes unpack to more than {total:,}")
        own = pa.schema([table.schema.field(name) for name in schema.names])
        return pa.Table.from_batches(batches, own).cast(schema)


def rows_of(table: Any) -> list[dict[str, Any]]:
    """The values of the columns by name, for each row."""
    columns = [values(table[name]) for name in table.schema.names]
    return [dict(zip(table.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _opened(path: str) -> Any:
    fs, place = open_filesystem(path)
    return fs.open(place)


@functools.lru_cache(maxsize=2)
def _known(path: str, version: str) -> dict[Any, Any]:
    """What this process has learnt about a file: many calls read rows of one file."""
    return {}

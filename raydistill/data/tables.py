"""The one opener of a stranger's parquet and Arrow files: columns of plain values, and nothing that runs.

Arrow lets a file name extension types, and libraries register such types whose values are pickles: reading one runs
what the file says. So the file's schema is searched for them in its bytes, before Arrow makes types of it.
"""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import parquet as pq

from raydistill.data.names import written
from raydistill.errors import DataError
from raydistill.storage.filesystems import open_filesystem

SUFFIXES = (".parquet", ".arrow", ".feather")
_LEAST_BOMB = 64 << 20
_EXTENSION = b"ARROW:extension:name"
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{24,}={0,2}")


@dataclass(frozen=True)
class ArrowFile:
    """An open file. `batches` gives, for some columns and part by part, the number of rows and what reads them."""

    schema: pa.Schema
    batches: Callable[[Sequence[str]], Iterator[tuple[int, Callable[[], Any]]]]


@contextlib.contextmanager
def open_table(path: str) -> Iterator[ArrowFile]:
    """Raises DataError with the file's name: damaged, of another kind, or with columns that would not be plain."""
    shown = written(path)
    fs, place = open_filesystem(path)
    try:
        with fs.open(place, "rb") as file:
            is_parquet = PurePosixPath(path).suffix.lower() == ".parquet"
            table = _parquet(file, shown) if is_parquet else _arrow(file, shown)
            twice = {name for name in table.schema.names if table.schema.names.count(name) > 1}
            if twice:
                raise DataError(f"{shown}: there are several columns {written(sorted(twice)[0])}; keep one")
            yield table
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:  # the last of text that is no UTF-8
        suffix = PurePosixPath(path).suffix.lower().lstrip(".")
        reason = " ".join(str(error).split())
        article = "an" if suffix == "arrow" else "a"
        raise DataError(f"{shown}: not {article} {suffix} file, or a damaged one ({reason})") from None


def _parquet(file: Any, shown: str) -> ArrowFile:
    size = file.seek(0, 2)
    file.seek(max(size - 8, 0))
    end = file.read(8)
    length = int.from_bytes(end[:4], "little")
    if end[4:] == b"PAR1" and length <= size - 8:
        file.seek(size - 8 - length)
        # Where in the footer its schema begins only a parser of thrift could tell: it is in one of these, decoded.
        for run in _BASE64.findall(file.read(length)):
            if any(_EXTENSION in base64.b64decode(run[k : len(run) - (len(run) - k) % 4]) for k in range(4)):
                raise _refusal(shown)
    file.seek(0)
    metadata = pq.read_metadata(file)
    _refuse_bomb(metadata, shown)
    columns = {metadata.schema.column(k).path for k in range(metadata.num_columns)}
    file.seek(0)
    # So one text that many rows share is in memory once.
    parquet = pq.ParquetFile(file, read_dictionary=[name for name in ("label", "split") if name in columns])

    def batches(columns: Sequence[str]) -> Iterator[tuple[int, Callable[[], Any]]]:
        for group in range(parquet.num_row_groups):
            yield parquet.metadata.row_group(group).num_rows, partial(parquet.read_row_group, group, list(columns))

    return ArrowFile(_plain(parquet.schema_arrow, shown), batches)


def _refuse_bomb(metadata: Any, shown: str) -> None:
    """Of columns that a few bytes blow up: pictures are compressed already, and labels are short."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            size, name = column.total_uncompressed_size, column.path_in_schema.partition(".")[0]
            most = 1000 * group.num_rows if name in ("label", "split") else 200 * column.total_compressed_size
            if name in ("image", "label", "split") and size > max(_LEAST_BOMB, most):
                raise DataError(
                    f"{shown}: {group.num_rows} rows of the column {name} unpack to {size:,} bytes from "
                    f"{column.total_compressed_size:,}: a decompression bomb"
                )


def _arrow(file: Any, shown: str) -> ArrowFile:
    """A stream, as `datasets` saves it, or an IPC file, which is feather's second version too."""
    magic = file.read(8)
    if magic.startswith(b"FEA1"):
        raise DataError(f"{shown}: feather's first version, which is read no more; write it again as the second")
    is_file = magic.startswith(b"ARROW1")
    if not is_file:
        file.seek(0)
    message = pa.ipc.read_message(file)
    found = _EXTENSION in message.metadata.to_pybytes()
    if is_file:  # it says its schema once more at its end
        size = file.seek(0, 2)
        file.seek(max(size - 10, 0))
        length = int.from_bytes(file.read(4), "little", signed=True)
        file.seek(max(size - 10 - max(length, 0), 0))
        found |= _EXTENSION in file.read(max(length, 0))
    if found:
        raise _refusal(shown)
    file.seek(0)
    reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)

    def batches(columns: Sequence[str]) -> Iterator[tuple[int, Callable[[], Any]]]:
        parts = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for part in parts:
            chosen = part.select(list(columns))
            chosen.validate(full=True)  # offsets that point elsewhere would show what else is in memory
            yield len(chosen), partial(_same, chosen)

    return ArrowFile(_plain(reader.schema, shown), batches)


def _same(part: Any) -> Any:
    return part


def _refusal(shown: str, column: str = "") -> DataError:
    return DataError(
        f"{shown}: {f'the column {written(column)}' if column else 'a column'} is of an extension type, whose values "
        "may be code and are not read; write the pictures as bytes and the labels as text"
    )


def _plain(schema: pa.Schema, shown: str) -> pa.Schema:
    for field in schema:
        if _is_extension(field):
            raise _refusal(shown, field.name)
    return schema


def _is_extension(field: pa.Field) -> bool:
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType) or _EXTENSION in (field.metadata or {}):
        return True
    if pa.types.is_dictionary(kind):
        return isinstance(kind.value_type, pa.BaseExtensionType)
    return any(_is_extension(kind.field(k)) for k in range(kind.num_fields))

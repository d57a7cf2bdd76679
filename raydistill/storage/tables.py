"""The one opener of parquet, feather and Arrow files, strangers' and our own: plain values, and nothing that runs.

Arrow lets a file name extension types, and libraries register such types whose values are pickles: reading one runs
what the file says. So Arrow never sees the names of those types: they are looked for in a schema that is read without
them, and refused. And few bytes may unpack to very many: pages and buffers tell their size before they are unpacked
(`storage/headers.py`), and what is too large is not.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import math
import struct
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc
from pyarrow import parquet as pq

from raydistill.errors import CheckpointError, DataError, reason_of
from raydistill.storage import headers
from raydistill.storage.filesystems import open_filesystem, refuse_unread, version_of
from raydistill.strangers import shorter, written

SUFFIXES = (".parquet", ".arrow", ".feather")
# Bytes that a page of parquet, a batch of Arrow, or the rows that are read together may always unpack to. Pictures are
# compressed already, so larger ones come from no fewer than an eighth.
_MOST_BYTES, _MOST_TIMES, _MOST_TIMES_IN_ALL = 64 << 20, 8, 200
_MOST_ROWS, _MOST_LEVELS = 16384, 64  # that are read together; of types in each other
_ALWAYS_ROWS, _FEWEST_BYTES = 1 << 18, 12  # of a set of pictures, and for each of its other rows
_MOST_FOOTER, _MOST_DIGITS = 16 << 20, 76  # bytes; of any decimal
_MOST_DICTIONARIES = 4096  # of an Arrow file, each of which is read with any row of it
# Under other names, of the same length, neither means anything to Arrow.
_EXTENSION, _NO_EXTENSION = b"ARROW:extension:name", b"arrow.extension.name"
_SCHEMA, _NO_SCHEMA = b"ARROW:schema", b"arrow.schema"
_DAMAGES = (pa.ArrowException, OSError, EOFError, LookupError, ValueError, MemoryError, ArithmeticError, RecursionError,
            struct.error, TypeError, AttributeError)  # fmt: skip
Batches = Iterator[tuple[int, pa.RecordBatch]]


@contextlib.contextmanager
def open_table(path: str) -> Iterator[ParquetFile | ArrowFile]:
    """A stranger's file. Raises DataError with its name: damaged, of another kind, a bomb, or with columns that would
    not be plain."""
    shown = written(path)
    suffix = PurePosixPath(path).suffix.lower().lstrip(".")
    try:
        with _opened(path) as file:
            known = _known(path, version_of(path, file))
            table = ParquetFile(file, shown, known) if suffix == "parquet" else ArrowFile(file, shown, known)
            if twice := [name for name, count in Counter(table.schema.names).items() if count > 1]:
                raise DataError(f"{shown}: there are several columns {_name(min(twice))}; keep one")
            yield table
    except _DAMAGES as error:
        refuse_unread(error, shown)
        article = "an" if suffix == "arrow" else "a"
        raise DataError(f"{shown}: not {article} {suffix} file, or a damaged one ({reason_of(error)})") from None


def read_table(path: str, schema: pa.Schema, data: bytes | None = None) -> pa.Table:
    """The columns of the schema, in exactly its types, of a parquet file of ours, or of its bytes. Raises
    CheckpointError with its path where it has others or is damaged (workspaces are shared), and FileNotFoundError."""
    try:
        with pa.BufferReader(data) if data is not None else _opened(path) as file:
            table, batches, total = ParquetFile(file, path, {}), [], 0
            if not table.schema.names:  # of what came to nothing
                return schema.empty_table()
            for field in schema:
                if field.name not in table.schema.names or table.schema.field(field.name).type != field.type:
                    raise ValueError(f"it has no column {field.name} of the type {field.type}")
            for _, batch in table.read(schema.names):
                batches.append(batch.select(schema.names))
                total += batch.nbytes
                if total > max(_MOST_BYTES, _MOST_TIMES * table.size):
                    raise ValueError(f"its {table.size:,} bytes unpack to more than {total:,}")
            own = pa.schema([table.schema.field(name) for name in schema.names])
            return pa.Table.from_batches(batches, own).cast(schema)
    except (DataError, *_DAMAGES) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, and not Arrow's of the content
            raise
        reason = reason_of(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path} is damaged ({reason}); delete it and run the command again") from None


def _opened(path: str) -> Any:
    fs, place = open_filesystem(path)
    return fs.open(place)


@functools.lru_cache(maxsize=2)
def _known(path: str, version: str) -> dict[Any, Any]:
    """What was found out of a file once by this process: its rows are read in many calls."""
    return {}


def values(column: Any) -> list[Any]:
    """Those of an array or a table's column. Raises DataError where to read them may run code."""
    if found := _extension(pa.field("", column.type)):
        raise DataError(f"a column is of the extension type {found[1]}, whose values may be code")
    return list(column.to_pylist())


def longest(column: Any) -> int:
    """Bytes of the longest text in an array; 0 of other values."""
    types, texts = pa.types, column.dictionary if isinstance(column, pa.DictionaryArray) else column
    if types.is_string_view(texts.type) or types.is_binary_view(texts.type):  # whose lengths no function tells
        return max((len(text.as_buffer()) for text in texts if text.is_valid), default=0)
    tests = (types.is_string, types.is_binary, types.is_large_string, types.is_large_binary)
    return (pc.max(pc.binary_length(texts)).as_py() or 0) if any(test(texts.type) for test in tests) else 0


def rows_of(table: Any) -> list[dict[str, Any]]:
    """Each with the values of its columns by name."""
    columns = [values(table[name]) for name in table.schema.names]
    return [dict(zip(table.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


class _Table:
    """An open file of rows that lie in parts: row groups, or batches. `known` is what earlier calls found out of it."""

    schema: pa.Schema

    def __init__(self, file: Any, shown: str, known: dict[Any, Any]) -> None:
        self._file, self._shown, self._known, self.size = file, shown, known, file.seek(0, 2)

    @property
    def _starts(self) -> np.ndarray:
        """(parts + 1,): the first row of each, and how many there are."""
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        return int(self._starts[-1])

    def end_of_part(self, row: int) -> float:
        """The first row behind those that lie together with this one; infinity behind the last."""
        return next(map(int, self._starts[np.searchsorted(self._starts, row, "right") :]), math.inf)

    def _parts_of(self, wanted: Sequence[int] | None) -> np.ndarray:
        """Those that hold these rows, in their order."""
        if wanted is None:
            return np.arange(len(self._starts) - 1)
        inside = np.asarray(wanted[: bisect_left(wanted, self.num_rows)], np.int64)
        return np.unique(np.searchsorted(self._starts, inside, "right") - 1)


class ParquetFile(_Table):
    """An open parquet file without extension types."""

    def __init__(self, file: Any, shown: str, known: dict[Any, Any]) -> None:
        super().__init__(file, shown, known)
        if "footer" not in known:
            known["footer"] = self._read_footer()
        metadata, self._groups, self._first_rows = known["footer"]
        file.seek(0)
        # Through a buffer, or the whole column of a row group would be held; of bytes it is held already.
        size = 0 if isinstance(file, pa.BufferReader) else 1 << 22
        self._parquet = pq.ParquetFile(file, metadata=metadata, buffer_size=size, arrow_extensions_enabled=False)
        self.schema = self._parquet.schema_arrow

    def _read_footer(self) -> tuple[Any, list[list[headers.Chunk]], np.ndarray]:
        """As Arrow has it, and the columns and first rows of the row groups."""
        self._file.seek(max(self.size - 8, 0))
        end = self._file.read(8)
        length = int.from_bytes(end[:4], "little")
        if end[4:] == b"PARE":
            raise ValueError("it is encrypted")
        if end[4:] != b"PAR1" or length > self.size - 8:
            raise ValueError("it does not end as one")
        if length > _MOST_FOOTER:
            raise _large_footer(self._shown, length)
        self._file.seek(self.size - 8 - length)
        footer = self._file.read(length)
        levels, groups = headers.footer(footer)
        if levels > _MOST_LEVELS:  # for each of which Arrow calls itself
            raise DataError(f"{self._shown}: columns are nested more than {_MOST_LEVELS} levels deep")
        # As soon as it reads a footer Arrow makes types of what that key holds.
        metadata = pq.read_metadata(io.BytesIO(b"PAR1" + footer.replace(_SCHEMA, _NO_SCHEMA) + end))
        if stated := (metadata.metadata or {}).get(_NO_SCHEMA):
            _refuse_extensions(_schema(base64.b64decode(stated)), self._shown)
        if any(not 0 <= c.start <= c.start + c.packed <= self.size for _, chunks in groups for c in chunks):
            raise ValueError("a column without a place")
        rows = [num_rows for num_rows, _ in groups]
        if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
            raise ValueError(f"its row groups come to {sum(rows):,} rows, and it tells of {metadata.num_rows:,}")
        _refuse_many_rows(metadata.num_rows, self.size, self._shown)
        return metadata, [chunks for _, chunks in groups], np.cumsum([0, *rows])

    @property
    def _starts(self) -> np.ndarray:
        return self._first_rows

    def read(self, columns: Sequence[str], wanted: Sequence[int] | None = None) -> Batches:
        """Batches of these columns, each with the number of its first row; where rows are `wanted`, in their order,
        only of those that hold some. Raises DataError: a column that is not plain, or a bomb."""
        _refuse_other(self.schema, columns, self._shown)
        for group in map(int, self._parts_of(wanted)):
            first, end = map(int, self._starts[group : group + 2])
            largest = max((self._most_of_a_row(c, end - first) for c in _of(self._groups[group], columns)), default=0)
            together = max(1, min(_MOST_ROWS, _MOST_BYTES // max(largest, 1)))
            for batch in self._parquet.iter_batches(together, [group], list(columns), use_threads=False):
                if _any_of(wanted, first, first + len(batch)):
                    batch.validate(full=True)
                    yield first, batch
                first += len(batch)
                if not _any_of(wanted, first, end):
                    break

    def refuse_bombs(self, columns: Sequence[str]) -> None:
        """By what the footer says: rows that are read later are known to be no bomb now, and their pages then."""
        for chunk in (chunk for chunks in self._groups for chunk in _of(chunks, columns)):
            if chunk.unpacked > max(_MOST_BYTES, _MOST_TIMES_IN_ALL * chunk.packed):
                raise _bomb(self._shown, f"the column {_name(chunk.path)}", chunk.packed, chunk.unpacked)
        refuse_few_bytes(self.num_rows, self.size, self._shown)

    def _most_of_a_row(self, chunk: headers.Chunk, num_rows: int) -> int:
        """Bytes by which each row more may add to what is held, beyond the pages themselves where these are few."""
        if chunk in self._known:
            return int(self._known[chunk])
        total = largest = repeated = 0
        for packed, unpacked, repeats in headers.pages(self._file, chunk, num_rows):
            if unpacked > max(_MOST_BYTES, _MOST_TIMES * packed):
                raise _bomb(self._shown, f"a page of the column {_name(chunk.path)}", packed, unpacked)
            total, largest = total + unpacked, max(largest, unpacked)
            repeated = max(repeated, unpacked if repeats else 0)
        self._known[chunk] = repeated if total <= _MOST_BYTES else largest
        return int(self._known[chunk])


class ArrowFile(_Table):
    """An open Arrow file without extension types: a stream, as `datasets` saves it, or an IPC file, which is feather's
    second version too."""

    def __init__(self, file: Any, shown: str, known: dict[Any, Any]) -> None:
        super().__init__(file, shown, known)
        file.seek(0)
        magic = file.read(8)
        if magic.startswith(b"FEA1"):
            raise DataError(f"{shown}: feather's first version, which is read no more; write it again as the second")
        self._is_file = magic.startswith(b"ARROW1")
        if self._is_file:
            file.seek(max(self.size - 10, 0))
            end = file.read(10)
            length = int.from_bytes(end[:4], "little")
            if length > _MOST_FOOTER:
                raise _large_footer(shown, length)
            file.seek(max(self.size - 10 - length, 0))
            self._footer = stated = file.read(length)
            self.schema = pa.ipc.open_file(pa.py_buffer(magic + _neutral(stated) + end)).schema
        else:
            if (first := headers.message(file, 0, self.size)) is None:
                raise ValueError("it holds nothing")
            self._begin = first.end
            file.seek(0)
            stated = file.read(self._begin)
            self.schema = _schema(stated)
        _refuse_extensions(self.schema, shown)
        if _EXTENSION in stated:  # where only another reader than ours would look for it
            raise _refusal(shown, "a column", "")

    @property
    def _starts(self) -> np.ndarray:
        return self._batches()[0]

    def refuse_bombs(self, columns: Sequence[str]) -> None:
        """By what all messages say, of whichever columns."""
        refuse_few_bytes(self.num_rows, self.size, self._shown)

    def read(self, columns: Sequence[str], wanted: Sequence[int] | None = None) -> Batches:
        """As that of parquet."""
        _refuse_other(self.schema, columns, self._shown)
        options = pa.ipc.IpcReadOptions(included_fields=[self.schema.get_field_index(name) for name in columns])
        starts, places = self._batches()
        self._file.seek(0)
        reader = (pa.ipc.open_file if self._is_file else pa.ipc.open_stream)(self._file, options=options)
        parts = read = self._parts_of(wanted)
        if not self._is_file and len(parts):  # the dictionaries before a batch are read with it
            needed = np.flatnonzero(places[: parts[-1], 0] < places[: parts[-1], 1])
            if not any(pa.types.is_dictionary(self.schema.field(name).type) for name in columns):
                needed = needed[:1]  # which Arrow asks for
            read = np.union1d(parts, needed)
        for part in map(int, read):
            if self._is_file:
                batch = reader.get_batch(part)
            else:
                self._file.seek(int(places[part, 0]))
                batch = reader.read_next_batch()
            first, end = map(int, starts[part : part + 2])
            if _any_of(wanted, first, end):
                batch.validate(full=True)  # offsets that point elsewhere would show what else is in memory
                yield first, batch.select(list(columns))

    def _batches(self) -> tuple[np.ndarray, np.ndarray]:
        """The first row of each, and at last how many there are; and (batches, 2) where it begins, with the
        dictionaries that come before it and without."""
        if "batches" not in self._known:
            rows, places, before = [0], array("q"), self._begin if not self._is_file else 0
            for message in self._messages():
                if message.is_batch:
                    rows.append(message.rows)
                    places.extend((before, message.start))
                    before = message.end
            self._known["batches"] = np.cumsum(rows), np.array(places, np.int64).reshape(-1, 2)
        found: tuple[np.ndarray, np.ndarray] = self._known["batches"]
        return found

    def _messages(self) -> Iterator[headers.Message]:
        """Those that batches and their dictionaries are in, each a plausible one."""
        packed = unpacked = rows = dictionaries = 0
        if self._is_file:
            found = headers.blocks(self._file, self._footer, self.size)
        else:
            found = headers.stream(self._file, self._begin, self.size)
        for message in found:
            if not message.is_batch:  # they stay
                packed, unpacked = packed + message.packed, unpacked + message.unpacked
                dictionaries += 1
            if dictionaries > _MOST_DICTIONARIES:
                raise DataError(f"{self._shown}: more than {_MOST_DICTIONARIES:,} dictionaries; write larger batches")
            own = (message.packed, message.unpacked) if message.is_batch else (packed, unpacked)
            if own[1] > max(_MOST_BYTES, _MOST_TIMES * own[0]):
                raise _bomb(self._shown, "a batch" if message.is_batch else "its dictionaries", *own)
            rows += message.rows if message.is_batch else 0
            _refuse_many_rows(rows, self.size, self._shown)
            yield message


def _of(chunks: Sequence[headers.Chunk], columns: Sequence[str]) -> list[headers.Chunk]:
    return [chunk for chunk in chunks if chunk.path in columns or chunk.path.partition(".")[0] in columns]


def _schema(message: bytes) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(_neutral(message)))


def _neutral(stated: bytes) -> bytes:
    return stated.replace(_EXTENSION, _NO_EXTENSION)


def _any_of(wanted: Sequence[int] | None, first: int, end: int) -> bool:
    """Whether a row from `first` to before `end` is wanted."""
    return wanted is None or bisect_left(wanted, first) < bisect_left(wanted, end)


def _extension(field: pa.Field, path: str = "") -> tuple[str, str] | None:
    """Where in a column an extension type is, and its name."""
    kind, path = field.type, f"{path}.{field.name}" if path else field.name
    named = (field.metadata or {}).get(_NO_EXTENSION)
    if named is not None or isinstance(kind, pa.BaseExtensionType):
        return _name(path), _name(kind.extension_name if named is None else named.decode(errors="replace"))
    inner = [pa.field("", kind.value_type)] if pa.types.is_dictionary(kind) else map(kind.field, range(kind.num_fields))
    return next(filter(None, (_extension(one, path) for one in inner)), None)


def _refuse_extensions(schema: pa.Schema, shown: str) -> None:
    for field in schema:
        if found := _extension(field):
            raise _refusal(shown, f"the column {found[0]}", f" {found[1]}")


def _refusal(shown: str, column: str, name: str) -> DataError:
    return DataError(
        f"{shown}: {column} is of the extension type{name}, whose values may be code and are not read; write the "
        "pictures as bytes and the labels as text"
    )


def _refuse_other(schema: pa.Schema, columns: Sequence[str], shown: str) -> None:
    """Than plain columns."""
    for name in columns:
        if not _is_plain(kind := schema.field(name).type):
            advice = "write the pictures as bytes and the labels as text or whole numbers"
            if pa.types.is_nested(kind) and not pa.types.is_struct(kind):
                advice = "multi-label data is not supported, an image has one class"
            raise DataError(f"{shown}: the column {_name(name)} holds {_name(str(kind))}, which is not read; {advice}")


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


def _refuse_many_rows(num_rows: int, size: int, shown: str) -> None:
    """No row of any table has less than a byte."""
    if num_rows > size:
        raise DataError(f"{shown}: {num_rows:,} rows from {size:,} bytes: a decompression bomb")


def refuse_few_bytes(num_rows: int, size: int, shown: str) -> None:
    """Rows without a picture are refused one by one, which of many more than can have one takes minutes."""
    if num_rows > _ALWAYS_ROWS + size // _FEWEST_BYTES:
        raise DataError(
            f"{shown}: {num_rows:,} rows from {size:,} bytes, too few for as many pictures; leave out the rows that "
            "have none"
        )


def _large_footer(shown: str, length: int) -> DataError:
    return DataError(f"{shown}: a footer of {length:,} bytes, above {_MOST_FOOTER:,}; write larger row groups")


def _bomb(shown: str, what: str, packed: int, unpacked: int) -> DataError:
    return DataError(f"{shown}: {what} unpacks to {unpacked:,} bytes from {packed:,}: a decompression bomb")


def _name(name: str) -> str:
    return shorter(written(name))

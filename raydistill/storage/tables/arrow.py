"""Arrow files: a stream, as `datasets` saves it, or an IPC file, which is also feather's second version."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raydistill.errors import DataError
from raydistill.storage.tables import arrow_headers
from raydistill.storage.tables.arrow_headers import Message
from raydistill.storage.tables.columns import (
    bytes_of_views,
    neutral,
    neutral_schema,
    refuse_extensions,
    refuse_other_types,
    validate,
)
from raydistill.storage.tables.parts import (
    MOST_BYTES,
    MOST_TIMES,
    MOST_TIMES_IN_ALL,
    Batches,
    Parts,
    any_of,
    bomb,
    is_bomb,
    refuse_few_bytes,
    refuse_many_rows,
)

_MOST_DICTIONARIES = 4096  # of a file; any row of it is read with all of them
_MOST_OF_A_BATCH = 1 << 30  # bytes: each process that reads a row of a batch holds all of it


class ArrowFile(Parts):
    """An open Arrow file without extension types."""

    def __init__(self, file: Any, shown: str, known: dict[Any, Any]) -> None:
        super().__init__(file, shown, known)
        file.seek(0)
        magic = file.read(8)
        if magic.startswith(b"FEA1"):
            raise DataError(f"{shown}: feather's first version is not read; write it again as the second")
        self._is_file, self._begin = magic.startswith(b"ARROW1"), 0
        if self._is_file:
            self._header, end = self._footer(10)
            self.schema = pa.ipc.open_file(pa.py_buffer(magic + neutral(self._header) + end)).schema
        elif (first := arrow_headers.message(file, 0, self.size)) is None:
            raise ValueError("it holds nothing")
        else:
            self._begin = first.end
            file.seek(0)
            self._header = file.read(self._begin)
            self.schema = neutral_schema(self._header)
        refuse_extensions(self.schema, self._header, shown)

    @property
    def _starts(self) -> np.ndarray:
        return self._batches()[0]

    def refuse_bombs(self, columns: Sequence[str]) -> None:
        """From the sizes in all messages, for any columns."""
        refuse_few_bytes(self.num_rows, self.size, self._shown)

    def read(self, columns: Sequence[str], wanted: Sequence[int] | None = None) -> Batches:
        """As in `ParquetFile`."""
        refuse_other_types(self.schema, columns, self._shown)
        options = pa.ipc.IpcReadOptions(included_fields=[self.schema.get_field_index(name) for name in columns])
        starts, places = self._batches()
        self._file.seek(0)
        reader = (pa.ipc.open_file if self._is_file else pa.ipc.open_stream)(self._file, options=options)
        parts = read = self._parts_of(wanted)
        dictionaries = dict[Any, Any]()
        if not self._is_file and len(parts):  # a stream's dictionaries are read with the batch after them
            needed = np.flatnonzero(places[: parts[-1], 0] < places[: parts[-1], 1])
            if not any(pa.types.is_dictionary(self.schema.field(name).type) for name in columns):
                needed = needed[:1]  # Arrow asks for these in any case
            read = np.union1d(parts, needed)
        for part in map(int, read):
            if self._is_file:
                batch = reader.get_batch(part)
            else:
                self._file.seek(int(places[part, 0]))
                batch = reader.read_next_batch()
            first, end = map(int, starts[part : part + 2])
            if any_of(wanted, first, end):
                batch = batch.select(list(columns))
                self._refuse_shared(int(places[part, 2] - places[part, 1]), batch)
                for name in columns:  # offsets that point elsewhere would show other memory
                    validate(batch[name], dictionaries, name)
                yield first, batch

    def _refuse_shared(self, packed: int, batch: pa.RecordBatch) -> None:
        """From the bytes of all rows of a batch in columns whose rows may share theirs. A batch may have its share of
        what any file may unpack to."""
        total = sum(map(bytes_of_views, batch.columns))
        if total > MOST_TIMES * packed + MOST_BYTES * packed // self.size:
            raise bomb(self._shown, "what the rows of a batch share", packed, total)

    def _batches(self) -> tuple[np.ndarray, np.ndarray]:
        """The first row of each batch and the number of rows; and (batches, 3): where each begins, with and without the
        dictionaries before it, and ends."""
        if "batches" not in self._known:
            rows, places, before = [0], array("q"), self._begin
            for message in self._messages():
                if message.is_batch:
                    rows.append(message.rows)
                    places.extend((before, message.start, message.end))
                    before = message.end
            self._known["batches"] = np.cumsum(rows), np.array(places, np.int64).reshape(-1, 3)
        found: tuple[np.ndarray, np.ndarray] = self._known["batches"]
        return found

    def _messages(self) -> Iterator[Message]:
        """The messages of batches and their dictionaries, each of a plausible size."""
        packed = unpacked = rows = dictionaries = held = 0
        in_all, sizes = (0, 0), dict[int, int]()  # each batch is read with all dictionaries, of these sizes
        if self._is_file:
            found = arrow_headers.blocks(self._file, self._header, self.size)
        else:
            found = arrow_headers.stream(self._file, self._begin, self.size)
        for message in found:
            if message.is_batch:
                own, what, rows = (message.packed, message.unpacked), "a batch", rows + message.rows
                in_all = in_all[0] + message.packed, in_all[1] + message.unpacked + held
                if max(own) > _MOST_OF_A_BATCH:
                    size = f"{max(own):,} bytes, above {_MOST_OF_A_BATCH:,}"
                    raise DataError(f"{self._shown}: a batch of {size}; write smaller batches")
            else:  # dictionaries stay in memory
                packed, unpacked, dictionaries = packed + message.packed, unpacked + message.unpacked, dictionaries + 1
                own, what = (packed, unpacked), "its dictionaries"
                before = sizes.get(message.dictionary, 0)
                sizes[message.dictionary] = message.unpacked + before * message.is_delta
                held += sizes[message.dictionary] - before
                in_all = in_all[0] + message.packed, in_all[1] + sizes[message.dictionary]  # a delta is a new copy
            if dictionaries > _MOST_DICTIONARIES:
                raise DataError(f"{self._shown}: more than {_MOST_DICTIONARIES:,} dictionaries; write larger batches")
            if is_bomb(*own):
                raise bomb(self._shown, what, *own)
            if is_bomb(*in_all, MOST_TIMES_IN_ALL):
                raise bomb(self._shown, "what its batches hold, each with all dictionaries,", *in_all)
            refuse_many_rows(rows, self.size, self._shown)
            yield message

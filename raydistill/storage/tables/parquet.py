"""Parquet files, read batch by batch: each page's header is checked for its size before the page is unpacked."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from raydistill.errors import DataError
from raydistill.storage.tables import parquet_headers
from raydistill.storage.tables.columns import named, neutral_schema, refuse_extensions, refuse_other_types
from raydistill.storage.tables.parquet_headers import Chunk
from raydistill.storage.tables.parts import (
    MOST_BYTES,
    MOST_TIMES_IN_ALL,
    Batches,
    Parts,
    any_of,
    bomb,
    is_bomb,
    refuse_few_bytes,
    refuse_many_rows,
)

_MOST_ROWS, _MOST_LEVELS = 16384, 64  # rows that are read together; levels of nested types
# Under the second name, of the same length, Arrow ignores the key.
_SCHEMA, _NO_SCHEMA = b"ARROW:schema", b"arrow.schema"


class ParquetFile(Parts):
    """An open parquet file without extension types."""

    def __init__(self, file: Any, shown: str, known: dict[Any, Any]) -> None:
        super().__init__(file, shown, known)
        if "footer" not in known:
            known["footer"] = self._read_footer()
        metadata, self._groups, self._first_rows, self._paths = known["footer"]
        file.seek(0)
        # Without a buffer Arrow holds the whole column of a row group. Bytes in memory need none.
        size = 0 if isinstance(file, pa.BufferReader) else 1 << 22
        self._parquet = pq.ParquetFile(
            file, metadata=metadata, buffer_size=size, arrow_extensions_enabled=False, page_checksum_verification=True
        )
        self.schema = self._parquet.schema_arrow

    def _read_footer(self) -> tuple[Any, list[list[Chunk]], np.ndarray, list[str]]:
        """Arrow's metadata, the columns and first rows of the row groups, and the columns' paths."""
        footer, end = self._footer(8)
        if end[4:] != b"PAR1":
            raise ValueError("it is encrypted" if end[4:] == b"PARE" else "it does not end as one")
        levels, groups = parquet_headers.footer(footer)
        if levels > _MOST_LEVELS:  # Arrow recurses over each
            raise DataError(f"{self._shown}: columns are nested more than {_MOST_LEVELS} levels deep")
        # Arrow makes types of that key's content as soon as it reads a footer.
        metadata = pq.read_metadata(io.BytesIO(b"PAR1" + footer.replace(_SCHEMA, _NO_SCHEMA) + end))
        if stated := (metadata.metadata or {}).get(_NO_SCHEMA):
            refuse_extensions(neutral_schema(base64.b64decode(stated)), b"", self._shown)
        if any(not 0 <= c.start <= c.start + c.packed <= self.size for _, chunks in groups for c in chunks):
            raise ValueError("a column without a place")
        places = sorted((c.start, c.start + c.packed) for num_rows, chunks in groups for c in chunks if num_rows)
        if any(end > start for (_, end), (start, _) in pairwise(places)):
            raise ValueError("its columns overlap")
        # Arrow takes a row group's columns by their order in the schema, whatever path they state.
        paths = [metadata.schema.column(k).path for k in range(metadata.num_columns)]
        if any(len(chunks) != len(paths) for _, chunks in groups):
            raise ValueError(f"a row group that does not have {len(paths):,} columns")
        rows = [num_rows for num_rows, _ in groups]
        if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
            raise ValueError(f"its row groups hold {sum(rows):,} rows, and its footer says {metadata.num_rows:,}")
        refuse_many_rows(metadata.num_rows, self.size, self._shown)
        return metadata, [chunks for _, chunks in groups], np.cumsum([0, *rows]), paths

    @property
    def _starts(self) -> np.ndarray:
        return self._first_rows

    def read(self, columns: Sequence[str], wanted: Sequence[int] | None = None, lists: bool = False) -> Batches:
        """Batches of these columns, in order, each with the number of its first row; with `wanted` rows, only the
        batches that hold some. Raises DataError: a column that is not plain (with `lists`, one of numbers is), or a
        bomb."""
        refuse_other_types(self.schema, columns, self._shown, lists)
        for group in map(int, self._parts_of(wanted)):
            first, end = map(int, self._starts[group : group + 2])
            found = self._of(self._groups[group], columns)
            most = max((self._most_of_a_row(path, chunk, end - first) for path, chunk in found), default=0)
            together = max(1, min(_MOST_ROWS, MOST_BYTES // max(most, 1)))
            for batch in self._parquet.iter_batches(together, [group], list(columns), use_threads=False):
                if any_of(wanted, first, first + len(batch)):
                    batch.validate(full=True)
                    yield first, batch
                first += len(batch)
                if not any_of(wanted, first, end):
                    break

    def refuse_bombs(self, columns: Sequence[str]) -> None:
        """From the footer's sizes of these columns together. The headers of pages are read with their rows."""
        packed, unpacked = 0, Counter[str]()
        for path, chunk in (found for chunks in self._groups for found in self._of(chunks, columns)):
            packed, unpacked[path] = packed + chunk.packed, unpacked[path] + chunk.unpacked
        self._refuse_in_all(packed, unpacked.total(), max(unpacked, key=unpacked.__getitem__, default=""))
        refuse_few_bytes(self.num_rows, self.size, self._shown)

    def _refuse_in_all(self, packed: int, unpacked: int, path: str) -> None:
        """From the bytes of all row groups and columns, or of those that are read so far."""
        if is_bomb(packed, unpacked, MOST_TIMES_IN_ALL):
            raise bomb(self._shown, f"what it holds, as in the column {named(path)},", packed, unpacked)

    def _most_of_a_row(self, path: str, chunk: Chunk, num_rows: int) -> int:
        """Bytes that each further row may add to memory, beyond the pages themselves if these are few."""
        if chunk not in self._known:
            total = largest = repeated = 0
            for packed, unpacked, repeats in parquet_headers.pages(self._file, chunk, num_rows):
                if is_bomb(packed, unpacked):
                    raise bomb(self._shown, f"a page of the column {named(path)}", packed, unpacked)
                total, largest = total + unpacked, max(largest, unpacked)
                before = self._known.get("pages", (0, 0))
                self._known["pages"] = before[0] + packed, before[1] + unpacked
                self._refuse_in_all(before[0] + packed, before[1] + unpacked, path)
                repeated = max(repeated, unpacked if repeats else 0)
            self._known[chunk] = repeated if total <= MOST_BYTES else largest
        return int(self._known[chunk])

    def _of(self, chunks: Sequence[Chunk], columns: Sequence[str]) -> list[tuple[str, Chunk]]:
        """The parts of these columns in a row group, with their paths."""
        found = zip(self._paths, chunks, strict=True)
        return [(path, chunk) for path, chunk in found if path in columns or path.partition(".")[0] in columns]

"""Code shared by parquet and Arrow files: rows in parts (row groups or batches), and the limits on their sizes."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raydistill.errors import DataError

# The bytes that a page of parquet, a batch of Arrow, or the rows read together may always unpack to. Pictures are
# compressed already, so a larger one comes from at least an eighth of its size.
MOST_BYTES, MOST_TIMES = 64 << 20, 8
MOST_TIMES_IN_ALL = 200  # that all pages or batches may unpack to, relative to their packed bytes: labels repeat
_MOST_FOOTER = 16 << 20  # bytes
_ALWAYS_ROWS, _FEWEST_BYTES = 1 << 18, 12  # rows that a set may always have, and bytes for each other row
Batches = Iterator[tuple[int, pa.RecordBatch]]


class Parts:
    """An open file. `known` holds what earlier calls learnt about it; `shown` is its name in messages."""

    schema: pa.Schema

    def __init__(self, file: Any, shown: str, known: dict[Any, Any]) -> None:
        self._file, self._shown, self._known, self.size = file, shown, known, file.seek(0, 2)

    @property
    def _starts(self) -> np.ndarray:
        """(parts + 1,): the first row of each part, and the number of rows."""
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        return int(self._starts[-1])

    def end_of_part(self, row: int) -> float:
        """The first row of the next part; infinity after the last."""
        return next(map(int, self._starts[np.searchsorted(self._starts, row, "right") :]), math.inf)

    def _parts_of(self, wanted: Sequence[int] | None) -> np.ndarray:
        """The parts that hold these rows or, without any, rows at all; in their order."""
        if wanted is None:
            return np.flatnonzero(np.diff(self._starts))
        inside = np.asarray(wanted[: bisect_left(wanted, self.num_rows)], np.int64)
        return np.unique(np.searchsorted(self._starts, inside, "right") - 1)

    def _footer(self, tail: int) -> tuple[bytes, bytes]:
        """The footer of the file, and the `tail` bytes after it. The first four of these are the footer's length."""
        self._file.seek(max(self.size - tail, 0))
        end = self._file.read(tail)
        length = int.from_bytes(end[:4], "little")
        if length > min(_MOST_FOOTER, self.size - tail):
            if length > self.size - tail:
                raise ValueError("it does not end as one")
            raise DataError(
                f"{self._shown}: a footer of {length:,} bytes, above {_MOST_FOOTER:,}; write larger row groups"
            )
        self._file.seek(self.size - tail - length)
        return self._file.read(length), end


def any_of(wanted: Sequence[int] | None, first: int, end: int) -> bool:
    """Whether a row from `first` to before `end` is wanted."""
    return wanted is None or bisect_left(wanted, first) < bisect_left(wanted, end)


def is_bomb(packed: int, unpacked: int, most_times: int = MOST_TIMES) -> bool:
    return unpacked > max(MOST_BYTES, most_times * packed)


def bomb(shown: str, what: str, packed: int, unpacked: int) -> DataError:
    return DataError(f"{shown}: {what} unpacks to {unpacked:,} bytes from {packed:,}: a decompression bomb")


def refuse_many_rows(num_rows: int, size: int, shown: str) -> None:
    """Names that count upwards take less than a byte each, so there is a number of rows that is always allowed."""
    if num_rows > _ALWAYS_ROWS + size:
        raise DataError(f"{shown}: {num_rows:,} rows from {size:,} bytes: a decompression bomb")


def refuse_few_bytes(num_rows: int, size: int, shown: str) -> None:
    """Rows without a picture are refused one by one, so many more rows than pictures would take minutes."""
    if num_rows > _ALWAYS_ROWS + size // _FEWEST_BYTES:
        raise DataError(
            f"{shown}: {num_rows:,} rows from {size:,} bytes, too few for as many pictures; leave out the rows that "
            "have none"
        )

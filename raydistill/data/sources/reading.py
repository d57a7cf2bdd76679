"""The only code that reads pictures' bytes. An error of one picture refuses only that picture."""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Iterator, Sequence

from raydistill.data.sources.containers import next_part, read_rows
from raydistill.errors import DataError, StageError, reason_of
from raydistill.storage.addresses import read_address
from raydistill.storage.filesystems import OF_MACHINE, read_file, too_large

UNREADABLE = "cannot be read"
NO_IMAGE = "no image in this row: it has no bytes, and a path is not followed; save the data set with its pictures"


def read_pictures(
    places: Sequence[tuple[str, int | None]], most_bytes: int, source: str | None = None
) -> Iterator[tuple[int, bytes | None, str]]:
    """The index among `places` and the bytes, or None and the reason: of files, or of rows of one file in its order.

    `source` is the images.path that names them, which may be untrusted; None: the user named them. Raises StageError,
    and other errors of the machine or its network.
    """
    if places and places[0][1] is not None:
        number_of = {row: number for number, (_, row) in enumerate(places) if row is not None}
        yield from _read_rows(places[0][0], number_of, most_bytes)
        return
    for number, (path, _) in enumerate(places):
        try:
            yield number, read_bytes_of(path, most_bytes, source), ""
        except Exception as error:
            yield number, None, refusal(error)


def _read_rows(path: str, number_of: dict[int, int], most_bytes: int) -> Iterator[tuple[int, bytes | None, str]]:
    while number_of:
        try:
            for row, data in read_rows(path, number_of, most_bytes):
                yield number_of.pop(row), *_checked(data, most_bytes)
            if number_of:
                raise DataError(f"the file no longer has a row {min(number_of)}")
        except Exception as error:
            reason, end = refusal(error), math.inf
            with contextlib.suppress(DataError):  # a file that cannot be opened loses all its rows
                end = next_part(path, min(number_of))
            yield from ((number_of.pop(row), None, reason) for row in sorted(number_of) if row < end)


def read_bytes_of(path: str, most_bytes: int, source: str | None = None) -> bytes:
    """Raises OSError; ValueError for a name that no file can have; ConfigError for an unknown protocol."""
    if "://" not in path:  # on this machine; fsspec would take as long as the reading to find that out
        return read_file(path, most_bytes)
    return read_address(path, path if source is None else source, most_bytes)


def refusal(error: Exception) -> str:
    """Why one picture, row or file is left out. Raises errors of the machine again."""
    number = getattr(error, "errno", None)
    if isinstance(error, MemoryError | StageError) or number in OF_MACHINE:
        raise error
    reason = getattr(error, "strerror", None) or reason_of(error)
    return f"{UNREADABLE}: {reason}{' (images.max_bytes)' if number == errno.EFBIG else ''}"


def _checked(data: bytes | None, most_bytes: int) -> tuple[bytes | None, str]:
    if data is None:
        return None, NO_IMAGE
    if len(data) > most_bytes:
        return None, refusal(too_large(len(data), most_bytes))
    return data, ""

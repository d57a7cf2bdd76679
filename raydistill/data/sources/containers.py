"""Readers of files that hold many images: parquet, Arrow (as `datasets` saves to disk) and WebDataset tar files.

Rows are numbered in the file's own order. Only the rows that are asked for are read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import posixpath
import tarfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from raydistill.data.labels import MOST_BYTES, label_of, refuse_many_classes
from raydistill.data.sources.archives import EXTENSIONS, Member, images_of, label_in, refuse_compressed
from raydistill.errors import DataError
from raydistill.escaping import quoted
from raydistill.storage.filesystems import FileSystem, open_filesystem, refuse_unread, version_of
from raydistill.storage.tables import SUFFIXES as TABLE_SUFFIXES
from raydistill.storage.tables import Batches, Table, longest, named, open_table, values

__all__ = ["EXTENSIONS", "MOST_BESIDE", "SUFFIXES", "Row", "count_rows", "list_rows", "read_rows"]
SUFFIXES = (*TABLE_SUFFIXES, ".tar")
MOST_BESIDE = 16 << 20  # bytes of a file about other files, such as a list of classes
_MOST_TOGETHER = 16 << 20  # bytes of labels or splits that are copied at a time


@dataclass(frozen=True)
class Row:
    """One image's row: its class's name or None, and its split as the file writes it."""

    number: int
    label: str | None
    split: str | None


def list_rows(path: str, ignored: Counter[str], notes: Counter[str]) -> Iterator[Row]:
    """`ignored` counts what the file holds besides images, and `notes` counts labels that are not read as they look.
    Raises DataError: a damaged file, a missing column, or a label without a name."""
    if _is_tar(path):
        with _open_tar(path) as archive:
            for number, (_, beside) in enumerate(images_of(archive, quoted(path), ignored)):
                yield Row(number, label_in(archive.fileobj, beside, quoted(path), notes), None)
    else:
        with open_table(path) as table:
            yield from _table_rows(path, table, notes)


def read_rows(path: str, numbers: Collection[int], most_bytes: float = math.inf) -> Iterator[tuple[int, Any]]:
    """Number and bytes of those rows, in the file's order; None if a row has no bytes. Raises DataError, also for a
    file in a tar of more than `most_bytes`."""
    wanted = sorted(numbers)
    if _is_tar(path):
        with _open_tar(path) as archive:
            file: Any = archive.fileobj
            places = _places(path, version_of(path, file))
            for number in wanted:
                start, size = map(int, places[number])
                if size > most_bytes:
                    raise DataError(f"it has {size:,} bytes, above {most_bytes:,} (images.max_bytes)")
                file.seek(start)
                if len(data := file.read(size)) < size:
                    raise EOFError("it ends too early")
                yield number, data
        return
    with open_table(path) as table:
        _check_image_column(path, table)
        for first, part in table.read(["image"], wanted):
            for number in wanted[bisect_left(wanted, first) : bisect_left(wanted, first + len(part))]:
                (value,) = values(part["image"][number - first : number - first + 1])
                yield number, value.get("bytes") if isinstance(value, dict) else value


def next_part(path: str, row: int) -> float:
    """The first row of the next part, such as a row group: rows of a part are read together. Infinity after the last.
    Raises DataError."""
    if _is_tar(path):
        return row + 1
    with open_table(path) as table:
        return table.end_of_part(row)


def count_rows(path: str) -> int:
    """The number of images in a file, with or without labels. Raises DataError as `list_rows` does."""
    if _is_tar(path):
        with _open_tar(path) as archive:
            return len(_places(path, version_of(path, archive.fileobj)))
    with open_table(path) as table:
        _check_image_column(path, table)
        table.refuse_bombs(["image"])
        return table.num_rows


def _is_tar(path: str) -> bool:
    return path.lower().endswith(".tar")


@functools.lru_cache(maxsize=8)
def _places(path: str, version: str) -> np.ndarray:
    """(images, 2) of a tar file: the offset and the number of the bytes of each image. Without the cache each call for
    rows would read all headers again."""
    with _open_tar(path) as archive:
        images = images_of(archive, quoted(path), Counter())
        return np.array([(file.start, file.size) for file, _ in images], np.int64).reshape(-1, 2)


@contextlib.contextmanager
def _open_tar(path: str) -> Iterator[tarfile.TarFile]:
    fs, place = open_filesystem(path)
    try:
        with fs.open(place) as file:
            refuse_compressed(file.read(6), quoted(path))
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as archive:
                yield archive
    except (tarfile.TarError, OSError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        refuse_unread(error, quoted(path))
        reason = "headers of headers without end" if isinstance(error, RecursionError) else error
        raise DataError(f"{quoted(path)}: not a tar file, or a damaged one ({reason})") from None


def _table_rows(path: str, table: Table, notes: Counter[str]) -> Iterator[Row]:
    """Columns `image` (bytes, or the struct of bytes and path that `datasets` writes), `label`, and maybe `split`."""
    schema, shown = table.schema, quoted(path)
    if lacking := {"image", "label"} - set(schema.names):
        found = ", ".join(map(named, schema.names[:10]))
        in_folder = any(part.startswith("label=") for part in PurePosixPath(path).parts)
        advice = "a label in its folder's name is not read; write it as a column" if in_folder else "rename them"
        raise DataError(f"{shown}: no column {' and no column '.join(sorted(lacking))} among {found}; {advice}")
    _check_image_column(path, table)
    columns = [name for name in ("label", "split") if name in schema.names]
    table.refuse_bombs(["image", *columns])
    names = _class_names(path, schema.metadata or {})
    plain = dict[str, str]()  # labels that are read as they look: rows share them
    for first, part in _in_pieces(table.read(columns), shown):
        splits = values(part["split"]) if "split" in columns else [None] * part.num_rows
        for number, (value, split) in enumerate(zip(values(part["label"]), splits, strict=True), first):
            where = f"{shown}: row {number}"
            if names and isinstance(value, int | float) and value >= 0:
                if value >= len(names):
                    raise DataError(f"{where} has label {value}, and the file names {len(names)} classes")
                value = names[int(value)] if value == int(value) else value
            text = split.decode(errors="replace") if isinstance(split, bytes) else split
            label = plain.get(value) if isinstance(value, str) else None
            if label is None:
                label = label_of(value, where, notes)
                if label is not None and label == value:
                    plain[label] = label
            yield Row(number, label, None if text is None else str(text))


def _in_pieces(batches: Batches, shown: str) -> Batches:
    """So few rows at a time that each may have its own copy of shared values."""
    for first, batch in batches:
        most = 1
        for name in batch.schema.names:
            if pa.types.is_struct(batch[name].type) and batch[name].null_count < len(batch):
                row = first + values(batch[name].is_valid()).index(True)
                of = "class" if name == "label" else name
                raise DataError(f"{shown}: row {row}: the {name} is a mapping; write only the name of the {of}")
            if (most := max(most, longest(batch[name]))) > MOST_BYTES:
                raise DataError(f"{shown}: the column {name} holds {most:,} bytes in one row, too many for a {name}")
        for start in range(0, len(batch), count := max(1, _MOST_TOGETHER // most)):
            yield first + start, batch.slice(start, count)


def _check_image_column(path: str, table: Table) -> None:
    """Raises DataError if the column holds neither bytes nor structs of bytes and path."""
    if "image" not in table.schema.names:
        found = ", ".join(map(named, table.schema.names[:10]))
        raise DataError(f"{quoted(path)}: no column image among {found}; rename the one that holds the pictures")
    kind: Any = table.schema.field("image").type
    if pa.types.is_struct(kind) and "bytes" in [kind.field(k).name for k in range(kind.num_fields)]:
        kind = kind.field("bytes").type
    of_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    if pa.types.is_null(kind) or any(test(kind) for test in of_bytes):
        return
    is_text = any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
    advice = "for paths make a .csv with `path` and `label`" if is_text else "encode each picture as PNG or JPEG"
    raise DataError(f"{quoted(path)}: the column image holds {kind}, not the bytes of image files; {advice}")


def _class_names(path: str, metadata: dict[bytes, bytes]) -> list[str]:
    """The names of integer labels, which Hugging Face `datasets` keeps in the file or in the folder that it saves."""
    names = _names_in(_json(metadata.get(b"huggingface", b"{}")).get("info"))
    if names is None:
        beside = posixpath.join(posixpath.dirname(path), "dataset_info.json")
        fs, place = open_filesystem(beside)
        names = _names_beside(beside, str(fs.info(place))) if fs.isfile(place) else None
    refuse_many_classes(len(names or ()), quoted(path))
    return names or []


def _names_in(tree: Any) -> list[str] | None:
    for key in ("features", "label", "names"):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, list) and all(isinstance(name, str) for name in tree) else None


@functools.lru_cache(maxsize=1)
def _names_beside(path: str, version: str) -> list[str] | None:
    """The names in a file that many files may share."""
    return _names_in(_json(_beside(*open_filesystem(path))))


def _beside(fs: FileSystem, place: str) -> bytes:
    try:
        return fs.read_at_most(place, MOST_BESIDE)
    except OSError as error:
        raise DataError(f"{quoted(place)}: cannot be read: {error.strerror}") from None


def _json(data: bytes) -> dict[str, Any]:
    """Empty if it is not a JSON object: another program wrote it."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def saved_files(fs: FileSystem, folder: str) -> tuple[set[str], str | None] | None:
    """The data files and the split of a folder that `datasets` saved, from its state.json; None for another folder.
    Raises DataError if rows were selected without writing new files."""
    place = f"{folder}/state.json"
    if not fs.isfile(place):
        return None
    state = _json(_beside(fs, place))
    if state.get("_indices_files"):
        raise DataError(
            f"{quoted(place)}: its rows were chosen or shuffled, and the files hold the old ones; call "
            "`flatten_indices()` and save it again"
        )
    files = state.get("_data_files")
    if not isinstance(files, list):
        return None
    names = {str(file.get("filename")) for file in files if isinstance(file, dict)}
    return names, state.get("_split") if isinstance(state.get("_split"), str) else None

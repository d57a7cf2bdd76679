"""Readers of files that hold many images: parquet, Arrow (as `datasets` saves to disk) and WebDataset tar files.

Rows are numbered in the file's own order; only those that are asked for are read.
"""

from __future__ import annotations

import contextlib
import json
import tarfile
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import parquet as pq

from raydistill.errors import DataError
from raydistill.storage.filesystems import open_filesystem

SUFFIXES = (".parquet", ".arrow", ".tar")
# Of pictures, in folders and in tar files; what is in them is decided by their content.
EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".avif", ".jp2", ".tga", ".ico",
})  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What a file says of one of its images, besides the pixels: a class's name or None, a split as it is written."""

    number: int
    label: str | None
    split: str | None


def list_rows(path: str) -> Iterator[Row]:
    """Raises DataError: a damaged file, one without the columns it needs, a label that it has no name for."""
    suffix = PurePosixPath(path).suffix.lower()
    try:
        if suffix == ".tar":
            yield from _tar_rows(path)
        else:
            yield from _table_rows(path, suffix)
    except (pa.ArrowException, tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: not a {suffix.lstrip('.')} file, or a damaged one ({error})") from None


def read_rows(path: str, numbers: Collection[int]) -> Iterator[tuple[int, Any]]:
    """Number and bytes, None where the row has none, of those rows, in the file's order."""
    suffix = PurePosixPath(path).suffix.lower()
    wanted = sorted(numbers)
    if suffix == ".tar":
        with _open(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            members = islice(enumerate(_members(archive, path)), wanted[-1] + 1 if wanted else 0)
            for number, (member, _) in members:
                if wanted[bisect_left(wanted, number)] == number:
                    content = archive.extractfile(member)
                    yield number, None if content is None else content.read()
        return
    first = 0
    for length, read in _batches(path, suffix):
        inside = wanted[bisect_left(wanted, first) : bisect_left(wanted, first + length)]
        if inside:
            column = read()
            for number in inside:
                value = column[number - first].as_py()
                yield number, value.get("bytes") if isinstance(value, dict) else value
        first += length


def count_rows(path: str) -> int:
    """How many images a file holds, whether it has labels or not. Raises DataError as `list_rows` does."""
    suffix = PurePosixPath(path).suffix.lower()
    try:
        if suffix == ".tar":
            return sum(1 for _ in _tar_rows(path))
        with _open(path) as file:
            schema = pq.read_schema(file) if suffix == ".parquet" else pa.ipc.open_stream(file).schema
        if "image" not in schema.names:
            raise DataError(f"{path}: no column image among {schema.names}")
        return sum(length for length, _ in _batches(path, suffix))
    except (pa.ArrowException, tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: not a {suffix.lstrip('.')} file, or a damaged one ({error})") from None


@contextlib.contextmanager
def _open(path: str) -> Iterator[Any]:
    fs, place = open_filesystem(path)
    with fs.open(place, "rb") as file:
        yield file


def _table_rows(path: str, suffix: str) -> Iterator[Row]:
    """Columns `image` (bytes, or the struct of bytes and path that `datasets` writes), `label`, and maybe `split`."""
    with _open(path) as file:
        schema = pq.read_schema(file) if suffix == ".parquet" else pa.ipc.open_stream(file).schema
        lacking = {"image", "label"} - set(schema.names)
        if lacking:
            raise DataError(f"{path}: no column {' and no column '.join(sorted(lacking))} among {schema.names}")
        file.seek(0)
        columns = [name for name in ("label", "split") if name in schema.names]
        table = (
            pq.read_table(file, columns=columns)
            if suffix == ".parquet"
            else pa.Table.from_batches([batch.select(columns) for batch in pa.ipc.open_stream(file)])
        )
    names = _class_names(schema.metadata or {})
    splits = table["split"].to_pylist() if "split" in columns else [None] * table.num_rows
    for number, (label, split) in enumerate(zip(table["label"].to_pylist(), splits, strict=True)):
        if names and isinstance(label, int):
            if label >= len(names):
                raise DataError(f"{path}: row {number} has label {label}, and the file names {len(names)} classes")
            label = names[label] if label >= 0 else None
        yield Row(number, _text(label), _text(split))


def _class_names(metadata: dict[bytes, bytes]) -> list[str]:
    """The names that Hugging Face `datasets` keeps beside integer labels."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return list(features.get("label", {}).get("names", []))


def _batches(path: str, suffix: str) -> Iterator[tuple[int, Any]]:
    """The length of each row group or record batch, and what reads its images."""
    with _open(path) as handle:
        if suffix == ".parquet":
            file = pq.ParquetFile(handle)
            for group in range(file.num_row_groups):

                def read(group: int = group) -> Any:
                    return file.read_row_group(group, columns=["image"])["image"]

                yield file.metadata.row_group(group).num_rows, read
        else:
            for batch in pa.ipc.open_stream(handle):
                yield len(batch), lambda batch=batch: batch.column("image")


def _tar_rows(path: str) -> Iterator[Row]:
    """A label is what stands in `KEY.cls` or `KEY.txt`, or under `label` or `class` in `KEY.json`."""
    with _open(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for number, (_, beside) in enumerate(_members(archive, path)):
            label = None
            for suffix in (".cls", ".json", ".txt"):
                if suffix in beside and label is None:
                    content = archive.extractfile(beside[suffix])
                    label = _tar_label(content.read() if content else b"", suffix, f"{path}: {beside[suffix].name}")
            yield Row(number, label, None)


def _tar_label(data: bytes, suffix: str, where: str) -> str | None:
    try:
        text = data.decode("utf-8-sig")
        if suffix != ".json":
            return _text(text)
        tree = json.loads(text)
        return _text(tree.get("label", tree.get("class"))) if isinstance(tree, dict) else None
    except ValueError:
        raise DataError(f"{where} cannot be read as text{' or JSON' if suffix == '.json' else ''}") from None


def _members(archive: tarfile.TarFile, path: str) -> Iterator[tuple[tarfile.TarInfo, dict[str, tarfile.TarInfo]]]:
    """Each image, and what stands beside it under the same key: the name up to its first dot. Keys are consecutive."""
    key, image, beside = None, None, dict[str, tarfile.TarInfo]()
    for member in archive:
        if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, rest = name.partition(".")
        if (folder, stem) != key:
            if image is not None:
                yield image, beside
            key, image, beside = (folder, stem), None, {}
        suffix = f".{rest.lower()}"
        if suffix not in EXTENSIONS:
            beside[suffix] = member
        elif image is not None:
            raise DataError(f"{path}: {image.name} and {member.name} stand under one key; which is the image?")
        else:
            image = member
    if image is not None:
        yield image, beside


def _text(value: object) -> str | None:
    text = "" if value is None else str(value).strip()
    return text or None

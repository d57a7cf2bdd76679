"""Readers: from a folder, a table of paths, or a parquet file to one list of entries, without opening an image.

Everything that can be wrong with names, labels and counts is found here, before any work starts.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, NoReturn

from raydistill.config import Images
from raydistill.data.many import EXTENSIONS, SUFFIXES, list_rows
from raydistill.data.sample import sample_id
from raydistill.errors import ConfigError, DataError
from raydistill.examples import images_path
from raydistill.storage.filesystems import FileSystem, open_filesystem, refuse_unreachable

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
UNLABELLED_FOLDERS = ("unlabelled", "unlabeled")
_TABLES = (".csv", ".tsv", ".jsonl")
SYSTEM_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One image as its source names it. `row` is its row in a parquet file; label and split are None if not given."""

    path: str
    label: str | None
    split: str | None
    row: int | None = None


@dataclass(frozen=True)
class Listing:
    """All entries of a source, how many other files it holds by reason, and a fingerprint that changes with any file.

    The fingerprint covers names, sizes and times of change (which cannot be set back, unlike times of modification),
    not the folder's own place, so a moved folder stays the same set.
    """

    entries: tuple[Entry, ...]
    classes: tuple[str, ...]
    ignored: dict[str, int]
    fingerprint: str

    def has_split(self, split: str) -> bool:
        return any(entry.split == split for entry in self.entries)


def list_images(config: Images) -> Listing:
    """Raises DataError: no images, one class, a class that a split lacks, a table without the columns it needs; and
    ConfigError where nothing answers at the path."""
    path = config.path
    if path.startswith("example:"):
        path = str(images_path(path.removeprefix("example:")))
    try:
        fs, root = open_filesystem(path)
    except ConfigError as error:
        raise DataError(f"images.path={error}") from None
    refuse_unreachable(path, "images.path")
    if not fs.exists(root):
        raise DataError(f"images.path={config.path}: there is nothing at this path")
    ignored: Counter[str] = Counter()
    is_folder = not fs.isfile(root)
    files = _find(fs, root, ignored) if is_folder else {}
    suffix = _suffix(root)
    if is_folder and _holds_many(files):
        entries = list(_folder_of_many(fs, root, files, ignored))
    elif is_folder:
        entries = list(_from_folder(root, files, ignored))
    elif suffix in SUFFIXES:
        entries = list(_from_many(fs, root, None))
    elif suffix in _TABLES:
        entries = list(_from_table(fs, root, suffix))
    else:
        raise DataError(
            f"images.path={config.path}: use a folder, or a .csv, .tsv, .jsonl, .parquet, .arrow or .tar file"
        )
    if not entries:
        raise DataError(f"images.path={config.path}: no images found ({_describe(ignored)})")
    classes = _classes(config, entries)
    _check(config, entries, classes)
    if config.max_per_class is not None:
        entries = _fewer(entries, config.max_per_class, ignored)
    fingerprint = _fingerprint(fs, root if is_folder else str(PurePosixPath(root).parent), files, entries)
    if not fs.is_local:  # which drops the protocol from its paths
        entries = [replace(e, path=_address(fs, e.path)) for e in entries]
    return Listing(tuple(entries), classes, dict(ignored), fingerprint)


def first_of_table(path: str) -> str | None:
    """Where the first image of a table of paths lies; None of what is no table. Raises DataError as `list_images`."""
    fs, table = open_filesystem(path)
    suffix = _suffix(table)
    if suffix not in _TABLES or not fs.isfile(table):
        return None
    return next((_address(fs, entry.path) for entry in _from_table(fs, table, suffix)), None)


def read_bytes_of(entry: Entry) -> bytes:
    if entry.path.startswith("/"):  # on this machine; fsspec would take as long again to find that out
        with open(entry.path, "rb") as file:
            return file.read()
    fs, path = open_filesystem(entry.path)
    return bytes(fs.cat_file(path))


def is_hidden(parts: Sequence[str]) -> bool:
    """Whether a path below the source is one of those that systems and programs keep beside people's files."""
    return any(part.startswith(".") or part.casefold() in SYSTEM_NAMES for part in parts)


def _find(fs: FileSystem, root: str, ignored: Counter[str]) -> dict[str, Any]:
    """Every file below a folder, on this machine through links to folders as well."""
    if not fs.is_local:
        return dict(fs.find(root, detail=True))
    files: dict[str, Any] = {}
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_refuse_unreadable):
        here = os.path.realpath(folder) + os.sep
        # A link back to a folder it lies in would be followed for ever.
        folders[:] = [f for f in folders if not here.startswith(os.path.realpath(os.path.join(folder, f)) + os.sep)]
        if not names and not folders and "/." not in folder.removeprefix(root):
            ignored["empty folders"] += 1
        files |= {f"{folder}/{name}": {} for name in names}
    return files


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror})") from None


def _from_folder(root: str, files: dict[str, Any], ignored: Counter[str]) -> Iterator[Entry]:
    """`[SPLIT/]CLASS/**/image`, `unlabelled/**/image`, `train/unlabelled/**/image`."""
    tops = {_parts(path, root)[0].casefold() for path in files}
    # Split folders count as such only if a train folder is among them: a class may be called "test".
    has_splits = any(SPLIT_FOLDERS.get(top) == "train" for top in tops)
    for path in sorted(files):
        parts, suffix = _parts(path, root), _suffix(path)
        if is_hidden(parts):
            ignored["hidden and system files"] += 1
            continue
        if suffix not in EXTENSIONS:
            ignored[f"files ending in {suffix or 'nothing'}"] += 1
            continue
        split = SPLIT_FOLDERS.get(parts[0].casefold()) if has_splits else None
        inner = parts[1:] if split else parts
        if inner[0].casefold() in UNLABELLED_FOLDERS and len(inner) > 1 and split in (None, "train"):
            yield Entry(path, None, "train")
        elif has_splits and split is None:
            ignored[f"images outside train, val and test ({parts[0]}/)"] += 1
        elif len(inner) < 2:
            ignored["images outside a class folder"] += 1
        else:
            yield Entry(path, inner[0], split)


def _parts(path: str, root: str) -> list[str]:
    """Of a path below the root. (pathlib would take longer for each than all the rest of the listing.)"""
    return path.removeprefix(root).lstrip("/").split("/")


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _from_table(fs: FileSystem, table: str, suffix: str) -> Iterator[Entry]:
    """Rows with `path` (absolute, or from the table's folder), `label` (empty: unlabelled) and maybe `split`."""
    try:
        text = fs.cat_file(table).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{table}: not UTF-8; save it as such") from None
    folder = str(PurePosixPath(table).parent)
    for number, row in _json_rows(table, text) if suffix == ".jsonl" else _csv_rows(table, text, suffix):
        if "path" not in row or "label" not in row:
            raise DataError(f"{table}: line {number} lacks a column; `path` and `label` are needed, `split` is welcome")
        if not row["path"]:
            raise DataError(f"{table}: line {number} has no path")
        path = str(row["path"])
        absolute = path if path.startswith("/") or "://" in path else f"{folder}/{path}"
        yield Entry(absolute, _label(row["label"]), _split(row.get("split"), f"{table}: line {number}"))


def _csv_rows(table: str, text: str, suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ",")
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise DataError(f"{table}: line {rows.line_num}: {error}") from None


def _json_rows(table: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise DataError(f"{table}: line {number} is not a JSON object")
            yield number, row


def _from_many(fs: FileSystem, path: str, split: str | None) -> Iterator[Entry]:
    """The rows of one file, in the split that it names for them or, where it names none, in the given one."""
    for row in list_rows(_address(fs, path)):
        yield Entry(path, row.label, _split(row.split, f"{path}: row {row.number}") or split, row.number)


def _holds_many(files: Collection[str]) -> bool:
    """Whether a folder's images lie in files of many: it has some, and no image of its own."""
    suffixes = set(map(_suffix, files))
    return not suffixes.isdisjoint(SUFFIXES) and suffixes.isdisjoint(EXTENSIONS)


def _address(fs: FileSystem, path: str) -> str:
    """With its protocol, which file systems drop from their paths."""
    return path if fs.is_local or "://" in path else str(fs.unstrip_protocol(path))


def _folder_of_many(fs: FileSystem, root: str, files: dict[str, Any], ignored: Counter[str]) -> Iterator[Entry]:
    """Files of many images, each in the split that its name begins with (`train-00000-of-00002.parquet`) or that its
    folder names; and whatever metadata lies beside them."""
    for path in sorted(files):
        parts, suffix = _parts(path, root), _suffix(path)
        if is_hidden(parts):
            ignored["hidden and system files"] += 1
        elif suffix not in SUFFIXES:
            ignored[f"files ending in {suffix or 'nothing'}"] += 1
        else:
            words = [re.split(r"[-_.]", parts[-1])[0], *reversed(parts[:-1])]
            named = [SPLIT_FOLDERS[word.casefold()] for word in words if word.casefold() in SPLIT_FOLDERS]
            yield from _from_many(fs, path, named[0] if named else None)


def _label(value: object) -> str | None:
    text = "" if value is None else str(value).strip()
    return text or None


def _split(value: object, where: str) -> str | None:
    text = "" if value is None else str(value).strip().casefold()
    if text and text not in SPLIT_FOLDERS:
        raise DataError(f"{where}: split {value!r} is none of train, val, test")
    return SPLIT_FOLDERS[text] if text else None


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts `2` before `10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _classes(config: Images, entries: list[Entry]) -> tuple[str, ...]:
    if config.classes is not None:
        fs, path = open_filesystem(config.classes)
        if not fs.isfile(path):
            raise DataError(f"images.classes={config.classes}: no such file")
        lines = [line.strip() for line in fs.cat_file(path).decode("utf-8-sig").splitlines() if line.strip()]
        if len(set(lines)) < len(lines):
            raise DataError(f"images.classes={config.classes}: a class is listed twice")
        return tuple(lines)
    names = {e.label for e in entries if e.label and e.split in (None, "train")}
    return tuple(sorted(names, key=lambda name: (natural(name), name)))  # `1` and `01` are equal to the first alone


def _fewer(entries: list[Entry], most: int, ignored: Counter[str]) -> list[Entry]:
    """The first of each class and split in an order that has nothing to do with how files are named or sorted."""
    ranked = sorted(entries, key=lambda e: sample_id(f"{PurePosixPath(e.path).name}/{e.row}".encode()))
    seen: Counter[tuple[str | None, str | None]] = Counter()
    kept = set()
    for entry in ranked:
        seen[entry.split, entry.label] += 1
        if seen[entry.split, entry.label] <= most:
            kept.add(entry)
    if len(kept) < len(entries):
        ignored["images beyond images.max_per_class"] += len(entries) - len(kept)
    return [entry for entry in entries if entry in kept]


def _check(config: Images, entries: list[Entry], classes: tuple[str, ...]) -> None:
    where = f"images.path={config.path}"
    if len(classes) < 2:
        found = f"only the class {classes[0]!r}" if classes else "no labelled class"
        raise DataError(
            f"{where}: {found} in the train split, and a classifier needs two; give a folder of class folders"
        )
    for held_out in ("val", "test"):
        if blank := sum(entry.split == held_out and not entry.label for entry in entries):
            raise DataError(
                f"{where}: {blank} {held_out} images have no label, so nothing can be measured on them; label them, or "
                "take them out (for a pool of unlabelled images leave their split empty)"
            )
    counts = Counter((entry.split, entry.label) for entry in entries if entry.label)
    for split, label in sorted(counts, key=str):
        if label not in classes:
            near = difflib.get_close_matches(label, classes, n=1)
            raise DataError(
                f"{where}: {counts[split, label]} {split or 'train'} images of class {label!r}, which is not in the "
                f"class list{f' (did you mean {near[0]!r}?)' if near else ''}; rename it or take the images out"
            )
    if lacking := [name for name in classes if not counts[None, name] + counts["train", name]]:
        raise DataError(f"{where}: no train image of {_some(lacking)}; add some or take the class off the list")
    if any(split == "val" for split, _ in counts) and not config.allow_missing_val:
        if lacking := [name for name in classes if not counts["val", name]]:
            raise DataError(
                f"{where}: no val image of {_some(lacking)}; add some, or set images.allow_missing_val=true to go on "
                "without measuring these classes"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more classes" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more


def _describe(ignored: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in ignored.most_common()) or "it is empty"


def _fingerprint(fs: FileSystem, folder: str, files: dict[str, Any], entries: list[Entry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(f"{entry.path.removeprefix(folder)}|{entry.label}|{entry.split}|{entry.row}\n".encode())
    for path in sorted({entry.path for entry in entries}):
        digest.update(f"{path.removeprefix(folder)}|{_version(fs, path, files)}\n".encode())
    return digest.hexdigest()


def _version(fs: FileSystem, path: str, files: dict[str, Any]) -> str:
    if fs.is_local:
        try:
            found = os.stat(path)  # of what a link points to
        except OSError:
            return "missing"
        return f"{found.st_size}|{found.st_ctime_ns}"
    info = files.get(path) or (fs.info(path) if fs.exists(path) else {})
    return "|".join(str(info.get(key)) for key in ("size", "ETag", "etag", "LastModified", "mtime", "created"))

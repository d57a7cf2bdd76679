"""The entries of one source: which of its files and rows are images, and the label and split of each.

A source is a folder of class folders, a table of paths, a file of many images, or a folder of such files. No image is
opened here.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydistill.data.sources import path_tables
from raydistill.data.sources.columns import Entries, Entry
from raydistill.data.sources.containers import EXTENSIONS, SUFFIXES, list_rows, saved_files
from raydistill.data.sources.folders import files_below
from raydistill.errors import DataError
from raydistill.escaping import quoted, shortened
from raydistill.storage.addresses import is_elsewhere
from raydistill.storage.filesystems import FileSystem, open_filesystem

SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
UNLABELLED_FOLDERS = ("unlabelled", "unlabeled")
SYSTEM_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_CACHE = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow")  # `datasets` keeps its cache beside its data
# Rows that a table of paths may always have, and further ones for each file that it names.
_ALWAYS_ROWS, _MOST_ROWS = 4096, 16
_SAVED = ("state.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")


@dataclass(frozen=True)
class Source:
    """The entries; the `folder` that their paths begin with; in a bucket all `files` below it with their facts from
    storage; and whether folders name the classes."""

    entries: Entries
    folder: str
    files: Mapping[str, Any]
    has_class_folders: bool = False


def read_source(fs: FileSystem, root: str, is_file: bool, ignored: Counter[str], notes: Counter[str]) -> Source | None:
    """None for a file that is not a source. `ignored` counts what is not an image, and `notes` what is not read as it
    looks. Raises DataError."""
    if is_file:
        if _suffix(root) in SUFFIXES:
            return Source(Entries.of(_of_file(fs, root, None, ignored, notes)), posixpath.dirname(root), {})
        if _suffix(root) in path_tables.SUFFIXES:
            entries = Entries.of(_of_table(fs, root, notes))
            _refuse_repeats(entries, quoted(root))
            return Source(entries, posixpath.dirname(root), {})
        return None
    facts: Mapping[str, Any] = {} if fs.is_local else fs.find(root, detail=True)
    files: Collection[str] = files_below(root, ignored) if fs.is_local else facts
    if _holds_files_of_many(root, files):
        return Source(Entries.of(_of_folder_of_files(fs, root, files, ignored, notes)), root, facts)
    return Source(Entries.of(_of_class_folders(root, files, ignored, notes)), root, facts, has_class_folders=True)


def first_of_table(path: str) -> str | None:
    """The path of the first image of a table of paths; None if it is not a table, or the image is elsewhere. Raises
    DataError."""
    fs, table = open_filesystem(path)
    if _suffix(table) not in path_tables.SUFFIXES or not fs.isfile(table):
        return None
    first = next((address_of(fs, entry.path) for entry in _of_table(fs, table, Counter())), None)
    return None if first is None or is_elsewhere(first, path) else first


def address_of(fs: FileSystem, path: str) -> str:
    """With its protocol, which file systems drop from their paths."""
    return path if fs.is_local or "://" in path else str(fs.unstrip_protocol(path))


def is_hidden(parts: Sequence[str]) -> bool:
    """Whether a path below the source is a file that systems and programs keep beside people's files."""
    return any(part.startswith(".") or part.casefold() in SYSTEM_NAMES for part in parts)


def _of_class_folders(root: str, files: Collection[str], ignored: Counter[str], notes: Counter[str]) -> Iterator[Entry]:
    """`[SPLIT/]CLASS/**/image`, `unlabelled/**/image`, `train/unlabelled/**/image`."""
    read, unread = set[str](), defaultdict[str, Counter[str]](Counter)
    tops = {_parts(path, root)[0].strip().casefold() for path in files}
    # Only with a train folder are the others splits: a class may be called "test".
    has_splits = any(SPLIT_FOLDERS.get(top) == "train" for top in tops)
    for path in sorted(files):
        parts, suffix = _parts(path, root), _suffix(path)
        if is_hidden(parts):
            ignored["hidden and system files"] += 1
            continue
        split = SPLIT_FOLDERS.get(parts[0].strip().casefold()) if has_splits else None
        inner = parts[1:] if split else parts
        if suffix not in EXTENSIONS:
            ignored[f"files ending in {_ending(suffix)}"] += 1
            if len(inner) > 1:
                unread[inner[0]][suffix] += 1
        elif inner[0].strip().casefold() in UNLABELLED_FOLDERS and len(inner) > 1 and split in (None, "train"):
            yield Entry(path, None, "train")
        elif has_splits and split is None:
            ignored[f"images outside train, val and test ({quoted(parts[0])}/)"] += 1
        elif len(inner) < 2:
            ignored["images outside a class folder"] += 1
        else:
            read.add(inner[0])
            yield Entry(path, inner[0], split)
    for name in sorted(unread.keys() - read):
        endings = ", ".join(f"{count} ending in {_ending(suffix)}" for suffix, count in unread[name].most_common(3))
        what = (
            f"files of {quoted(name)!r}, which is not a class, as none can be read: {endings}; convert or rename them"
        )
        notes[what] = unread[name].total()


def _of_table(fs: FileSystem, table: str, notes: Counter[str]) -> Iterator[Entry]:
    """Rows with `path` (absolute, or from the table's folder), `label` (empty: unlabelled) and maybe `split`."""
    folder = posixpath.dirname(table)
    for row in path_tables.read_path_table(fs, table, notes):
        path = row.path if row.path.startswith("/") or "://" in row.path else f"{folder}/{row.path}"
        if "\\" in path and "://" not in path and not fs.exists(path) and fs.exists(path.replace("\\", "/")):
            path = path.replace("\\", "/")
            notes["paths with \\, read with /"] += 1
        yield Entry(path, row.label, _split(row.split, row.where))


def _refuse_repeats(entries: Entries, shown: str) -> None:
    """Each row is decoded, so a few files that are named very often would take minutes."""
    files = len(set(map(posixpath.normpath, entries.distinct_paths())))
    if len(entries) > _ALWAYS_ROWS + _MOST_ROWS * files:
        raise DataError(f"{shown}: {len(entries):,} rows name {files:,} files; name each file once")


def _of_file(
    fs: FileSystem, path: str, split: str | None, ignored: Counter[str], notes: Counter[str]
) -> Iterator[Entry]:
    """The rows of one file, in the split that it names for them or else in the given one."""
    for row in list_rows(address_of(fs, path), ignored, notes):
        yield Entry(path, row.label, _split(row.split, f"{quoted(path)}: row {row.number}") or split, row.number)


def _holds_files_of_many(root: str, files: Collection[str]) -> bool:
    """Whether a folder's images are in files of many images. It has some such files; and either its pictures do not
    make two classes, or `datasets` has numbered or described the files, and the pictures are there to be looked at."""
    seen = [path for path in files if not is_hidden(_parts(path, root))]
    many = [path for path in seen if _suffix(path) in SUFFIXES]
    if not many:
        return False
    if any(_SHARD.search(path) for path in many) or any(posixpath.basename(path) in _SAVED for path in seen):
        return True
    pictures = [path for path in seen if _suffix(path) in EXTENSIONS]
    return len({entry.label for entry in _of_class_folders(root, pictures, Counter(), Counter()) if entry.label}) < 2


def _of_folder_of_files(
    fs: FileSystem, root: str, files: Collection[str], ignored: Counter[str], notes: Counter[str]
) -> Iterator[Entry]:
    """Files of many images, each in the split at the beginning of its name (`train-00000-of-00002.parquet`) or in its
    folder's name. For a folder that `datasets` saved, the files that its state.json names."""
    saved = {folder: saved_files(fs, folder) for folder in {posixpath.dirname(path) for path in files}}
    for path in sorted(files):
        parts, suffix = _parts(path, root), _suffix(path)
        state = saved[posixpath.dirname(path)]
        if is_hidden(parts):
            ignored["hidden and system files"] += 1
        elif suffix in EXTENSIONS:
            ignored["pictures beside files of many images"] += 1
        elif suffix not in SUFFIXES:
            ignored[f"files ending in {_ending(suffix)}"] += 1
        elif suffix == ".arrow" and (_CACHE.fullmatch(parts[-1]) or (state and parts[-1] not in state[0])):
            ignored["files that `datasets` keeps beside its data (cache-….arrow)"] += 1
        else:
            words = [re.split(r"[-_.]", parts[-1])[0], *reversed(parts[:-1]), (state and state[1]) or ""]
            named = [SPLIT_FOLDERS[word.casefold()] for word in words if word.casefold() in SPLIT_FOLDERS]
            yield from _of_file(fs, path, named[0] if named else None, ignored, notes)


def _split(value: object, where: str) -> str | None:
    text = "" if value is None else str(value).strip().casefold()
    if text and text not in SPLIT_FOLDERS:
        raise DataError(f"{where}: split {shortened(repr(value))} is none of train, val, test")
    return SPLIT_FOLDERS.get(text)


def _parts(path: str, root: str) -> list[str]:
    """For a path below the root. pathlib would take longer for it than the rest of the listing."""
    return path.removeprefix(root).lstrip("/").split("/")


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _ending(suffix: str) -> str:
    return quoted(suffix) or "nothing"

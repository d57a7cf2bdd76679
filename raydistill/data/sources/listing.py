"""Readers: from a folder, a table of paths, or a parquet file to one list of entries, without opening an image.

Everything that can be wrong with names, labels and counts is found here, before any work starts.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from raydistill.config import Images
from raydistill.data.labels import one_spelling, refuse_many_classes, whole_numbers
from raydistill.data.sample import sample_id
from raydistill.data.sources import path_tables
from raydistill.data.sources.containers import EXTENSIONS, MOST_BESIDE, SUFFIXES, list_rows, saved_files
from raydistill.data.sources.folders import files_below
from raydistill.errors import ConfigError, DataError
from raydistill.examples import images_path
from raydistill.storage.addresses import is_elsewhere
from raydistill.storage.filesystems import FileSystem, open_filesystem, refuse_unreachable
from raydistill.strangers import written

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
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_CACHE = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow")  # what `datasets` keeps of its work beside its data
_SAVED = ("state.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")
SYSTEM_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One image as its source names it. `row` is its row in a parquet file; label and split are None if not given."""

    path: str
    label: str | None
    split: str | None
    row: int | None = None


def entry_name(entry: Entry) -> str:
    """As people find it."""
    return written(entry.path) if entry.row is None else f"{written(entry.path)} row {entry.row}"


@dataclass(frozen=True)
class Listing:
    """All entries of a source, how many other files it holds by reason, what was read otherwise than it may seem, and a
    fingerprint that changes with any file.

    The fingerprint covers names, sizes and times of change (which cannot be set back, unlike times of modification),
    not the folder's own place, so a moved folder stays the same set.
    """

    entries: tuple[Entry, ...]
    classes: tuple[str, ...]
    ignored: dict[str, int]
    fingerprint: str
    notes: dict[str, int] = field(default_factory=dict)

    def has_split(self, split: str) -> bool:
        return any(entry.split == split for entry in self.entries)


def list_images(config: Images) -> Listing:
    """Raises DataError: no images, one class, a class that a split lacks, a table without the columns it needs; and
    ConfigError where nothing answers at the path."""
    path, named = config.path, f"images.path={written(config.path)}"
    if path.startswith("example:"):
        path = str(images_path(path.removeprefix("example:")))
    try:
        fs, root = open_filesystem(path)
    except ConfigError as error:
        raise DataError(f"images.path={error}") from None
    refuse_unreachable(path, "images.path")
    if not fs.exists(root):
        raise DataError(f"{named}: there is nothing at this path")
    ignored, notes = Counter[str](), Counter[str]()
    is_folder = not fs.isfile(root)
    files = _find(fs, root, ignored) if is_folder else {}
    suffix = _suffix(root)
    by_folder = is_folder and not _holds_many(root, files)
    if is_folder and not by_folder:
        entries = list(_folder_of_many(fs, root, files, ignored, notes))
    elif by_folder:
        entries = list(_from_folder(root, files, ignored, notes))
    elif suffix in SUFFIXES:
        entries = list(_from_many(fs, root, None, ignored, notes))
    elif suffix in path_tables.SUFFIXES:
        entries = list(_from_table(fs, root, notes))
    else:
        raise DataError(
            f"{named}: use a folder, or a .csv, .tsv, .jsonl, .parquet, .arrow, .feather or .tar file; unpack what is "
            "compressed"
        )
    if not entries:
        raise DataError(f"{named}: no images found ({_describe(ignored)})")
    refuse_many_classes(len(set(_labels(entries))), named)
    listed = _listed_classes(config)
    entries = _with_labels(entries, {} if by_folder else whole_numbers(_labels(entries), listed, notes))
    spelt = one_spelling(_labels(entries), listed, notes)
    entries = _with_labels(entries, spelt)
    classes = _classes(entries) if listed is None else tuple(spelt[name] for name in listed)
    _check(config, entries, classes, ignored + notes)
    if config.max_per_class is not None:
        entries = _fewer(entries, config.max_per_class, ignored)
    fingerprint = _fingerprint(fs, root if is_folder else posixpath.dirname(root), files, entries, path)
    if not fs.is_local:  # which drops the protocol from its paths
        entries = [replace(e, path=_address(fs, e.path)) for e in entries]
    return Listing(tuple(entries), classes, dict(ignored), fingerprint, dict(notes))


def _labels(entries: Sequence[Entry]) -> list[str]:
    return [entry.label for entry in entries if entry.label]


def _with_labels(entries: list[Entry], names: Mapping[str, str]) -> list[Entry]:
    return [
        replace(entry, label=names[entry.label]) if entry.label and names.get(entry.label, entry.label) != entry.label
        else entry for entry in entries
    ]  # fmt: skip


def first_of_table(path: str) -> str | None:
    """Where the first image of a table of paths lies; None of what is no table. Raises DataError as `list_images`."""
    fs, table = open_filesystem(path)
    suffix = _suffix(table)
    if suffix not in path_tables.SUFFIXES or not fs.isfile(table):
        return None
    first = next((_address(fs, entry.path) for entry in _from_table(fs, table, Counter())), None)
    return None if first is None or is_elsewhere(first, path) else first


def is_hidden(parts: Sequence[str]) -> bool:
    """Whether a path below the source is one of those that systems and programs keep beside people's files."""
    return any(part.startswith(".") or part.casefold() in SYSTEM_NAMES for part in parts)


def _find(fs: FileSystem, root: str, ignored: Counter[str]) -> dict[str, Any]:
    """Every file below a folder, on this machine through links to folders as well (`files_below`)."""
    if not fs.is_local:
        return dict(fs.find(root, detail=True))
    return {path: {} for path in files_below(root, ignored)}


def _from_folder(root: str, files: Collection[str], ignored: Counter[str], notes: Counter[str]) -> Iterator[Entry]:
    """`[SPLIT/]CLASS/**/image`, `unlabelled/**/image`, `train/unlabelled/**/image`."""
    read, unread = set[str](), defaultdict[str, Counter[str]](Counter)
    tops = {_parts(path, root)[0].strip().casefold() for path in files}
    # Split folders count as such only if a train folder is among them: a class may be called "test".
    has_splits = any(SPLIT_FOLDERS.get(top) == "train" for top in tops)
    for path in sorted(files):
        parts, suffix = _parts(path, root), _suffix(path)
        if is_hidden(parts):
            ignored["hidden and system files"] += 1
            continue
        split = SPLIT_FOLDERS.get(parts[0].strip().casefold()) if has_splits else None
        inner = parts[1:] if split else parts
        if suffix not in EXTENSIONS:
            ignored[f"files ending in {written(suffix) or 'nothing'}"] += 1
            if len(inner) > 1:
                unread[inner[0]][suffix] += 1
            continue
        if inner[0].strip().casefold() in UNLABELLED_FOLDERS and len(inner) > 1 and split in (None, "train"):
            yield Entry(path, None, "train")
        elif has_splits and split is None:
            ignored[f"images outside train, val and test ({written(parts[0])}/)"] += 1
        elif len(inner) < 2:
            ignored["images outside a class folder"] += 1
        else:
            read.add(inner[0])
            yield Entry(path, inner[0], split)
    for name in sorted(unread.keys() - read):
        endings = ", ".join(
            f"{n} ending in {written(suffix) or 'nothing'}" for suffix, n in unread[name].most_common(3)
        )
        notes[
            f"files of {written(name)!r}, which is no class, since none is read: {endings}; convert or rename them"
        ] = unread[name].total()


def _parts(path: str, root: str) -> list[str]:
    """Of a path below the root. (pathlib would take longer for each than all the rest of the listing.)"""
    return path.removeprefix(root).lstrip("/").split("/")


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _from_table(fs: FileSystem, table: str, notes: Counter[str]) -> Iterator[Entry]:
    """Rows with `path` (absolute, or from the table's folder), `label` (empty: unlabelled) and maybe `split`."""
    folder = posixpath.dirname(table)
    for row in path_tables.read_path_table(fs, table, notes):
        path = row.path if row.path.startswith("/") or "://" in row.path else f"{folder}/{row.path}"
        if "\\" in path and "://" not in path and not fs.exists(path) and fs.exists(path.replace("\\", "/")):
            path = path.replace("\\", "/")
            notes["paths with \\, read with /"] += 1
        yield Entry(path, row.label, _split(row.split, row.where))


def _from_many(
    fs: FileSystem, path: str, split: str | None, ignored: Counter[str], notes: Counter[str]
) -> Iterator[Entry]:
    """The rows of one file, in the split that it names for them or, where it names none, in the given one."""
    for row in list_rows(_address(fs, path), ignored, notes):
        yield Entry(path, row.label, _split(row.split, f"{written(path)}: row {row.number}") or split, row.number)


def _holds_many(root: str, files: Collection[str]) -> bool:
    """Whether a folder's images lie in files of many: it has some, and pictures of its own make no two classes, or
    these files are numbered or described as `datasets` does it, and the pictures are there to be looked at."""
    seen = [path for path in files if not is_hidden(_parts(path, root))]
    many = [path for path in seen if _suffix(path) in SUFFIXES]
    if not many:
        return False
    if any(_SHARD.search(path) for path in many) or any(posixpath.basename(path) in _SAVED for path in seen):
        return True
    entries = _from_folder(root, [path for path in seen if _suffix(path) in EXTENSIONS], Counter(), Counter())
    return len({entry.label for entry in entries if entry.label}) < 2


def _address(fs: FileSystem, path: str) -> str:
    """With its protocol, which file systems drop from their paths."""
    return path if fs.is_local or "://" in path else str(fs.unstrip_protocol(path))


def _folder_of_many(
    fs: FileSystem, root: str, files: Collection[str], ignored: Counter[str], notes: Counter[str]
) -> Iterator[Entry]:
    """Files of many images, each in the split that its name begins with (`train-00000-of-00002.parquet`) or that its
    folder names; and whatever lies beside them. Of a folder that `datasets` saved, what its state.json names."""
    saved = {folder: saved_files(fs, folder) for folder in {posixpath.dirname(path) for path in files}}
    for path in sorted(files):
        parts, suffix = _parts(path, root), _suffix(path)
        state = saved[posixpath.dirname(path)]
        if is_hidden(parts):
            ignored["hidden and system files"] += 1
        elif suffix in EXTENSIONS:
            ignored["pictures beside files of many images"] += 1
        elif suffix not in SUFFIXES:
            ignored[f"files ending in {written(suffix) or 'nothing'}"] += 1
        elif suffix == ".arrow" and (_CACHE.fullmatch(parts[-1]) or (state and parts[-1] not in state[0])):
            ignored["files that `datasets` keeps beside its data (cache-….arrow)"] += 1
        else:
            words = [re.split(r"[-_.]", parts[-1])[0], *reversed(parts[:-1]), (state and state[1]) or ""]
            named = [SPLIT_FOLDERS[word.casefold()] for word in words if word.casefold() in SPLIT_FOLDERS]
            yield from _from_many(fs, path, named[0] if named else None, ignored, notes)


def _split(value: object, where: str) -> str | None:
    text = "" if value is None else str(value).strip().casefold()
    if text and text not in SPLIT_FOLDERS:
        raise DataError(f"{where}: split {value!r} is none of train, val, test")
    return SPLIT_FOLDERS[text] if text else None


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts `2` before `10`."""
    return [_number(part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _number(digits: str) -> tuple[int, str]:
    """Sorts as the number does, of which Python makes none where it is too long."""
    plain = "".join(str(unicodedata.decimal(digit)) for digit in digits).lstrip("0")
    return len(plain), plain


def _listed_classes(config: Images) -> list[str] | None:
    if config.classes is None:
        return None
    fs, path = open_filesystem(config.classes)
    named = f"images.classes={written(config.classes)}"
    if not fs.isfile(path):
        raise DataError(f"{named}: {'it is no regular file' if fs.exists(path) else 'no such file'}")
    try:
        text = fs.read_at_most(path, MOST_BESIDE).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{named}: not UTF-8; save it as such") from None
    except OSError as error:
        raise DataError(f"{named}: cannot be read: {error.strerror}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    refuse_many_classes(len(lines), named)
    if len(set(one_spelling(lines, lines, Counter()).values())) < len(lines):
        raise DataError(f"{named}: a class is listed twice")
    return lines


def _classes(entries: list[Entry]) -> tuple[str, ...]:
    names = {e.label for e in entries if e.label and e.split in (None, "train")}
    return tuple(sorted(names, key=lambda name: (natural(name), name)))  # `1` and `01` are equal to the first alone


def _fewer(entries: list[Entry], most: int, ignored: Counter[str]) -> list[Entry]:
    """The first of each class and split in an order that has nothing to do with how files are named or sorted."""
    ranked = sorted(entries, key=lambda e: sample_id(_bytes_of(f"{PurePosixPath(e.path).name}/{e.row}")))
    seen: Counter[tuple[str | None, str | None]] = Counter()
    kept = set()
    for entry in ranked:
        seen[entry.split, entry.label] += 1
        if seen[entry.split, entry.label] <= most:
            kept.add(entry)
    if len(kept) < len(entries):
        ignored["images beyond images.max_per_class"] += len(entries) - len(kept)
    return [entry for entry in entries if entry in kept]


def _check(config: Images, entries: list[Entry], classes: tuple[str, ...], besides: Counter[str]) -> None:
    where = f"images.path={written(config.path)}"
    if len(classes) < 2:
        found = f"only the class {classes[0]!r}" if classes else "no labelled class"
        rest = f" (besides {_describe(besides)})" if besides else ""
        raise DataError(
            f"{where}: {found} in the train split{rest}, and a classifier needs two; give a folder of class folders"
        )
    for held_out in ("val", "test"):
        if blank := sum(entry.split == held_out and not entry.label for entry in entries):
            raise DataError(
                f"{where}: {blank} {held_out} images have no label, so nothing can be measured on them; label them, or "
                "take them out (for a pool of unlabelled images leave their split empty)"
            )
    counts = Counter((entry.split, entry.label) for entry in entries if entry.label)
    known = set(classes)
    for split, label in sorted(counts, key=str):
        if label not in known:
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


def _fingerprint(fs: FileSystem, folder: str, files: dict[str, Any], entries: list[Entry], source: str) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(_bytes_of(f"{entry.path.removeprefix(folder)}|{entry.label}|{entry.split}|{entry.row}\n"))
    for path in sorted({entry.path for entry in entries}):
        version = "missing" if is_elsewhere(path, source) else _version(fs, path, files)
        digest.update(_bytes_of(f"{path.removeprefix(folder)}|{version}\n"))
    return digest.hexdigest()


def _bytes_of(name: str) -> bytes:
    """Also of one that is no text."""
    return name.encode(errors="surrogatepass")


def _version(fs: FileSystem, path: str, files: dict[str, Any]) -> str:
    if fs.is_local:
        try:
            found = os.stat(path)  # of what a link points to
        except (OSError, ValueError):  # the latter of half a character, which no name holds
            return "missing"
        return f"{found.st_size}|{found.st_ctime_ns}"
    info = files.get(path) or (fs.info(path) if fs.exists(path) else {})
    return "|".join(str(info.get(key)) for key in ("size", "ETag", "etag", "LastModified", "mtime", "created"))

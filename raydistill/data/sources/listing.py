"""Lists the images of a source, with their classes and splits. It finds every problem with names, labels and counts
before any work starts."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from raydistill.config import Images
from raydistill.data.labels import MOST_BYTES, one_spelling, refuse_many_classes, whole_numbers
from raydistill.data.sample import sample_id
from raydistill.data.sources.columns import Entries, bytes_of
from raydistill.data.sources.containers import EXTENSIONS, MOST_BESIDE
from raydistill.data.sources.entries import Source, address_of, read_source
from raydistill.errors import ConfigError, DataError, near_path
from raydistill.escaping import counted, first_few, most_common, quoted
from raydistill.examples import images_path
from raydistill.storage.addresses import is_elsewhere
from raydistill.storage.filesystems import FileSystem, open_filesystem
from raydistill.storage.reachable import refuse_unreachable


@dataclass(frozen=True)
class Listing:
    """All entries of a source, whose labels are numbered as the classes. `ignored` counts its other files by reason,
    `notes` what is not read as it looks.

    The fingerprint changes with any file. It covers names, sizes and times of change (unlike times of modification,
    nobody can set these back), but not the folder's own path: a folder that moves stays the same data set.
    """

    entries: Entries
    classes: tuple[str, ...]
    ignored: dict[str, int]
    fingerprint: str
    notes: dict[str, int] = field(default_factory=dict)

    def has_split(self, split: str) -> bool:
        return bool(self.entries.in_split(split).any())


def list_images(config: Images) -> Listing:
    """Raises DataError: no images, one class, a class without images in a split, or a table without the columns it
    needs. Raises ConfigError if nothing is at the path."""
    path, named = config.path, f"images.path={quoted(config.path)}"
    if path.startswith("example:"):
        path = str(images_path(path.removeprefix("example:")))
    try:
        fs, root = open_filesystem(path)
    except ConfigError as error:
        raise DataError(f"images.path={error}") from None
    is_file = fs.isfile(root) if fs.is_local else refuse_unreachable(path, "images.path")
    ignored, notes = Counter[str](), Counter[str]()
    is_there = is_file or not fs.is_local or fs.exists(root)
    source = read_source(fs, root, is_file, ignored, notes) if is_there else None
    if not is_there or (source is not None and not (is_file or fs.is_local or source.files)):
        raise DataError(f"{named}: no such file or folder{near_path(path)}")  # a bucket has no empty folders
    if source is None:
        if PurePosixPath(root).suffix.lower() in EXTENSIONS:
            raise DataError(f"{named}: one picture; give the folder of class folders that it is in")
        raise DataError(
            f"{named}: use a folder, or a .csv, .tsv, .jsonl, .parquet, .arrow, .feather or .tar file; unpack what is "
            "compressed"
        )
    entries = source.entries
    if not entries:
        raise DataError(
            f"{named}: no images found ({_describe(ignored)}); put them into a folder for each class, or give a "
            "table of their paths and labels"
        )
    refuse_many_classes(len(entries.labels), named)
    listed = _listed_classes(config)
    if not source.has_class_folders:
        entries = entries.relabelled(whole_numbers(entries.label_counts(), listed, notes))
    spelt = one_spelling(entries.label_counts(), listed, notes)
    entries = entries.relabelled(spelt)
    classes = _classes(entries) if listed is None else tuple(spelt[name] for name in listed)
    _check(config, entries, classes, ignored + notes)
    if config.max_per_class is not None:
        entries = _fewer(entries, config.max_per_class, ignored)
    fingerprint = _fingerprint(fs, source, entries, path)
    if not fs.is_local:
        entries = entries.renamed(partial(address_of, fs))
    entries = entries.relabelled({}, classes)
    return Listing(entries, classes, most_common(ignored), fingerprint, most_common(notes))


def natural(name: str) -> tuple[bool, str]:
    """Sorts `2` before `10`. Each number is preceded by its length, after a character that sorts before all others."""
    text = name.replace("\0", "\0\U0010ffff")  # the character itself sorts after any number
    return name[:1].isdecimal(), re.sub(r"\d+", lambda run: _number(run[0]), text)


def _number(digits: str) -> str:
    """Sorts like the number. Python refuses to convert very many digits."""
    if not digits.isascii():
        digits = "".join(str(unicodedata.decimal(digit)) for digit in digits)
    digits = digits.lstrip("0")
    return f"\0{len(digits):c}{digits}"


def _listed_classes(config: Images) -> list[str] | None:
    if config.classes is None:
        return None
    fs, path = open_filesystem(config.classes)
    named = f"images.classes={quoted(config.classes)}"
    if not fs.isfile(path):
        raise DataError(
            f"{named}: {'not a regular' if fs.exists(path) else 'no such'} file; it holds a class name a line"
            f"{near_path(config.classes)}"
        )
    try:
        text = fs.read_at_most(path, MOST_BESIDE).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{named}: not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{named}: cannot be read: {error.strerror}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    refuse_many_classes(len(lines), named)
    if (longest := max(map(len, lines), default=0)) > MOST_BYTES:
        raise DataError(f"{named}: a line of {longest:,} characters, too many for a class; write one on each line")
    if len(set(one_spelling(Counter(lines), lines, Counter()).values())) < len(lines):
        raise DataError(f"{named}: a class is listed twice")
    return lines


def _classes(entries: Entries) -> tuple[str, ...]:
    names = entries[entries.in_split(None, "train")].label_counts()
    return tuple(sorted(names, key=lambda name: (natural(name), name)))  # `1` and `01` are equal only to the first rule


def _fewer(entries: Entries, most: int, ignored: Counter[str]) -> Entries:
    """The first of each class and split, in an order that does not follow the file names."""
    names = (f"{PurePosixPath(e.path).name}/{e.row}" for e in entries)
    rank_N = np.fromiter((sample_id(bytes_of(name)).encode() for name in names), "S32", len(entries))
    columns = (entries.path_N, entries.row_N, entries.label_N, entries.split_N)
    _, same_N = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)  # a table may name a file twice
    order = np.lexsort((rank_N, entries.label_N, entries.split_N))
    pool_N = np.stack([entries.split_N, entries.label_N], axis=1)[order]
    starts = np.flatnonzero(np.r_[True, (pool_N[1:] != pool_N[:-1]).any(axis=1)])
    place_N = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    kept = np.isin(same_N, same_N[order[place_N < most]])
    if not kept.all():
        ignored["images beyond images.max_per_class"] += int((~kept).sum())
    return entries[kept]


def _check(config: Images, entries: Entries, classes: tuple[str, ...], besides: Counter[str]) -> None:
    where = f"images.path={quoted(config.path)}"
    if len(classes) < 2:
        found = f"only the class {classes[0]!r}" if classes else "no labelled class"
        rest = f" (besides {_describe(besides)})" if besides else ""
        add = "add a second" if classes else "give a folder of class folders, or a table with labels"
        raise DataError(f"{where}: {found} in the train split{rest}, and a classifier needs two; {add}")
    counts = entries.counts()
    for held_out in ("val", "test"):
        if blank := counts.pop((held_out, None), 0):
            raise DataError(
                f"{where}: {blank} {held_out} images have no label, so nothing can be measured on them; label them, or "
                "remove them (for a pool of unlabelled images leave their split empty)"
            )
    known = {None, *classes}
    for split, label in sorted(counts, key=str):
        if label is not None and label not in known:
            near = difflib.get_close_matches(label, classes, n=1)
            raise DataError(
                f"{where}: {counts[split, label]} {split or 'train'} images of class {label!r}, which is not in the "
                f"class list{f' (did you mean {near[0]!r}?)' if near else ''}; rename it or remove the images"
            )
    if lacking := [name for name in classes if not counts[None, name] + counts["train", name]]:
        raise DataError(f"{where}: no train image of {first_few(lacking)}; add some, or remove the class from the list")
    if any(split == "val" for split, _ in counts) and not config.allow_missing_val:
        if lacking := [name for name in classes if not counts["val", name]]:
            raise DataError(
                f"{where}: no val image of {first_few(lacking)}; add some, or set images.allow_missing_val=true to "
                "go on without measuring these classes"
            )


def _describe(ignored: Counter[str]) -> str:
    return (
        ", ".join(counted(count, what) for what, count in Counter(most_common(ignored, 10)).most_common())
        or "it is empty"
    )


def _fingerprint(fs: FileSystem, source: Source, entries: Entries, address: str) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        name = entry.path.removeprefix(source.folder)
        digest.update(bytes_of(f"{name}|{entry.label}|{entry.split}|{entry.row}\n"))
    listed = _listed_beside(fs, entries, address, source.files)
    for path in entries.distinct_paths():
        version = "missing" if is_elsewhere(path, address) else _version(fs, path, listed)
        digest.update(bytes_of(f"{path.removeprefix(source.folder)}|{version}\n"))
    return digest.hexdigest()


def _listed_beside(fs: FileSystem, entries: Entries, address: str, files: Mapping[str, Any]) -> Mapping[str, Any]:
    """The facts of files that changes show in, by path: those of `files`, and in buckets those of folders of which
    a table names several files. A listing takes a request for each thousand files, where each file would take one."""
    if not fs.has_buckets:
        return files
    named = (path for path in entries.distinct_paths() if path not in files and not is_elsewhere(path, address))
    found = dict(files)
    for folder in (folder for folder, count in Counter(map(posixpath.dirname, named)).items() if count > 1):
        with contextlib.suppress(FileNotFoundError):
            found |= {info["name"]: info for info in fs.ls(folder, detail=True)}
    return found


def _version(fs: FileSystem, path: str, files: Mapping[str, Any]) -> str:
    if fs.is_local:
        try:
            found = os.stat(path)  # of what a link points to
        except (OSError, ValueError):  # ValueError: half a character, which no name has
            return "missing"
        return f"{found.st_size}|{found.st_ctime_ns}"
    info = files.get(path) or (fs.info(path) if fs.exists(path) else {})
    return "|".join(str(info.get(key)) for key in ("size", "ETag", "etag", "LastModified", "mtime", "created"))

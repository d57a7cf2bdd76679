"""The one walk over a folder of this machine: what lies below it, for every command that reads folders."""

from __future__ import annotations

import os
import posixpath
from collections import Counter, deque
from typing import NoReturn

from raydistill.errors import DataError
from raydistill.strangers import written

_NAMED = 5


def files_below(root: str, ignored: Counter[str]) -> list[str]:
    """Paths of all files, sorted. Each folder is read once, by its real path, at its own place before those of links
    to it; links that lead back or to what is read elsewhere are named in `ignored`.

    Raises DataError where a folder cannot be listed.
    """
    files, links, again = list[str](), list[str](), list[str]()
    waiting, read = deque([root]), dict[str, str]()
    while waiting or links:
        folder = waiting.popleft() if waiting else links.pop(0)
        real = os.path.realpath(folder)
        above = os.path.realpath(posixpath.dirname(folder))
        if real in read or (folder != root and f"{above}{os.sep}".startswith(f"{real.rstrip(os.sep)}{os.sep}")):
            again.append(f"{_below(folder, root)} is {_below(read.get(real, real), root)}")
            continue
        read[real] = folder
        here = _listed(folder)
        if not here and "/." not in folder.removeprefix(root):
            ignored["empty folders"] += 1
        for entry in here:
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                (links if entry.is_symlink() else waiting).append(posixpath.join(folder, entry.name))
            else:  # pipes, devices and links that lead nowhere too, which are refused when they are read
                files.append(posixpath.join(folder, entry.name))
        if not waiting:
            links.sort()
    if again:
        some = ", ".join(sorted(again)[:_NAMED])
        ignored[f"links to folders that are read elsewhere ({some}{' …' if len(again) > _NAMED else ''})"] = len(again)
    return sorted(files)


def _listed(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        _refuse_unreadable(error)


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise DataError(f"{written(str(error.filename))}: cannot be listed ({error.strerror})") from None


def _below(path: str, root: str) -> str:
    """As people find it: from the root, or whole where it lies elsewhere."""
    inside = path.removeprefix(root)
    return written(path if inside == path else inside.lstrip("/") or ".")

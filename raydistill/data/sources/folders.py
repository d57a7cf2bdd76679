"""Lists all files below a folder of this machine, for every command that reads folders."""

from __future__ import annotations

import errno
import heapq
import os
import posixpath
from collections import Counter, deque

from raydistill.errors import DataError
from raydistill.escaping import quoted, shortened

_NAMED, _LONGEST = 5, 400  # links that a message names; characters of a path in it
_VANISHED = {errno.ENOENT, errno.ENOTDIR, errno.ESRCH}


def files_below(root: str, ignored: Counter[str]) -> list[str]:
    """Paths of all files, sorted. Each real folder is read once, at its own path rather than through a link. `ignored`
    names links that lead back, or to a folder that is read elsewhere. Raises DataError if a folder cannot be listed."""
    files, links, again = list[str](), list[tuple[str, str]](), list[str]()
    waiting, read = deque([(root, os.path.realpath(root))]), dict[str, str]()
    while waiting or links:
        folder, real = waiting.popleft() if waiting else heapq.heappop(links)
        if real in read:
            again.append(f"{_below(folder, root)} is {_below(read[real], root)}")
            continue
        read[real] = folder
        here = _listed(folder, root, ignored)
        if not here and "/." not in folder.removeprefix(root):
            ignored["empty folders"] += 1
        for entry in here:
            path = posixpath.join(folder, entry.name)
            if not (os.path.isdir(path) if entry.is_symlink() else entry.is_dir()):
                files.append(path)  # also pipes, devices and broken links, which are refused when they are read
            elif not entry.is_symlink():  # `realpath` would ask the system for all folders above it again
                waiting.append((path, posixpath.join(real, entry.name)))
            elif f"{real}{os.sep}".startswith(f"{(target := os.path.realpath(path)).rstrip(os.sep)}{os.sep}"):
                again.append(f"{_below(path, root)} is {_below(read.get(target, target), root)}")
            else:
                heapq.heappush(links, (path, target))
    if again:
        some = ", ".join(sorted(again)[:_NAMED])
        ignored[f"links to folders that are read elsewhere ({some}{' …' if len(again) > _NAMED else ''})"] = len(again)
    return sorted(files)


def _listed(folder: str, root: str, ignored: Counter[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        if folder != root and error.errno in _VANISHED:
            ignored["folders that vanished while they were listed"] += 1
            return []
        if os.path.exists(root) and not os.path.isdir(root):
            raise DataError(f"{quoted(root)}: neither a folder nor a regular file") from None
        shown = shortened(quoted(str(error.filename)), _LONGEST)
        raise DataError(f"{shown}: cannot be listed ({error.strerror})") from None


def _below(path: str, root: str) -> str:
    """A path in messages: from the root, or whole if it is elsewhere."""
    inside = path.removeprefix(root)
    return quoted(path if inside == path else inside.lstrip("/") or ".")

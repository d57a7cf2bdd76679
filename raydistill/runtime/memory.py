"""The memory that this process may use: the machine's, or less if a cgroup sets a limit, as in a container."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from raydistill.runtime.cgroups import cgroups

# Ray's objects are shards in transit; a sort of all images spills the rest to disk.
_STORE_SHARE, _LEAST_STORE, _MOST_STORE = 0.1, 512 * 1024**2, 8 * 1024**3
# For cgroup v2 and v1: the files of a limit and of the memory in use, and the field of memory in use that may be
# dropped.
_Files = tuple[tuple[str, ...], str, str]
_V2: _Files = (("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1: _Files = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def total_bytes(root: Path = Path("/")) -> int:
    """The machine's memory, or the smallest limit of this process's cgroups. `root` holds proc and sys."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits(root))])


def available_bytes(root: Path = Path("/")) -> int:
    """The memory available without swapping: on the machine, and under each limit."""
    left = (max(0, limit - used) for limit, used in _limits(root))
    return min([int(psutil.virtual_memory().available), *left])


def object_store_bytes(root: Path = Path("/")) -> int:
    """For a local Ray: a tenth of the memory within bounds, and at most what /dev/shm holds, unless that is tiny, as in
    a container without --shm-size: Ray then maps files in its temporary folder."""
    memory = total_bytes(root)
    wanted = min(max(int(memory * _STORE_SHARE), _LEAST_STORE), _MOST_STORE, memory // 4)
    if sys.platform != "linux":
        return wanted
    space = os.statvfs(root / "dev/shm")
    shared = int(0.9 * space.f_bavail * space.f_frsize)
    return min(wanted, shared) if shared >= min(_LEAST_STORE, wanted) else wanted


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each cgroup above this process that has a limit."""
    for group, is_v2 in cgroups("memory", root):
        names, current, idle = _V2 if is_v2 else _V1
        limits = [value for name in names if (value := _number(group / name)) is not None]
        if limits:
            yield min(limits), max(0, (_number(group / current) or 0) - _field(group / "memory.stat", idle))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # the file is missing, or says `max`
        return None


def _field(file: Path, name: str) -> int:
    try:
        return next((int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[0] == name), 0)
    except OSError:
        return 0

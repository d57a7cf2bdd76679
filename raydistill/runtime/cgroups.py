"""The cgroups of this process, as a container, a pod or a systemd slice sets them.

https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def cgroups(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's cgroup and of those above it, and whether each is of version 2. `root` holds proc
    and sys."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        own = mount / path.lstrip("/")
        # In a container the path may be the host's, and only the mount itself exists here.
        for group in (own, *own.parents):
            yield group, not controllers
            if group == mount:
                break


def num_cores(root: Path = Path("/")) -> int:
    """The CPU cores that this process may use: those of its affinity, or fewer if a cgroup has a quota."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (_quota(group, is_v2) for group, is_v2 in cgroups("cpu", root))
    return max(1, min([own, *(math.ceil(quota) for quota in quotas if quota is not None)]))


def _quota(group: Path, is_v2: bool) -> float | None:
    """In cores; None: no limit."""
    try:
        if is_v2:
            quota, period = map(float, (group / "cpu.max").read_text().split())
        else:
            quota, period = (float((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    except (OSError, ValueError):  # the file is missing, or says `max`
        return None


def num_threads() -> int:
    """The threads that torch may use on this machine: its cores, or fewer if OMP_NUM_THREADS says so."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(num_cores(), int(asked)) if asked.isdecimal() and int(asked) else num_cores()

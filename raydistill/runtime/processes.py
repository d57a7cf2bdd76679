"""A process by a name that no other has, and whether it is still there."""

from __future__ import annotations

import os
import platform
import re

import psutil

# When a process began follows from the clock, which may be put right meanwhile.
_CLOCK_SECONDS = 60.0


def process_name(pid: int | None = None) -> str:
    """A name of this process, or of one beside it, that no other has on any machine: numbers of processes repeat, and
    containers have their own."""
    pid = os.getpid() if pid is None else pid
    space = "/proc/self/ns/pid"
    place = os.readlink(space) if os.path.exists(space) else "-"
    return f"{platform.node()} {place} {pid} {psutil.Process(pid).create_time():.0f}"


def is_running(name: str) -> bool | None:
    """Whether the process of this name is there. None for one on another machine, and for what is no such name."""
    found = re.fullmatch(r"(\S* \S+) ([0-9]{1,9}) ([0-9]{1,12})", name)
    if found is None or found[1].split(" ") != process_name().split(" ")[:-2]:
        return None
    try:
        now = process_name(int(found[2])).rpartition(" ")[2]
        if psutil.Process(int(found[2])).status() == psutil.STATUS_ZOMBIE:  # ended, and nobody has asked how
            return False
    except psutil.NoSuchProcess:
        return False
    return abs(float(now) - float(found[3])) <= _CLOCK_SECONDS

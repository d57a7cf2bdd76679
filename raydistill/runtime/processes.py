"""A unique name for a process, and whether that process is still running."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import psutil

_BOOT = Path("/proc/sys/kernel/random/boot_id")  # of this start of the machine, on Linux
# Elsewhere the start time follows from the clock, which may be corrected meanwhile.
_CLOCK_SECONDS = 2.0 if _BOOT.exists() else 60.0


def process_name(pid: int | None = None) -> str:
    """A name of this process, or of another on this machine, that no other process has on any machine: process numbers
    repeat, and containers have their own."""
    pid = os.getpid() if pid is None else pid
    space = "/proc/self/ns/pid"
    place = os.readlink(space) if os.path.exists(space) else "-"
    began = psutil.Process(pid).create_time()
    if _BOOT.exists():  # seconds since the machine's start, which no clock moves
        place, began = f"{place}/{_BOOT.read_text().strip()}", began - psutil.boot_time()
    return f"{platform.node()} {place} {pid} {max(began, 0):.0f}"


def is_running(name: str) -> bool | None:
    """Whether the process of this name is running. None for one on another machine, or if it is not such a name."""
    found = re.fullmatch(r"(\S* \S+) ([0-9]{1,9}) ([0-9]{1,12})", name)
    if found is None or found[1].split(" ") != process_name().split(" ")[:-2]:
        return None
    try:
        now = process_name(int(found[2])).rpartition(" ")[2]
        if psutil.Process(int(found[2])).status() == psutil.STATUS_ZOMBIE:  # ended, but not yet reaped
            return False
    except psutil.NoSuchProcess:
        return False
    return abs(float(now) - float(found[3])) <= _CLOCK_SECONDS

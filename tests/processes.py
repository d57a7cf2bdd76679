"""Waiting for what other processes do, and finding those of Ray."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import psutil


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def ray_processes(title: str) -> list[psutil.Process]:
    """Ray's processes of this title under this one: other sessions on the machine are left alone."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()[:1]):
                found.append(process)
    return found

"""Waits for the first worker process of a new local Ray. Ray would replace a worker that dies at its start forever."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import ray

from raydistill.errors import StageError

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_WITHOUT_ANY = 20.0
_SECONDS_OF_A_START = 40.0  # Ray ends a worker that has not reported after a minute, as on a machine that is too busy


def refuse_dying_workers(logs: Path) -> None:
    """Raises StageError if the first worker process died, or could not load raydistill, with the reason and the place
    of its log. Later work gets the same process."""
    raylet = next(
        (child for child in psutil.Process().children() if _words(child).split(" ")[0].endswith("raylet")), None
    )
    if raylet is None:
        raise StageError(f"Ray ended while it started: {_last_line(logs, []) or 'no reason'}; its logs are in {logs}")
    born, began = dict[int, float](), time.monotonic()
    asked = ray.remote(num_cpus=0, max_retries=0)(_answer).remote()
    while not ray.wait([asked], timeout=_SECONDS_BETWEEN_LOOKS)[0]:
        now, alive = time.monotonic(), {child.pid: words for child in _children(raylet) if (words := _words(child))}
        dead = [pid for pid, since in born.items() if pid not in alive and now - since < _SECONDS_OF_A_START]
        if dead or (not born and now - began > _SECONDS_WITHOUT_ANY):
            said = _last_line(logs, dead) or "no reason given, as when memory runs out"
            raise StageError(f"Ray's worker processes die when they start: {said}; their logs are in {logs}")
        begin = {pid: now for pid, words in alive.items() if "default_worker.py" in words}  # until it has a title
        born = begin | {pid: since for pid, since in born.items() if pid in alive}
    try:
        ray.get(asked)
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines()[-1]
        raise StageError(f"Ray's worker processes cannot run raydistill: {said}; their logs are in {logs}") from error


def _answer() -> None:
    """The first task of a worker: load raydistill."""


def _children(process: psutil.Process) -> list[psutil.Process]:
    """None if it has ended; the error then reaches whoever asks Ray."""
    try:
        return process.children()
    except psutil.Error:
        return []


def _words(process: psutil.Process) -> str:
    """Its command line; empty if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _last_line(logs: Path, dead: list[int]) -> str:
    """The last line of the processes' own logs, or of the raylet's log, which they use before they open their own."""
    own = [log for pid in dead for log in logs.glob(f"worker-*-{pid}.err")]
    lines = [line for log in (logs / "raylet.err", *own) for line in log.read_text(errors="replace").splitlines()]
    told = [line for line in lines if line.strip() and not line.startswith((":", "[", "Extension modules:"))]
    return told[-1].strip()[:300] if told else ""

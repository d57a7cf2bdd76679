"""Work on strangers' items in processes apart, so that what kills its process is known by name and takes nothing along.

A process has some items at a time and outlives them. Where it dies of a signal, as of a decoder's fault or for want of
memory, its items are given to another, one by one.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from raydistill.data import decode
from raydistill.errors import StageError
from raydistill.runtime.memory import total_bytes

I = TypeVar("I")  # noqa: E741 - of items
T = TypeVar("T")
Work = Callable[[Sequence[I]], Iterable[T]]
KILLED = "kills the process that decodes it"
# glibc gives freed memory back to the system, which clears every page of it anew for the next picture.
_KEEP = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
_SERVE = "import sys; from raydistill.data.isolation import serve; serve(int(sys.argv[1]))"


class Killed(str):
    """Why an item has no result, as a reason to refuse it."""


def apart(work: Work[I, T], items: Sequence[I]) -> list[T | Killed]:
    """The work's result for each item, in order; Killed of one that two processes died of by a signal, since one may be
    killed by somebody else. `work`, items and results are pickled. Each thread that calls has a process of its own.

    Raises what the work raises, and StageError where a process ends in another way.
    """
    found, deaths, together = list[T | Killed](), 0, len(items)
    while len(found) < len(items):
        some = items[len(found) : len(found) + together]
        process = _idle_or_new()
        try:
            process.pipe.send((work, some))
            results, error = process.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            number = process.end()
            if process.is_stopped or number >= 0:
                what = f"{len(some)} items, {some[0]!r:.200} the first,"
                raise StageError(f"a process at work on {what} ended with {number}") from None
            deaths, together = deaths + (together == 1), 1
            if deaths > 1:
                deaths, of = 0, "; memory may have run out" if number == -signal.SIGKILL else ""
                found.append(Killed(f"{KILLED}, twice, by {signal.Signals(-number).name}{of}"))
        except BaseException:  # whoever asked next would have this answer
            process.stop()
            process.end()
            raise
        else:
            _idle.append(process)
            if error is not None:
                raise error
            found, deaths = found + results, 0
    return found


def many_apart(
    work: Work[I, T], parts: Iterable[Sequence[I]], count: int
) -> Generator[tuple[Sequence[I], list[T | Killed]]]:
    """Each part and what `apart` gives of it, in order, `count` at once and as many ahead. What is under way when that
    is left, as by an interruption, is ended."""
    waiting = deque[tuple[Sequence[I], Future[list[T | Killed]]]]()
    with ThreadPoolExecutor(count) as pool:
        try:
            for part in parts:
                waiting.append((part, pool.submit(apart, work, part)))
                if len(waiting) >= 2 * count:
                    yield waiting[0][0], waiting.popleft()[1].result()
            while waiting:
                yield waiting[0][0], waiting.popleft()[1].result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end_all()
            raise


def begin(work: Callable[..., Any], count: int) -> None:
    """Start so many processes for this work, which are ready once this one has loaded what it needs itself."""
    while len(_idle) < count:
        process = _Process()
        process.pipe.send((work, ()))
        _idle.append(process)


@atexit.register
def end_all() -> None:
    """At once, whatever they are at."""
    for process in list(_processes):
        process.stop()
    with contextlib.suppress(IndexError):
        while True:
            _idle.pop().end()


class _Process:
    """In a session of its own, which no Ctrl-C reaches; it ends where the other end of its pipe is closed."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        places = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *sys.path]))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", **_KEEP}, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        self.pipe, self.is_stopped = Connection(ours.detach()), False
        _processes.add(self)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        self.is_stopped = True
        self._process.kill()

    def end(self) -> int:
        """Its exit status, once it has one."""
        _processes.discard(self)
        self.pipe.close()
        return self._process.wait()


_idle, _processes = list[_Process](), set[_Process]()


def _idle_or_new() -> _Process:
    with contextlib.suppress(IndexError):
        while True:
            process = _idle.pop()
            if process.is_alive():
                return process
            process.end()
    return _Process()


def serve(descriptor: int) -> None:
    """The process's own side."""
    decode.limit_memory(total_bytes(), os.cpu_count() or 1)  # half of the memory, for a process a core
    decode.is_apart = True
    with contextlib.suppress(OSError):  # where memory runs out, it is the one to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    Thread(target=_end_with_parent, args=(descriptor,), daemon=True).start()
    with Connection(descriptor) as pipe:
        while True:
            try:
                work, items = pipe.recv()
            except EOFError:
                return
            if not items:  # the work is loaded by now
                continue
            answer: tuple[Any, Exception | None]
            try:
                answer = list(work(items)), None
            except Exception as error:
                answer = None, error
            pipe.send(answer)


def _end_with_parent(descriptor: int) -> None:
    ends = select.poll()
    ends.register(descriptor, 0)  # of which the end is told in any case
    ends.poll()
    os._exit(1)

"""Runs work on untrusted items in isolated processes: an item that kills its process is named, and the others continue.

A process takes some items at a time and is used again. When a signal ends it, as after a decoder's fault or when memory
runs out, another process takes its items one by one.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
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
from threading import Lock, Thread
from typing import Any, TypeVar

from raydistill.data import decode
from raydistill.errors import StageError
from raydistill.runtime.cgroups import num_cores
from raydistill.runtime.memory import total_bytes

I = TypeVar("I")  # noqa: E741 - of items
T = TypeVar("T")
Work = Callable[[Sequence[I]], Iterable[T]]
KILLED = "kills the process that decodes it"
# Without these glibc returns freed memory to the system, which clears each page again for the next picture.
_KEEP = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
_SERVE = "import sys; from raydistill.data.isolation import serve; serve(int(sys.argv[1]))"


class Killed(str):
    """The result of an item that killed its process: the reason to refuse it."""


class _Caller:
    """The processes that work for one caller, and whether it has left."""

    def __init__(self) -> None:
        self.processes, self.has_left, self._lock = set[_Process](), False, Lock()

    def takes(self, process: _Process) -> None:
        with self._lock:
            self.processes.add(process)
            if self.has_left:  # meanwhile
                process.stop()

    def gives_back(self, process: _Process) -> bool:
        """Whether another caller may have it."""
        with self._lock:
            self.processes.discard(process)
            return not process.is_stopped

    def leaves(self) -> None:
        with self._lock:
            self.has_left = True
            for process in self.processes:
                process.stop()


def run_isolated(work: Work[I, T], items: Sequence[I], caller: _Caller | None = None) -> list[T | Killed]:
    """The work's result for each item, in order. An item is Killed after signals have ended two processes that had only
    this item: one signal may have come from somebody else. `work`, items and results are pickled.

    Each calling thread has its own process, which belongs to the `caller` meanwhile. Raises the errors of the work, and
    StageError if a process ends in another way.
    """
    found, deaths, together = list[T | Killed](), 0, len(items)
    caller = _Caller() if caller is None else caller
    while len(found) < len(items):
        some = items[len(found) : len(found) + together]
        process = _idle_or_new()
        caller.takes(process)
        try:
            process.pipe.send((work, some))
            results, error = process.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            number = process.end()
            if process.is_stopped or number >= 0:
                what = f"{len(some)} items, {some[0]!r:.200} the first,"
                raise StageError(f"the process that worked on {what} ended with {number}") from None
            deaths, together = deaths + (together == 1), 1
            if deaths > 1:
                deaths, of = 0, "; memory may have run out" if number == -signal.SIGKILL else ""
                found.append(Killed(f"{KILLED}, twice, by {signal.Signals(-number).name}{of}"))
        except BaseException:  # otherwise the next caller would get this answer
            process.stop()
            process.end()
            raise
        else:
            if caller.gives_back(process):
                _idle.append(process)
            else:
                process.end()
            if error is not None:
                raise error
            found, deaths = found + results, 0
        finally:
            caller.gives_back(process)
    return found


def map_isolated(
    work: Work[I, T], parts: Iterable[Sequence[I]], count: int
) -> Generator[tuple[Sequence[I], list[T | Killed]]]:
    """Each part and the results of `run_isolated` for it, in order; `count` parts at once and as many ahead. When the
    caller leaves early, as after an interruption, the processes that work on its parts end, and no others."""
    caller = _Caller()
    waiting = deque[tuple[Sequence[I], Future[list[T | Killed]]]]()
    with ThreadPoolExecutor(count) as pool:
        try:
            for part in itertools.chain(parts, itertools.repeat(None)):
                if part is not None:
                    waiting.append((part, pool.submit(run_isolated, work, part, caller)))
                elif not waiting:
                    return
                if part is None or len(waiting) >= 2 * count:
                    done, results = waiting[0][0], waiting[0][1].result()  # it stays in `waiting` until it is there
                    waiting.popleft()
                    yield done, results
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            caller.leaves()
            raise


def start_processes(work: Callable[..., Any], count: int) -> None:
    """Start `count` processes and let them load this work, while this process loads what it needs itself."""
    while len(_idle) < count:
        process = _Process()
        process.pipe.send((work, ()))
        _idle.append(process)


@atexit.register
def end_processes() -> None:
    """Ends them at once, whatever they do."""
    for process in list(_processes):
        process.stop()
    with contextlib.suppress(IndexError):
        while True:
            _idle.pop().end()


def python_apart(statement: str, *words: str) -> dict[str, Any]:
    """`subprocess` arguments for a Python that imports from the same paths as this process and from nowhere else: the
    current folder may be untrusted. Ctrl-C does not reach its session."""
    places = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *(p or os.getcwd() for p in sys.path)]))
    return {
        "args": [sys.executable, "-P", "-c", statement, *words], "stdin": subprocess.DEVNULL, "start_new_session": True,
        "env": {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", **_KEEP},
    }  # fmt: skip


class _Process:
    """It has its own session, which Ctrl-C does not reach. It ends when the other end of its pipe closes."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                **python_apart(_SERVE, str(number)), pass_fds=[number], stdout=subprocess.DEVNULL
            )
        self.pipe, self.is_stopped = Connection(ours.detach()), False
        _processes.add(self)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        self.is_stopped = True
        self._process.kill()

    def end(self) -> int:
        """Wait for it and give its exit status."""
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
    """The main function of the isolated process."""
    decode.limit_memory(total_bytes(), num_cores())  # half of the memory, for one process a core
    decode.is_isolated = True
    with contextlib.suppress(OSError):  # when memory runs out, the system ends this process first
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
    ends.register(descriptor, 0)  # poll reports a closed pipe in any case
    ends.poll()
    os._exit(1)

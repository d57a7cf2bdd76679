"""Signals that end a command: SIGINT (Ctrl-C), SIGTERM, and SIGHUP (its terminal was closed).

The first signal is raised as `Interrupted` in the main thread, so that every `with` block closes. A thread does the
rest; Python's own C handler wakes it even if another thread holds the interpreter. It raises a swallowed signal again,
ends a command that does not close in time, and ends it at once at a second signal.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS_OF_ONE_PRESS = 0.2  # `timeout` and others signal a process and then its group, so it gets the signal twice
_SECONDS_TO_NOTICE = 8.0  # C code that does not let Python run
_TIMES_TO_RAISE = 3  # code that catches the exception and continues
_SECONDS_TO_CLOSE = 30.0
_LAST_SECONDS = 2.0
_SECONDS_BETWEEN_LOOKS = 0.5


class Interrupted(KeyboardInterrupt):
    """A signal ended the command, or a call in Python."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows."""
        return [f"interrupted; {self}"]


_signal: int | None = None  # the first signal
_raised, _again = False, 0  # whether the handler has run, and how often the signal was raised again and not yet handled
_NOTHING = _resume_hint = "nothing was written"
# Called in threads, each for a moment at most, before a forced end.
before_forced_end: list[Callable[[], object]] = []
_terminal = -1
_leaving, _told, _all_heard = False, -1, threading.Event()
_ending, _main_ends = threading.Lock(), False


def handle_signals() -> None:
    """Handle the signals from now on. For the main thread of a command. A signal that was set to be ignored when the
    process started, as by `nohup`, stays ignored."""
    global _terminal, _told
    with contextlib.suppress(OSError):  # closed; otherwise kept, because others may redirect the usual one for a while
        _terminal = os.dup(2)
    heard, _told = os.pipe()
    os.set_blocking(_told, False)
    signal.set_wakeup_fd(_told, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)
    sys.unraisablehook = _say_unraisable
    threading.Thread(target=_watch, args=(heard,), name="signals", daemon=True).start()


def _say_unraisable(unraisable: Any) -> None:
    """Python drops what is raised in a `__del__` or a weakref's callback, and prints it. A thread raises the signal
    again, so there is nothing to print."""
    if not issubclass(unraisable.exc_type, Interrupted):
        sys.__unraisablehook__(unraisable)


def interrupt(number: int) -> None:
    """Act as if the signal had come, from any thread."""
    global _signal
    if _signal is None:
        _signal = number
        signal.pthread_kill(_main(), signal.SIGTERM)


def was_interrupted() -> bool:
    return _signal is not None


def resume_hint(words: str) -> None:
    """Set what the message of an interruption says about how to continue."""
    global _resume_hint
    _resume_hint = words


def exit_process(code: int) -> NoReturn:
    """End the process with this code or, after a signal, which may come at the last moment, as the handler does."""
    global _leaving
    _leaving = True
    os.write(_told, b"\0")
    _all_heard.wait(1)  # another handler has just turned a signal into an exit
    if _signal is not None:
        _end()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code:
        _kill_children()  # a Ray that was still starting
    # Ray's and MLflow's threads have nothing left to write, and waiting for them takes seconds.
    os._exit(code)


def _end() -> NoReturn:
    """Print the interruption, end all child processes, and exit with 128 plus the signal's number, as shells do."""
    global _main_ends
    assert _signal is not None, "a signal has come"
    # Otherwise another signal's handler would wait below forever, for the thread that it interrupts.
    _main_ends = _main_ends or threading.current_thread() is threading.main_thread()
    _ending.acquire()  # never released: every other caller waits here for the end
    shown = "\033[?25h" if sys.stdout is not None and sys.stdout.isatty() else ""  # a progress bar hides the cursor
    words = f"{shown}interrupted ({signal.Signals(_signal).name}); {_resume_hint}\n"
    if _signal == signal.SIGPIPE and _resume_hint == _NOTHING:
        words = shown  # as other programs: whoever runs `raydistill keys | head` has what they want
    with contextlib.suppress(OSError, ValueError):
        # A full pipe, or a stopped terminal, may never accept them.
        if select.select([], [_terminal], [], _LAST_SECONDS)[1]:
            os.write(_terminal, words.encode())
    _kill_children()
    os._exit(128 + _signal)


def _raise(number: int, frame: FrameType | None) -> None:
    global _signal, _raised
    if _main_ends:
        return
    if _signal is None:
        _signal = number
    if _leaving:
        _end()
    _raised = True
    if not _unwinding():  # do not interrupt what is already closing
        raise Interrupted


def _watch(heard: int) -> None:
    global _signal, _again
    first = 0.0
    while True:
        written = os.read(heard, 64)
        numbers = [number for number in written if number in SIGNALS]
        own = min(_again, numbers.count(signal.SIGTERM))
        _again -= own
        if len(numbers) == own:
            pass
        elif not first:
            first, _signal = time.monotonic(), _signal or numbers[0]
            threading.Thread(target=_see_it_through, name="interruption", daemon=True).start()
        elif time.monotonic() - first > _SECONDS_OF_ONE_PRESS:
            _end_by_force()
        if 0 in written:
            _all_heard.set()


def _see_it_through() -> None:
    """The handler waits for C code that does not let Python run; otherwise the exception is on its way up, or some code
    caught it, or handled the signal instead."""
    global _again
    began, closing, times = time.monotonic(), False, 0
    while times < _TIMES_TO_RAISE and time.monotonic() - began < (_SECONDS_TO_CLOSE if closing else _SECONDS_TO_NOTICE):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        closing = _unwinding()
        reached = _raised or any(signal.getsignal(number) not in (_raise, signal.SIG_IGN) for number in SIGNALS)
        if reached and not closing and signal.getsignal(signal.SIGTERM) is _raise:
            _again, times = _again + 1, times + 1
            signal.pthread_kill(_main(), signal.SIGTERM)
    _end_by_force()


def _main() -> int:
    return threading.main_thread().ident or 0


def _unwinding() -> bool:
    """Whether the main thread handles an interruption, or an error that came while it did."""
    found = sys._current_exceptions().get(_main())
    error = found[1] if isinstance(found, tuple) else found  # a triple before Python 3.12
    while error is not None:
        if isinstance(error, KeyboardInterrupt | SystemExit):  # Ray raises its own instead of ours
            return True
        error = error.__context__
    return False


def _end_by_force() -> NoReturn:
    threads = [threading.Thread(target=say, daemon=True) for say in list(before_forced_end)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + _LAST_SECONDS
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    _end()


def _kill_children() -> None:
    with contextlib.suppress(psutil.Error, OSError):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()

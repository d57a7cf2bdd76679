"""Signals that end a command: real processes get real signals, alone and as a group, as a terminal sends them."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.processes import wait_for
from tests.small_run import small_job

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class Command:
    """A process in a group of its own; its descendants are known by what they inherit."""

    def __init__(self, *words: str, **environment: str) -> None:
        self._mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, env=os.environ | environment | {"MARK_OF_A_TEST": self._mark},
            preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in CODES],
        )  # fmt: skip

    def wait_for_line(self, text: str) -> None:
        assert any(text in line for line in self.process.stdout), "it ended without a word"

    def press(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def end(self, seconds: float = 30) -> tuple[int, str]:
        code = self.process.wait(seconds)
        wait_for(lambda: not list(self.descendants()), 15)
        return code, self.process.stdout.read()

    def descendants(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("MARK_OF_A_TEST") == self._mark and process.status() != "zombie":
                    yield process


BEGIN = (
    "import os, signal, subprocess, sys, time\nfrom raydistill.runtime import interrupts\ninterrupts.handle_signals()\n"
)
LEAVE = "finally:\n    interrupts.exit_process(0)\n"


@pytest.mark.parametrize("number", CODES)
def test_a_signal_closes_what_runs_and_names_itself(number) -> None:
    closes = "try:\n    print('runs', flush=True)\n    time.sleep(60)\nexcept interrupts.Interrupted:\n"
    closes = BEGIN + f"try:\n    {closes.replace(chr(10), chr(10) + '    ')}    print('closes', flush=True)\n" + LEAVE
    command = Command("-c", closes)
    command.wait_for_line("runs")
    command.press(number)
    code, said = command.end()
    assert code == CODES[number]
    assert said.splitlines() == ["closes", f"interrupted ({signal.Signals(number).name}); nothing was written"]


@pytest.mark.parametrize(
    "swallows",
    [
        "for _ in range(600):\n        try: time.sleep(0.1)\n        except BaseException: pass\n",
        "class Gone:\n        def __del__(self): time.sleep(60)\n    Gone()\n    time.sleep(60)\n",
        "signal.signal(signal.SIGINT, lambda *_: None)\n    time.sleep(60)\n",
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(0))\n    time.sleep(60)\n",
    ],
    ids=["by an except", "by a destructor", "by a handler", "by a handler that ends the process well"],
)
def test_a_signal_that_somebody_keeps_ends_the_command_all_the_same(swallows: str) -> None:
    command = Command("-c", f"{BEGIN}try:\n    print('runs', flush=True)\n    {swallows}{LEAVE}")
    command.wait_for_line("runs")
    command.press(signal.SIGINT)
    assert command.end(10) == (130, "interrupted (SIGINT); nothing was written\n")


def test_a_second_signal_ends_at_once_with_last_words_and_no_child() -> None:
    stuck = (
        "interrupts.resume_hint('go on')\n"
        "interrupts.before_forced_end.append(lambda: print('last words', flush=True))\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        "try:\n    try:\n        print('runs', flush=True)\n        time.sleep(60)\n"
        "    finally:\n        print('closes', flush=True)\n        time.sleep(60)\n"
    )
    command = Command("-c", BEGIN + stuck + LEAVE)
    command.wait_for_line("runs")
    command.press(signal.SIGTERM)
    command.wait_for_line("closes")
    assert command.process.poll() is None
    began = time.monotonic()
    wait_for(lambda: command.press(signal.SIGTERM) or command.process.poll() is not None, 10)
    assert command.end() == (143, "last words\ninterrupted (SIGTERM); go on\n")
    assert time.monotonic() - began < 5


def test_the_signal_of_timeout_which_comes_twice_is_one() -> None:
    closes = "try:\n    try:\n        print('runs', flush=True)\n        time.sleep(60)\n"
    closes += "    finally:\n        print('closed')\n"
    command = Command("-c", BEGIN + closes + LEAVE)
    command.wait_for_line("runs")
    command.process.terminate()
    command.press(signal.SIGTERM)
    assert command.end() == (143, "closed\ninterrupted (SIGTERM); nothing was written\n")


def test_signals_that_do_not_stop_end_the_command_once() -> None:
    """Some come while the process says its last words and ends its children."""
    child = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    command = Command("-c", BEGIN + child + "try:\n    print('runs', flush=True)\n    time.sleep(60)\n" + LEAVE)
    command.wait_for_line("runs")
    began = time.monotonic()
    while command.process.poll() is None and time.monotonic() - began < 20:
        command.process.terminate()
    assert command.end(10) == (143, "interrupted (SIGTERM); nothing was written\n")


def test_last_words_that_nobody_takes_are_not_waited_for() -> None:
    """A pipe that is full, and whose reader has stopped."""
    fills = "os.set_blocking(1, False)\ntry:\n    while True: os.write(1, b'x' * 4096)\nexcept BlockingIOError: pass\n"
    runs = "os.set_blocking(1, True)\nos.kill(os.getpid(), signal.SIGTERM)\n"
    command = Command("-c", f"{BEGIN}try:\n    time.sleep(0)\n    exec({(fills + runs)!r})\n{LEAVE}")
    assert command.process.wait(15) == 143
    command.process.stdout.close()


def test_a_signal_while_the_process_leaves_is_not_taken_for_success() -> None:
    flush = "class Slow:\n    def flush(self): os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n    isatty = bool\n"
    code, said = Command("-c", f"{BEGIN}{flush}sys.stdout = Slow()\ninterrupts.exit_process(0)\n").end(10)
    assert (code, said) == (130, "interrupted (SIGINT); nothing was written\n")


def test_what_nohup_ignores_stays_ignored() -> None:
    goes_on = "print('runs', flush=True)\nos.kill(os.getpid(), signal.SIGHUP)\ninterrupts.exit_process(0)\n"
    ignores = f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{BEGIN}"
    assert Command("-c", ignores + goes_on).end(10) == (0, "runs\n")


@pytest.mark.slow
def test_code_that_lets_no_python_run_is_ended(tmp_path) -> None:
    """In C, in the main thread, for minutes: the exception cannot come, and nothing can close."""
    command = Command(
        "-c", f"{BEGIN}import hashlib\nprint('runs', flush=True)\nhashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    )
    command.wait_for_line("runs")
    command.press(signal.SIGHUP)
    assert command.end(20) == (129, "interrupted (SIGHUP); nothing was written\n")


def test_a_run_says_at_once_what_it_reads_and_ends_while_it_loads(image_folder, teacher_weights, tmp_path) -> None:
    command = Command("-m", "raydistill", "run", *small_job(tmp_path, image_folder, teacher_weights))
    command.wait_for_line(str(image_folder))  # before torch, which takes seconds
    command.press(signal.SIGHUP)
    assert command.end() == (129, "interrupted (SIGHUP); the same command continues from here\n")


def glob(pattern: str) -> Callable[[Path], bool]:
    return lambda workspace: any(workspace.glob(pattern))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "imports": lambda workspace: True,
    "prepare": glob("decoded-*"),
    "adapt": glob("features-*"),
    "teach": glob("teach-*"),
    "distill": glob("distill-*/epochs/*.json"),
    "evaluate": glob("evaluate-*"),
    "export": glob("export-*"),
}


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(800)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_every_signal_in_every_stage(moment, number, workers, image_folder, teacher_weights, tmp_path) -> None:
    words = small_job(tmp_path, image_folder, teacher_weights)
    more = [f"distill.num_workers={workers}", "tracking.enabled=true"]
    more += ["distill.epochs=2000"] if moment == "distill" else ["distill.epochs=1"]
    command, workspace = Command("-m", "raydistill", "run", *words, *more), tmp_path / "workspace"
    if moment == "imports":
        command.wait_for_line("")
    wait_for(lambda: MOMENTS[moment](workspace) or command.process.poll() is not None, 600)
    command.press(number)
    code, said = command.end(60)  # seconds on an idle machine, of which MLflow takes most to make its tables
    assert code == CODES[number], said
    assert said.splitlines()[-1] == f"interrupted ({signal.Signals(number).name}); the same command continues from here"
    assert said.count("interrupted") == 1
    assert "Traceback" not in said
    if (workspace / "mlflow.db").exists():
        with sqlite3.connect(workspace / "mlflow.db") as database, contextlib.suppress(sqlite3.OperationalError):
            states = {status for (status,) in database.execute("select status from runs")}  # or it had no tables yet
            assert states <= {"KILLED", "FINISHED"}

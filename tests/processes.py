"""Waiting for what other processes do, and finding those of Ray."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from typing import TypeVar

import psutil

T = TypeVar("T")


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def python(
    *words: str, env: Mapping[str, str] = os.environ, timeout: float = 280, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run this Python with these words, and with `more` in its environment."""
    return subprocess.run(
        [sys.executable, *words], env={**env, **more}, capture_output=True, text=True, timeout=timeout
    )


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    """Gives the address of a server that answers for the time of a `with` block."""
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def together(program: str, *arguments: tuple[str, ...]) -> list[tuple[str, str]]:
    """Run a program in processes with these arguments, and give what each wrote, to stdout and stderr. Each has to
    import what it needs and then to `print("ready", flush=True)` and to read a line: they go on in the same moment."""
    commands = [
        subprocess.Popen([sys.executable, "-c", program, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for words in arguments
    ]  # fmt: skip
    for command in commands:
        assert command.stdout is not None
        assert command.stdout.readline() == "ready\n"
    for command in commands:
        assert command.stdin is not None
        command.stdin.write("go\n")
        command.stdin.flush()
    written = [command.communicate(timeout=200) for command in commands]
    assert not any(command.returncode for command in commands), written
    return written


def ray_processes(title: str) -> list[psutil.Process]:
    """Ray's processes of this title under this one: other sessions on the machine are left alone."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()[:1]):
                found.append(process)
    return found


def run_and_kill(run: Callable[[], T], title: str, when: Callable[[], object]) -> T:
    """What a run gives of which one of Ray's processes is killed as soon as `when()` holds."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        wait_for(lambda: (when() and ray_processes(title)) or running.done())
        assert not running.done(), "nothing was left to kill"
        ray_processes(title)[0].kill()
        return running.result(timeout=180)

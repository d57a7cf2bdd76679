"""A process by a name that no other has."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from raydistill.runtime.processes import is_running, process_name


def test_a_process_that_has_ended_does_not_run_though_nobody_has_asked_how() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        name = process_name(process.pid)
        assert is_running(name)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # leaves it as it is
        assert is_running(name) is False
    assert is_running(name) is False
    assert is_running(process_name())


@pytest.mark.skipif(sys.platform != "linux", reason="where the system says since when it runs")
def test_a_clock_that_is_set_and_a_machine_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name, since = process_name(), psutil.boot_time()
    with monkeypatch.context() as patch:
        for step in (-7200, 90, 40_000_000):  # psutil reads the machine's start, which follows from the clock
            patch.setattr("psutil._pslinux.boot_time", lambda step=step: since + step)
            assert psutil.Process().create_time() > 1e9
            assert is_running(name)
    host, place, pid, began = name.split(" ")
    assert is_running(f"{host} {place} {pid} {int(began) + 5}") is False, "another process of that number"
    boot = place.rpartition("/")[2]
    assert is_running(name.replace(boot, boot[::-1])) is None, "another machine, or before it was started again"

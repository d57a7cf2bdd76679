"""A process by a name that no other has."""

from __future__ import annotations

import os
import subprocess
import sys

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

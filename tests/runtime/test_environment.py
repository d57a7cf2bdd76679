"""Commands in strange surroundings, each a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.processes import python

SHOW = [sys.executable, "-m", "raydistill", "show"]


@pytest.fixture
def job(class_folders) -> str:
    return f"images.path={class_folders({'cat': 12, 'dog': 12})}"


def sh(line: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    bash = ["bash", "-c", f"set -o pipefail; {line}", "bash", *words]
    return subprocess.run(bash, env=os.environ | environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed, job, tmp_path) -> None:
    ended = sh(f'"$@" {closed}', *SHOW, job, f"workspace={tmp_path}/w")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ("workspace:" in ended.stdout) == (">&-" not in closed.replace("2>&-", ""))


def test_a_reader_that_goes_ends_the_command_without_a_traceback(job, tmp_path) -> None:
    """More than a pipe holds, into one that nobody reads any more."""
    job_file = tmp_path / "job.yaml"
    prompts = [f"a photo of a {{class}}, number {number}" for number in range(6000)]
    job_file.write_text(json.dumps({"teacher": {"prompts": prompts}}))
    ended = sh('"$@" | head -c 10', *SHOW, str(job_file), job)
    assert ended.returncode == 141
    assert ended.stderr == ""


def test_an_error_is_said_while_somebody_else_has_the_descriptor() -> None:
    """As Ray's start has, in a thread, while the main one refuses the job."""
    program = (
        "import os, sys\nfrom raydistill.runtime.environment import open_streams\nopen_streams()\n"
        "os.dup2(os.open(os.devnull, os.O_WRONLY), 2)\nprint('error: why', file=sys.stderr)\nos._exit(1)\n"
    )
    ended = python("-c", program)
    assert (ended.returncode, ended.stderr) == (1, "error: why\n")


def test_no_home_and_no_name(job, tmp_path) -> None:
    ended = sh('"$@"', *SHOW, job, HOME="/nowhere/at/all", TMPDIR=str(tmp_path))
    assert ended.returncode == 0
    assert ended.stderr == (
        f"HOME=/nowhere/at/all cannot be written to: caches go to {tmp_path}/raydistill-{os.getuid()}; to keep them, "
        "set HOME to a folder\n"
    )
    (tmp_path / f"raydistill-{os.getuid()}").chmod(0o755)  # as somebody else may have made it
    ended = sh('"$@"', *SHOW, job, HOME="/nowhere/at/all", TMPDIR=str(tmp_path))
    assert (ended.returncode, "is not this user's alone; set HOME" in ended.stderr) == (2, True)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes a user that nobody knows")
def test_a_user_that_no_file_knows(tmp_path) -> None:
    code = """
import getpass, os, sys
from pathlib import Path
from raydistill.runtime.environment import prepare_environment
os.setuid(54321)
prepare_environment()
(Path.home() / "written").touch()
print(getpass.getuser(), Path.home())
"""
    tmp_path.chmod(0o777)
    for place in tmp_path.parents:  # pytest's own, which it closes to others
        if place.owner() == "root" and not place.stat().st_mode & 0o001:
            place.chmod(0o755)
    ended = python("-c", code, env={}, HOME="/", TMPDIR=str(tmp_path), PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    assert ended.stdout == f"user54321 {tmp_path}/raydistill-54321\n", ended.stderr

"""What kills its process is known by name, and a process that somebody else killed costs nothing."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from raydistill.errors import StageError
from raydistill.infra.apart import Killed, one_by_one


def square(item: int, *, dies: dict[int, int], once: str = "", ends: int | None = None) -> int:
    """Here by name, since it is pickled. `once`: a file that says that it has died already."""
    if item == ends:
        os._exit(3)
    if item in dies and not (once and Path(once).exists()):
        if once:
            Path(once).touch()
        os.kill(os.getpid(), dies[item])
    if item < 0:
        raise ValueError(f"{item} is negative")
    return item * item


def test_of_many_those_that_kill_are_named_and_the_others_have_results():
    dies = {1: signal.SIGSEGV, 2: signal.SIGABRT, 4: signal.SIGKILL}
    found = list(one_by_one(partial(square, dies=dies), range(6)))
    assert [None if isinstance(one, Killed) else one for one in found] == [0, None, None, 9, None, 25]
    assert ["SIGSEGV" in found[1], "SIGABRT" in found[2], "SIGKILL; memory may" in found[4]] == [True] * 3


def test_what_was_killed_once_by_somebody_else_has_its_result(tmp_path):
    work = partial(square, dies={1: signal.SIGKILL, 2: signal.SIGSEGV}, once=str(tmp_path / "once"))
    assert list(one_by_one(work, [0, 1, 2])) == [0, 1, 4]


def test_other_ends_and_exceptions_are_no_killers():
    with pytest.raises(StageError, match="at work on 1 ended with 3"):
        list(one_by_one(partial(square, dies={}, ends=1), [0, 1]))
    with pytest.raises(ValueError, match="-2 is negative"):
        list(one_by_one(partial(square, dies={}), [1, -2]))
    assert list(one_by_one(partial(square, dies={}), [])) == []

"""Exceptions. Each message is one sentence that names the problem, its place and the way out.

Every error takes one message string, so that it passes between Ray processes unchanged. Messages quote settings, other
people's files and libraries, so passwords in them are hidden and long names are shortened.
"""

import contextlib
import difflib
import itertools
import os
import traceback
from collections.abc import Iterable
from typing import Any

from raydistill.escaping import printable, truncated
from raydistill.secrets import redacted

_MOST_NEIGHBOURS = 1000  # comparing more names would take seconds


def reason_of(error: BaseException) -> str:
    """A library's error message, in one line of at most 500 characters."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def first_line_of(error: BaseException | None) -> str:
    """The first line of an error's message, for errors whose first line says everything."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean smoke?`, or nothing if no known name is similar."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.65)  # of 3 letters, 2 may be swapped
    return f"; did you mean {near[0]}?" if near else ""


def near_path(path: str, known: Iterable[str] = ()) -> str:
    """Like `did_you_mean`, and also knows the files and folders beside the path."""
    folder, beside = os.path.dirname(path), list[str]()
    with contextlib.suppress(OSError, ValueError), os.scandir(folder or ".") as found:
        beside = [os.path.join(folder, one.name) for one in itertools.islice(found, _MOST_NEIGHBOURS)]
    return did_you_mean(path, [*beside, *known])


class RaydistillError(Exception):
    """Base class of all errors that raydistill raises on purpose. `exit_code` is the exit code of the command line."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(redacted(truncated(message, redacted)))

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: one line, as the command line does."""
        if os.environ.get("RAYDISTILL_TRACEBACK"):
            return traceback.format_exception(self)
        return [f"{type(self).__name__}: {printable(str(self))}"]


class ConfigError(RaydistillError):
    """The job, an overlay, a `key=value` or a model that it names cannot be used."""

    exit_code = 2


class DataError(RaydistillError):
    """The images or their labels cannot be used."""

    exit_code = 2


class CheckpointError(RaydistillError):
    """A file of an earlier run in the workspace is damaged or belongs to other inputs."""

    exit_code = 2


def damaged_file(path: str, reason: object) -> CheckpointError:
    """Of a file that a finished stage wrote."""
    return CheckpointError(f"{path} is damaged ({reason}); delete it and {_done_beside(path)}")


def missing_file(path: str) -> CheckpointError:
    """The same."""
    return CheckpointError(f"{path} is missing; delete {_done_beside(path)}")


def _done_beside(path: str) -> str:
    return f"{path.rpartition('/')[0]}/DONE and run the command again: without DONE its stage makes what is missing"


class StageError(RaydistillError):
    """A stage failed while it ran: a worker died, a loss was not finite, a disk was full."""


class StorageError(StageError):
    """Storage does not answer, or has no such bucket."""


class UselessStudentError(StageError):
    """The student is at chance, so `export` wrote nothing. `outcome` holds the results of the earlier stages."""

    outcome: Any = None


class DivergedError(StageError):
    """The loss or its gradient is not finite. Every worker sees it at the same step; a retry cannot help."""

"""What can go wrong, each as one sentence that names the thing and the way out.

Every error takes one message string, so that it survives the trip between Ray processes unchanged. Passwords in it are
hidden, and names of any length cut: messages quote settings, strangers and libraries.
"""

import contextlib
import difflib
import itertools
import os
from collections.abc import Iterable
from typing import Any

from raydistill.escaping import truncated
from raydistill.secrets import redacted

_MOST_NEIGHBOURS = 1000  # comparing more names would take seconds


def reason_of(error: BaseException) -> str:
    """What a library says of its error, in one line of 500 characters at most."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def first_line_of(error: BaseException | None) -> str:
    """The same, of errors whose first line says all."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean smoke?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.65)  # three letters, two of them swapped
    return f"; did you mean {near[0]}?" if near else ""


def near_path(path: str, known: Iterable[str] = ()) -> str:
    """As `did_you_mean`; the files and folders beside the path are known too."""
    folder, beside = os.path.dirname(path), list[str]()
    with contextlib.suppress(OSError, ValueError), os.scandir(folder or ".") as found:
        beside = [os.path.join(folder, one.name) for one in itertools.islice(found, _MOST_NEIGHBOURS)]
    return did_you_mean(path, [*beside, *known])


class RaydistillError(Exception):
    """Base of everything raydistill raises on purpose. `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(redacted(truncated(message, redacted)))


class ConfigError(RaydistillError):
    """The job, an overlay, a `key=value` or a model it names cannot be used as it stands."""

    exit_code = 2


class DataError(RaydistillError):
    """The images or their labels cannot be used as they stand."""

    exit_code = 2


class CheckpointError(RaydistillError):
    """Something an earlier run left in the workspace is damaged or belongs to other inputs."""

    exit_code = 2


class StageError(RaydistillError):
    """A stage failed while it ran: a worker died, a loss was not finite, a disk was full."""


class StorageError(StageError):
    """The place where results or images lie does not answer, or has no such bucket."""


class UselessStudentError(StageError):
    """The student is at chance, so `export` wrote nothing. `outcome` holds the run's results before it."""

    outcome: Any = None


class DivergedError(StageError):
    """The loss or its gradient is not finite. Every worker sees it at the same step; a retry cannot help."""

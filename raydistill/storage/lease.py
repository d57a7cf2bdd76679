"""A lease on a stage directory: one command at a time writes to it, on disks and in buckets alike.

Leases are files with the numbers 1, 2 and so on; the last one counts, and none is deleted before the stage is done. So
a look reads one file after another, and no bucket is listed. A file can be created only if it does not exist, so one
command gets the next number, however many ask. No command overwrites another's file, so a holder that was only slow,
and taken for dead, finds a later one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel, Field

from raydistill.errors import CheckpointError, StageError
from raydistill.runtime.processes import is_running, process_name
from raydistill.storage.directory import StageDirectory
from raydistill.storage.filesystems import create_file, open_filesystem
from raydistill.storage.local import refuse_link
from raydistill.storage.state import read_state

logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_BEATS = 10.0
_SECONDS_BETWEEN_LOOKS = 1.0
# A holder on another machine counts as gone after this long without a sign of life; on this machine its process is
# checked.
_SILENT_SECONDS = 120.0
_CLOCK_SECONDS = 600.0  # by which machines' clocks may differ
_PREFIX = "lease-"


class _State(BaseModel):
    """The content of a lease's file."""

    id: str = ""
    process: str = Field("", pattern=r"^\S* \S+ [0-9]{1,9} [0-9]{1,12}$")
    beats: int = 0
    released: bool = False


@contextlib.contextmanager
def held(directory: StageDirectory, say: Callable[[str], None]) -> Iterator[bool]:
    """Hold the directory's lease during the block, which gets whether the stage is still to be done. While another
    command holds it, this one waits and says for which.

    Raises StageError after the block if another command took the lease meanwhile, because this process had shown no
    sign of life.
    """
    number, state = _acquire(directory, say)
    lost, ended = threading.Event(), threading.Event()
    beat = threading.Thread(target=_beat, args=(directory, number, state, lost, ended), name="lease", daemon=True)
    beat.start()
    try:
        yield directory.done() is None
    finally:
        ended.set()
        beat.join()
        if not lost.is_set():
            _release(directory, number, state)
    if lost.is_set():
        raise StageError(
            f"{directory.path}: another command took over this stage, because this process had shown no sign of life "
            f"for {_SILENT_SECONDS:.0f} s, or its lease was deleted; run the same command again: it waits for the other"
        )


def is_held(path: str) -> bool:
    """Whether a command seems to work in a stage directory, or may, if its files cannot be read: for readers that take
    no lease. Raises CheckpointError if it is a link."""
    directory = StageDirectory(path, "", "")
    if directory.fs.is_local:
        refuse_link(directory.place)
    try:
        number, state = _latest(directory)
        if not number:
            return False
        written = directory.fs.modified(open_filesystem(_path(directory, number))[1]).timestamp()
    except FileNotFoundError:  # released meanwhile
        return False
    except PermissionError:
        return True
    return not _is_free(state, max(time.time() - written - _CLOCK_SECONDS, 0.0))


def _acquire(directory: StageDirectory, say: Callable[[str], None]) -> tuple[int, dict[str, Any]]:
    mine = {"id": uuid.uuid4().hex, "process": process_name()}
    seen, since, told, number = None, 0.0, "", 0
    directory.make()
    while True:
        latest = number, state = _latest(directory, number)
        if latest != seen:  # timed by this machine's clock: others may be wrong
            seen, since = latest, time.monotonic()
        if not number or _is_free(state, time.monotonic() - since):
            if _create(directory, number + 1, mine):
                return number + 1, mine
        elif told != state.get("id", "?"):
            told = state.get("id", "?")
            host, _, pid, _ = state.get("process", "another-machine - ? -").split(" ")
            who = f"process {pid} on {host}, which is making {directory.path}"
            if not state:
                file = _path(directory, number)
                who = f"{_SILENT_SECONDS:.0f} s: {file} is damaged, and its holder may still work; or delete it"
            say(f"{directory.stage:<9} waits for {who}")
        threading.Event().wait(_SECONDS_BETWEEN_LOOKS)


def _is_free(state: dict[str, Any], silent_for: float) -> bool:
    running = is_running(state["process"]) if "process" in state else None
    if running is None:
        running = silent_for < _SILENT_SECONDS
    return state.get("released", False) or not running


def _latest(directory: StageDirectory, number: int = 0) -> tuple[int, dict[str, Any]]:
    """The number of the last lease and its content, for one who knows that `number` was there; 0 if there is none."""
    found = _read(directory, number) if number else {}
    while (later := _read(directory, number + 1)) is not None:
        number, found = number + 1, later
    return (0, {}) if found is None else (number, found)  # the stage is done, and its leases are deleted


def _read(directory: StageDirectory, number: int) -> dict[str, Any] | None:
    """The content of a lease's file; None if it is missing."""
    try:
        state = read_state(_path(directory, number), _State)
    except CheckpointError:  # truncated or untrusted: wait as for an unknown holder
        return {}
    return None if state is None else state.model_dump(exclude_unset=True)


def _path(directory: StageDirectory, number: int) -> str:
    return f"{directory.path}/{_PREFIX}{number:06d}"


def _create(directory: StageDirectory, number: int, state: dict[str, Any]) -> bool:
    """Whether this command got the number. The file's content decides: if an answer is lost and the request repeated,
    storage reports that the file exists already."""
    with contextlib.suppress(FileExistsError):
        create_file(_path(directory, number), json.dumps(state).encode())
    return _latest(directory, number) == (number, state)


def _beat(
    directory: StageDirectory, number: int, state: dict[str, Any], lost: threading.Event, ended: threading.Event
) -> None:
    """Renew the lease until the block has ended or another command holds it."""
    beats = 0
    while not ended.wait(_SECONDS_BETWEEN_BEATS):
        try:
            latest, found = _latest(directory, number)
            if latest != number or found.get("id", state["id"]) != state["id"]:  # a damaged one is written again
                lost.set()
                return
            beats += 1
            directory.write(f"{_PREFIX}{number:06d}", json.dumps({**state, "beats": beats}).encode())
        except (OSError, StageError) as error:
            logger.warning("%s: its lease could not be renewed (%s)", directory.path, error)


def _release(directory: StageDirectory, number: int, state: dict[str, Any]) -> None:
    """Release the lease. A finished stage needs none. Otherwise the number stays: else a command that is about to take
    the next number and a new command that begins at 1 would both hold it."""
    try:
        if directory.done() is None:
            directory.write(f"{_PREFIX}{number:06d}", json.dumps({**state, "released": True}).encode())
        else:
            for old in range(number, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    directory.fs.rm_file(f"{directory.place}/{_PREFIX}{old:06d}")  # a folder is not our lease
    except (OSError, StageError) as error:
        logger.warning("%s: its lease could not be given back (%s)", directory.path, error)

"""Finds what no job of a workspace needs, and deletes it. A workspace is a folder with the record of at least one job.

A stage directory is recognised by its name, which is the hash of its `identity.json`. Links, folders that hold links,
directories in use and everything else stay.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from raydistill.errors import CheckpointError, ConfigError
from raydistill.storage.directory import PRECISION, absolute_root, folder_bytes
from raydistill.storage.filesystems import read_file
from raydistill.storage.jobs import DIRECTORY, FOLDER, named_runs, read_jobs, state_of
from raydistill.storage.lease import is_held
from raydistill.storage.local import files_below, refuse_links
from raydistill.storage.state import MOST_BYTES

_LEFT_OVER = re.compile(r".+\.[0-9a-f]{32}\.tmp|\.writable-[0-9a-f]{32}")
_HALF_DELETED = re.compile(rf"\.deleted-{DIRECTORY}")
_LEASE = re.compile(r"lease-[0-9]{6,9}")
_LEFT_OVER_SECONDS = 3600.0  # no file takes so long to be written


@dataclass(frozen=True)
class Waste:
    """A path that no job needs, and why. If `kept` gives a reason, it stays. `size` is in bytes."""

    path: str
    why: str
    size: int
    kept: str = ""


def find_waste(workspace: str, job: str | None = None) -> tuple[list[Waste], list[str]]:
    """What no job needs. With `job`, also what only that job needs, and the paths of its records.

    Raises ConfigError if there is no workspace or no such job, or if the job runs; CheckpointError if a record cannot
    be read, because the directories that it names may be needed.
    """
    root = absolute_root(workspace)
    if "://" in root:
        raise ConfigError(f"{workspace}: clean works only on a disk; in a bucket use the bucket's lifecycle rules")
    runs = list(read_jobs(root, all_or_none=True, wanted=job or ""))
    leaving = [] if job is None else named_runs(runs, job)
    if any(state_of(root, run) == "running" for _, run in leaving):
        raise ConfigError(f"{job} is running; stop it, or wait until it ends")
    needed = {name for item in runs if item not in leaving for name in item[1].directories.values()}
    return list(_waste_in(root, needed)), [path for path, _ in leaving]


def _waste_in(root: str, needed: set[str]) -> Iterator[Waste]:
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if _HALF_DELETED.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            yield Waste(entry.path, "half deleted before", folder_bytes(entry.path))
        elif not re.fullmatch(DIRECTORY, entry.name):
            yield from _half_written(files_below(entry.path) if entry.name in (FOLDER, PRECISION) else [entry.path])
        elif entry.name not in needed:
            size = folder_bytes(entry.path) if entry.is_dir(follow_symlinks=False) else 0
            yield Waste(entry.path, "no job needs it", size, _reason_to_keep(entry.path))
        elif not (entry.is_symlink() or is_held(entry.path)):
            old = f"{entry.path}/checkpoints"
            if os.path.isfile(f"{entry.path}/DONE") and os.path.isdir(old) and not os.path.islink(old):
                yield Waste(old, "superseded", folder_bytes(old))  # by the finished student
            yield from _half_written(files_below(entry.path))


def _half_written(paths: Iterable[str]) -> Iterator[Waste]:
    """The files that a killed process did not finish."""
    for path in paths:
        if _LEFT_OVER.fullmatch(os.path.basename(path)) and os.path.isfile(path) and not os.path.islink(path):
            state = os.stat(path)
            if time.time() - state.st_mtime > _LEFT_OVER_SECONDS:
                yield Waste(path, "half written", state.st_size)


def _reason_to_keep(path: str) -> str:
    """Why a folder with the name of a stage directory stays; empty if it may be deleted."""
    try:
        refuse_links(path)
        names = os.listdir(path)
        if is_held(path):
            return "in use"
        if all(map(_LEASE.fullmatch, names)):  # the run was killed as it began
            return ""
        digest = hashlib.sha256(read_file(f"{path}/identity.json", MOST_BYTES)).hexdigest()
    except CheckpointError:
        return "it is a link, has one, or is nested too deeply"
    except OSError:
        return "no folder of raydistill's"
    return "" if path.endswith(f"-{digest[:12]}") else "no folder of raydistill's"


def delete(waste: Waste) -> bool:
    """Delete it, and return whether it did: another command may have begun to use it. It renames a folder first, so
    that no command finds a part of it. A link in its place stays. Raises OSError."""
    folder, name = os.path.split(waste.path)
    gone = waste.path if _HALF_DELETED.fullmatch(name) else f"{folder}/.deleted-{name}"
    if os.path.islink(waste.path):
        return False
    with contextlib.suppress(FileNotFoundError):  # another `clean` was first
        if name == "checkpoints":
            from raydistill.engine.checkpoints import drop_checkpoints  # imports torch

            drop_checkpoints(folder)
        elif not os.path.isdir(waste.path):
            os.unlink(waste.path)
        elif gone != waste.path and _reason_to_keep(waste.path) and os.path.exists(waste.path):
            return False
        else:
            os.rename(waste.path, gone)
            try:
                shutil.rmtree(gone)  # follows no links
            except RecursionError:
                raise OSError(errno.ENAMETOOLONG, "its folders are nested too deeply", gone) from None
    return True

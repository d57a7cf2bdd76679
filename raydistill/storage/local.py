"""Local folders: new ones are private to this user, and links in a workspace are refused."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from raydistill.errors import CheckpointError


def make_private(folder: str) -> None:
    """Make a local folder, and missing ones above it. A new one is private to this user."""
    with contextlib.suppress(FileExistsError):
        os.makedirs(folder, mode=0o700)


def create_here(place: str, data: bytes) -> None:
    """Write a whole file if none exists. Raises FileExistsError."""
    temporary = Path(f"{place}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        os.link(temporary, place)  # unlike a rename, this replaces nothing
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        with open(place, "xb") as file:  # exFAT and some network disks have no links
            file.write(data)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_links(place: str) -> None:
    """Raises CheckpointError if a local path, or anything below it, is a link. A workspace may be untrusted: nothing is
    read, written or deleted through its links."""
    waiting = [place]
    while waiting:
        folder = waiting.pop()
        refuse_link(folder)
        try:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
                waiting += [entry.path for entry in entries if entry.is_symlink() or entry.is_dir()]
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise CheckpointError(f"{place} has folders that are nested too deeply; delete it") from None


def files_below(place: str) -> Iterator[str]:
    """The paths of all files below a local folder, without following links. What has gone, belongs to another user or
    is nested too deeply for a path is left out."""
    waiting = [place]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    yield entry.path


def refuse_link(place: str) -> None:
    """Like `refuse_links`, for the path only."""
    if os.path.islink(place):
        raise CheckpointError(
            f"{place} is a link to {os.readlink(place)}, and links in a workspace are not followed; delete the "
            "link, or replace it with what it points to"
        )

"""Prepares the environment of a command: standard streams, a home folder, a user name."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import stat
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from raydistill.errors import ConfigError
from raydistill.runtime import interrupts


def prepare_environment() -> None:
    """Raises ConfigError if there is no folder for temporary files, which Ray and all writers need."""
    # torch's threads spin while they wait for each other, for long by default. On 2 cores beside one busy process,
    # 30,000 rounds trained at 88 images/s where the default gave 35 to 50, and no slower on idle cores. Not spinning at
    # all is better still beside other processes, but costs a sixth on idle cores. It is read when torch loads, also in
    # Ray's processes.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        raise ConfigError("no folder for temporary files is writable; set TMPDIR to a writable folder") from None
    _name_the_user()
    _find_a_home(folder)
    # In a notebook Ray and tqdm ask for ipywidgets when they are imported. Nothing here needs it.
    logging.getLogger("ray.widgets").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "IProgress not found")


class _Output(io.FileIO):
    """Standard output. When its reader has gone, as with `head`, the command ends as by SIGPIPE, and no thread that
    writes fails."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            interrupts.interrupt(signal.SIGPIPE)
            return len(data)


def open_streams() -> None:
    """Standard streams that accept any text, even if they are closed."""
    for descriptor in range(3):  # otherwise the next opened file would take a closed one's number
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding
    output = io.BufferedWriter(_Output(1, "w", closefd=False))
    # Line by line, even into a file, so that a log's lines appear when things happen.
    sys.stdout = io.TextIOWrapper(output, encoding, errors="backslashreplace", line_buffering=True)
    # A copy of descriptor 2: Ray's start redirects the usual one for a while, and an error may come then.
    encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
    sys.stderr = open(os.dup(2), "w", 1, encoding, "backslashreplace")  # noqa: SIM115


def _name_the_user() -> None:
    """A container may run as a user who is not in the passwd file; torch and MLflow ask for a name."""
    import getpass

    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user{os.getuid()}"


def private_folder(above: str) -> Path:
    """A private folder of this user in a folder that others may write to; the same one each time. Raises OSError, also
    if somebody else made it, or it is a link, or others may look into it."""
    own = Path(above) / f"raydistill-{os.getuid()}"
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = own.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(errno.EPERM, "it is not this user's alone", str(own))
    return own


def _find_a_home(temporary: str) -> None:
    """Ray's token and the libraries' caches are in the home folder. If that is not writable, a private folder replaces
    it; models in a read-only home are still found."""
    home = Path(os.path.expanduser("~"))
    if home.is_absolute() and os.access(home, os.W_OK | os.X_OK):
        return
    try:
        own = private_folder(temporary)
    except OSError as error:
        raise ConfigError(
            f"HOME={home} is not writable, and {error.filename} cannot be used: {error.strerror}; set HOME to a folder"
        ) from None
    for name, cache in (("HF_HOME", "huggingface"), ("TORCH_HOME", "torch")):
        if (home / ".cache" / cache).is_dir():
            os.environ.setdefault(name, str(home / ".cache" / cache))
    os.environ["HOME"] = str(own)
    print(f"HOME={home} cannot be written to: caches go to {own}; to keep them, set HOME to a folder", file=sys.stderr)

"""What a command finds around itself, made fit before anything else looks at it: streams, a home, a user's name."""

from __future__ import annotations

import errno
import io
import os
import signal
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

from raydistill.errors import ConfigError
from raydistill.runtime import interrupts


def prepare_environment() -> None:
    """Raises ConfigError where there is no folder for temporary files, which Ray and all writers need."""
    # torch's threads spin while they wait for each other, for long by default. On 2 cores beside one busy process,
    # 30,000 rounds trained at 88 images/s where the default gave 35 to 50, and on idle cores no slower; not spinning at
    # all is better still beside others, and costs a sixth on idle cores. Read when torch loads, in Ray's processes too.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        raise ConfigError(
            "no folder for temporary files can be written to; set TMPDIR to one that this user may write to"
        ) from None
    _name_the_user()
    _find_a_home(folder)


class _Output(io.FileIO):
    """Standard output. When its reader has gone, as `head` does, the command ends as by SIGPIPE, and no thread that
    writes fails."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            interrupts.interrupt(signal.SIGPIPE)
            return len(data)


def open_streams() -> None:
    """Standard streams that take whatever comes, also where they are closed."""
    for descriptor in range(3):  # a closed one would be given to the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding
    output = io.BufferedWriter(_Output(1, "w", closefd=False))
    # Line by line, also into a file: a log's lines then appear when things happen.
    sys.stdout = io.TextIOWrapper(output, encoding, errors="backslashreplace", line_buffering=True)
    # A copy of descriptor 2: Ray's start points the usual one elsewhere for a while, and an error may come meanwhile.
    encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
    sys.stderr = open(os.dup(2), "w", 1, encoding, "backslashreplace")  # noqa: SIM115


def _name_the_user() -> None:
    """A container may run as a user that no passwd file knows; torch and MLflow ask for a name."""
    import getpass

    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user{os.getuid()}"


def private_folder(above: str) -> Path:
    """A folder of this user's alone in one that others may write to; the same one each time.

    Raises OSError, also where somebody else made it, or a link, or may look into it.
    """
    own = Path(above) / f"raydistill-{os.getuid()}"
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = own.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(errno.EPERM, "it is not this user's alone", str(own))
    return own


def _find_a_home(temporary: str) -> None:
    """Ray's token and the libraries' caches are in the home. Where that cannot be written to, a private folder stands
    in; models in a read-only home are still found."""
    home = Path(os.path.expanduser("~"))
    if home.is_absolute() and os.access(home, os.W_OK | os.X_OK):
        return
    try:
        own = private_folder(temporary)
    except OSError as error:
        raise ConfigError(
            f"HOME={home} cannot be written to, nor {error.filename} used: {error.strerror}; set HOME to a folder"
        ) from None
    for name, cache in (("HF_HOME", "huggingface"), ("TORCH_HOME", "torch")):
        if (home / ".cache" / cache).is_dir():
            os.environ.setdefault(name, str(home / ".cache" / cache))
    os.environ["HOME"] = str(own)
    print(f"HOME={home} cannot be written to: caches go to {own}; to keep them, set HOME to a folder", file=sys.stderr)

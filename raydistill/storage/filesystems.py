"""The only code that opens file systems: without caches of listings, and with retries.

fsspec keeps a bucket's listing as long as a process lives, so this process would not see a file that another one wrote.
And remote storage does not always answer: a call is retried for a while before a run ends.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import os
import stat
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.config import conf
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem, make_path_posix
from safetensors import SafetensorError

from raydistill.errors import ConfigError, DataError, StageError, StorageError
from raydistill.runtime import metrics
from raydistill.storage.buckets import EXTRAS, WITH_BUCKETS, no_bucket, refuse_odd_bucket
from raydistill.storage.local import create_here
from raydistill.storage.retries import code_of, with_retries

PATIENCE_SECONDS = 60.0
# Errors of the machine: the next file would meet them too.
OF_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class FileSystem:
    """A file system of fsspec. Each call is retried for `patience` seconds while storage does not answer, and then
    raises StorageError; PermissionError if the key is refused."""

    def __init__(self, fs: Any, patience: float) -> None:
        self._fs, self._patience = fs, patience

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._fs, name)
        return functools.partial(with_retries, value, self.is_local, self._patience) if callable(value) else value

    def __reduce__(self) -> tuple[Any, ...]:
        return FileSystem, (self._fs, self._patience)

    @property
    def is_local(self) -> bool:
        return isinstance(self._fs, LocalFileSystem)

    @property
    def has_buckets(self) -> bool:
        protocol = self._fs.protocol
        return not WITH_BUCKETS.isdisjoint([protocol] if isinstance(protocol, str) else protocol)

    def open(self, place: str, mode: str = "rb", **options: Any) -> Any:
        """Raises OSError, also if the file to read is not a regular one."""
        if self.is_local and mode == "rb":
            return with_retries(open_file, True, self._patience, place)
        file = with_retries(self._fs.open, self.is_local, self._patience, place, mode, **options)
        if fetch := getattr(getattr(file, "cache", None), "fetcher", None):  # reads a bucket's file part by part

            def fetch_from(_: str, start: int, end: int) -> Any:
                return fetch(start, end)

            file.cache.fetcher = functools.partial(with_retries, fetch_from, self.is_local, self._patience, place)
        return file

    def cat_file(self, place: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if self.is_local:
            open_file(place).close()
        options |= {"start": start, "end": end}  # by name: the second parameter of s3fs is a version
        data = bytes(with_retries(self._fs.cat_file, self.is_local, self._patience, place, **options))
        metrics.count_bytes("read", place, len(data))
        return data

    def read_at_most(self, place: str, most: int) -> bytes:
        """A whole untrusted file; of a bucket in one request, without asking for its size. Raises OSError, also if it
        has more bytes."""
        if self.is_local:
            return with_retries(read_file, True, self._patience, place, most)
        if not self.has_buckets and (size := self.size(place) or 0) > most:
            raise too_large(size, most, place)
        data = self.begin(place, most + 1) if self.has_buckets else self.cat_file(place)
        if len(data) > most:
            raise too_large(len(data) if not self.has_buckets else self.size(place), most, place)
        return data

    def read_whole(self, place: str) -> bytes:
        """A whole file of ours, in one request. Raises FileNotFoundError."""
        # s3fs would ask for the size in order to read in parts.
        return self.cat_file(place, **({"max_concurrency": 1} if "s3" in self._fs.protocol else {}))

    def has_file(self, place: str) -> bool:
        """In one request, where `exists` also lists a file that is missing, as if it were a folder."""
        if not self.has_buckets:
            return bool(self.exists(place))
        try:
            self.begin(place, 1)
        except FileNotFoundError:
            return False
        return True

    def begin(self, place: str, most: int) -> bytes:
        """The first bytes of a bucket's file."""
        try:
            return self.cat_file(place, 0, most)
        except Exception as error:  # each client has its own
            if code_of(error) not in ("InvalidRange", "416"):
                raise
            return b""  # an empty file has no first byte

    def make_folder(self, place: str) -> None:
        """With all folders above it. A bucket has no folders, and a misspelt name makes no bucket."""
        if not self.has_buckets:
            self.makedirs(place, exist_ok=True)

    def names(self, place: str) -> list[str]:
        """The names of the files and folders in a folder, sorted; none if it does not exist."""
        try:
            return sorted(entry.rstrip("/").rpartition("/")[2] for entry in self.ls(place, detail=False))
        except (FileNotFoundError, NotADirectoryError):  # the latter if a file is in the folder's place
            return []

    def read(self, place: str, most: int = 1 << 25) -> bytes | None:
        """A small file's bytes, or None if it does not exist. Raises as `read_at_most`."""
        try:
            return self.read_at_most(place, most)
        except FileNotFoundError:
            return None

    def remove_if_empty(self, folder: str) -> None:
        """Delete a folder of a disk. In a bucket a folder ends with its last file."""
        with contextlib.suppress(OSError):
            if self.is_local:
                self.rmdir(folder)

    def remove_file(self, place: str) -> None:
        """Delete a file, if it exists; of a bucket in one request."""
        with contextlib.suppress(FileNotFoundError):
            (self.rm_file if self.has_buckets else self.remove)(place)

    def remove(self, place: str) -> None:
        """Delete a file, or a folder with its contents, if it exists."""
        try:
            # All file systems but the local one read characters such as [ as a pattern.
            self.rm(place if self.is_local else glob.escape(place), recursive=True)
        except FileNotFoundError:
            return


def open_filesystem(path: str, patience: float = PATIENCE_SECONDS, **options: Any) -> tuple[FileSystem, str]:
    """The file system of a path or URL, and the path in its form. Raises ConfigError if no installed package knows the
    protocol."""
    if "://" not in path and not path.startswith(("file:/", "local:/")):
        # fsspec reads the local folders `a::b` and `file:x` as addresses.
        full = os.path.expanduser(path)
        full = full if os.path.isabs(full) else os.path.join(os.getcwd(), full)
        return FileSystem(LocalFileSystem(), patience), make_path_posix(full).rstrip("/") or "/"
    protocol = path.partition("://")[0]
    refuse_odd_bucket(path)
    options["use_listings_cache"] = False
    set_up = "AWS_MAX_ATTEMPTS" in os.environ or "config_kwargs" in conf.get("s3", {})
    if EXTRAS.get(protocol) == "s3" and not set_up:
        # s3fs retries around botocore's retries, and we retry around both: a wrong address took 14 s. And a server that
        # accepts a request and does not answer held each call for five minutes.
        connect, read = (10, 30) if patience else (4, 10)
        options["config_kwargs"] = {
            "retries": {"max_attempts": 1}, "connect_timeout": connect, "read_timeout": read,
        }  # fmt: skip
    try:
        fs, place = url_to_fs(path, **options)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        advice = f"; pip install 'raydistill[{extra}]'" if extra else ""
        raise ConfigError(f"{path}: the package for {protocol}:// is not installed ({error}){advice}") from None
    except (ValueError, OSError) as error:  # an unknown protocol, or one that opens a connection or a file at once
        raise ConfigError(f"{path}: {error}") from None
    if not patience and hasattr(fs, "retries"):  # its options differ, so it is not the cached one of the retried calls
        fs.retries = min(fs.retries, 2)
    return FileSystem(fs, patience), place


def open_file(path: str) -> BinaryIO:
    """Open a local file to read. Raises OSError, also for a pipe, which may never send, and a device, which has no end;
    ValueError for a name that no file can have."""
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", path)
    return file


def read_file(path: str, most: int) -> bytes:
    """A whole local file, up to the size that it states. Raises as `open_file`, and OSError if that is more than `most`
    bytes."""
    with open_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise too_large(size, most, path)
        metrics.count_bytes("read", path, size)
        return file.read(size)


def too_large(size: int, most: int, path: str | None = None) -> OSError:
    return OSError(errno.EFBIG, f"it has {size:,} bytes, above {most:,}", path)


def version_of(path: str, file: Any) -> str:
    """The version of an open file in storage. It changes when the file is written again."""
    fs, place = open_filesystem(path)
    return str(getattr(file, "details", None) or fs.info(place))


def refuse_unread(error: BaseException, shown: str) -> None:
    """Raises the error itself if it is about the machine, and DataError if it is about the file. Returns if it is about
    the content."""
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in OF_MACHINE:
            raise error
        raise DataError(f"{shown}: cannot be read: {error.strerror}") from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def read_bytes(path: str) -> bytes:
    """A whole file. Raises FileNotFoundError."""
    fs, place = open_filesystem(path)
    return fs.read_whole(place)


def exists(path: str) -> bool:
    """Whether there is a file."""
    fs, place = open_filesystem(path)
    return fs.has_file(place)


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file or none, as `write_file` does."""
    fs, target = open_filesystem(path)
    if fs.is_local:
        write_file(path, lambda temporary: Path(temporary).write_bytes(data))
    else:
        _send(fs.pipe_file, target, data, path)
        metrics.count_bytes("written", target, len(data))


def create_file(path: str, data: bytes) -> None:
    """Write a whole file if none exists. Raises FileExistsError, also if another process is first by a moment: on
    disks, and in the buckets of S3, Google and Azure."""
    fs, target = open_filesystem(path)
    if fs.is_local:
        create_here(target, data)
    else:
        fs.pipe_file(target, data, mode="create")


def write_file(path: str, write: Callable[[str], object]) -> None:
    """Let `write` write a whole file or none: to a temporary local file, which is then renamed or sent to a bucket.
    Raises StageError with the free bytes if the disk is full."""
    fs, target = open_filesystem(path)
    if not fs.is_local:
        with tempfile.TemporaryDirectory() as folder:
            write(f"{folder}/whole")
            _send(lambda place, whole: fs.put_file(whole, place), target, f"{folder}/whole", path)
            metrics.count_bytes("written", target, os.path.getsize(f"{folder}/whole"))
        return
    temporary = f"{target}.{uuid.uuid4().hex}.tmp"
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())  # otherwise a machine that loses power may keep the name without the bytes
            metrics.count_bytes("written", target, os.fstat(written.fileno()).st_size)
        os.replace(temporary, target)
    except BaseException as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        # The writers of torch and safetensors turn the system's error into their own.
        if not isinstance(error, OSError | RuntimeError | SafetensorError):
            raise
        reason, advice = error.strerror if isinstance(error, OSError) else error, "make its folder writable"
        if not (isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)):
            space = os.statvfs(next(parent for parent in Path(target).parents if parent.exists()))
            reason, advice = f"{reason}; {space.f_bavail * space.f_frsize:,} bytes are free there", "make room"
        raise StageError(
            f"{target}: cannot be written ({reason}); {advice} and run the same command again: what is finished stays"
        ) from error


def _send(call: Callable[[str, Any], object], place: str, what: Any, path: str) -> None:
    try:
        call(place, what)
    except FileNotFoundError:
        raise StorageError(f"{path}: {no_bucket(place)}") from None

"""Stage directories: `<workspace>/<stage>-<hash>/`. Each file in them appears whole or not at all, and DONE last."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import uuid
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeFloat, NonNegativeInt

from raydistill.config import RunConfig
from raydistill.errors import ConfigError, StageError, reason_of
from raydistill.runtime.versions import PACKAGES, installed
from raydistill.storage.filesystems import FileSystem, open_filesystem, write_bytes
from raydistill.storage.local import files_below, make_private, refuse_links
from raydistill.storage.state import read_state

GENERATED = "generated"  # the folder of the classes' own directories
PRECISION = "precision"  # the folder of what `precision: auto` stands for


class Bill(BaseModel):
    """The fields of `seconds.json` that are read."""

    seconds: NonNegativeFloat = 0.0
    node_seconds: dict[str, NonNegativeFloat] = {}
    lost_nodes: NonNegativeInt = 0
    images_again: NonNegativeInt = 0
    seconds_again: NonNegativeFloat = 0.0
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class StageDirectory:
    """One stage's directory in the workspace."""

    path: str
    stage: str
    identity: str  # JSON of what the hash covers

    @cached_property
    def fs(self) -> FileSystem:
        return open_filesystem(self.path)[0]

    @cached_property
    def place(self) -> str:
        """The path in the form of its file system."""
        return open_filesystem(self.path)[1]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def done(self) -> dict[str, Any] | None:
        """The stage's result, or None if it has not finished. Its path is this directory, whatever the marker says,
        because workspaces move. Raises CheckpointError for a link in the directory, or a damaged marker."""
        self._refuse_links()
        result = read_state(f"{self.path}/DONE", dict[str, Any])
        return None if result is None else result | {"path": self.path}

    def _refuse_links(self) -> None:
        if self.fs.is_local:
            between = self.place.rpartition("/")[0]  # the workspace, which may be a link, or a folder in it
            if between != self._root and os.path.islink(between):
                refuse_links(between)
            refuse_links(self.place)

    @property
    def _root(self) -> str:
        above = self.place.rpartition("/")[0]
        return above.rpartition("/")[0] if self.stage == GENERATED else above

    def started(self) -> bool:
        self._refuse_links()
        return self.fs.has_file(f"{self.place}/identity.json")

    def write(self, name: str, data: bytes) -> None:
        write_bytes(f"{self.path}/{name}", data)

    def write_json(self, name: str, value: object) -> None:
        self.write(name, json.dumps(value, indent=2, ensure_ascii=False).encode())

    def make(self) -> None:
        """Make the folder. A new workspace is private to this user; in an existing one the `umask` counts."""
        self._refuse_links()
        if self.fs.is_local:
            make_private(self._root)
        self.fs.make_folder(self.place)

    def begin(self) -> frozenset[str]:
        """Make the directory. Returns the names of what an earlier command left in it: a bucket is asked to list only a
        directory that has begun."""
        self.make()
        left = self.fs.names(self.place) if self.started() else []
        self.write("identity.json", self.identity.encode())
        return frozenset(left)

    def finish(self, result: dict[str, Any]) -> None:
        self.write_json("DONE", {name: value for name, value in result.items() if name != "path"})

    def write_bill(self, bill: dict[str, Any]) -> None:
        """Write the cost of the run that finished the stage, and its versions, for `read_bill`."""
        self.write_json("seconds.json", bill | {"versions": installed(PACKAGES)})


def free_bytes(config: RunConfig) -> float:
    """On the workspace's disk; infinite in a bucket, which states no limit."""
    fs, root = open_filesystem(workspace_root(config))
    if not fs.is_local:
        return math.inf
    return shutil.disk_usage(_existing(root)).free


def _existing(root: str) -> Path:
    """The path, or the nearest existing folder above it."""
    return next(place for place in (Path(root), *Path(root).parents) if os.path.exists(place))


def refuse_small_disk(config: RunConfig, what: str, need: float, advice: str) -> None:
    """Raises ConfigError, before anything is written, if the workspace's disk has less than is needed."""
    free = free_bytes(config)
    if need > free:
        raise ConfigError(
            f"{what} may take {need:,.0f} bytes, and {free:,.0f} are free in {workspace_root(config)}; {advice}, or "
            "make room"
        )


def read_seconds(path: str) -> float:
    """How long the run that finished a stage took, without the time of interrupted runs; 0 if unknown."""
    return float(read_bill(path).get("seconds", 0.0))


def finished_at(path: str) -> datetime:
    """When a stage finished."""
    fs, place = open_filesystem(path)
    modified: datetime = fs.modified(f"{place}/DONE")
    return modified


def read_bill(path: str) -> dict[str, Any]:
    """The `seconds` of the run that finished a stage and `versions` by package; on a cluster `node_seconds` by node
    type and `lost_nodes`; if a process or a node was lost, the `images_again` and `seconds_again` that this cost."""
    bill = read_state(f"{path}/seconds.json", Bill)
    return {} if bill is None else bill.model_dump(exclude_unset=True)


def workspace_root(config: RunConfig) -> str:
    """The workspace as an absolute path or URL without a trailing slash. Raises ConfigError if it is not a folder."""
    return absolute_root(config.workspace)


def absolute_root(workspace: str) -> str:
    """The same for a path that the user typed."""
    if "://" in workspace:
        return workspace.rstrip("/")
    root = os.path.abspath(os.path.expanduser(workspace))
    if (above := _existing(root)).is_dir():
        return root
    raise ConfigError(f"workspace={workspace}: {above} is a file, not a folder; choose another")


def folder_bytes(path: str) -> int:
    """The bytes of the files below a folder, without what its links lead to; 0 if it does not exist."""
    fs, place = open_filesystem(path)
    if not fs.is_local:
        return sum(entry["size"] or 0 for entry in fs.find(place, detail=True).values())  # fs.du would ask for each
    size = 0
    for file in files_below(place):
        with contextlib.suppress(OSError):  # another command's, or another user's
            size += os.lstat(file).st_size
    return size


def check_writable(config: RunConfig) -> None:
    """Raises ConfigError if the workspace is not writable."""
    root = workspace_root(config)
    fs, path = open_filesystem(root)
    mark = f".writable-{uuid.uuid4().hex}"  # another command may test at the same time
    try:
        if fs.is_local:
            make_private(path)
        fs.make_folder(path)
        write_bytes(f"{root}/{mark}", b"")
        fs.remove_file(f"{path}/{mark}")
    except (OSError, StageError) as error:
        cause = error.__cause__ or error  # the error itself may name the mark, which nobody knows
        reason = getattr(cause, "strerror", None) or reason_of(cause)
        raise ConfigError(f"workspace={config.workspace}: cannot be written ({reason}); choose another") from None

"""Jobs by name: `jobs/NAME/runs/KEY.json` lists the directories that a run of a job uses, and how it ended.

The links beside it (`jobs/NAME/distill`, `latest`) are for people. Nothing here reads or deletes through a link: only
the JSON counts, and from it only names in this workspace.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
import unicodedata
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from raydistill.config import RunConfig
from raydistill.errors import CheckpointError, ConfigError, StageError, did_you_mean, first_line_of
from raydistill.escaping import first_few, truncated
from raydistill.runtime.processes import is_running, process_name
from raydistill.secrets import redacted
from raydistill.storage.directory import workspace_root
from raydistill.storage.filesystems import open_filesystem, write_bytes
from raydistill.storage.lease import is_held
from raydistill.storage.local import refuse_link
from raydistill.storage.reachable import refuse_unreachable
from raydistill.storage.state import read_state

logger = logging.getLogger(__name__)
FOLDER, LATEST, PAGE = "jobs", "latest", "report.html"
_LONGEST_NAME = 64  # of 255 bytes that a file's name may have, where a letter has up to four
DIRECTORY = r"[a-z]+-[0-9a-f]{12}"
_KEY = re.compile(rf"([0-9a-f]{{12}}|{DIRECTORY})\.json")

Time = Annotated[float, Field(ge=0, le=2**33)]


class JobRun(BaseModel):
    """One run of a job. Times are seconds since 1970; `directories` are names in the workspace, by stage; `accuracies`
    are shares by network and split."""

    name: str
    title: str = ""
    process: str = ""
    started: Time = 0.0
    ended: Time | None = None
    error: str | None = None
    directories: dict[
        Annotated[str, Field(pattern="^[a-z_0-9]+$")], Annotated[str, Field(pattern=f"^{DIRECTORY}$")]
    ] = {}
    page: Annotated[str, Field(pattern=rf"^{DIRECTORY}/[a-z]+\.html$")] | None = None
    accuracies: dict[str, dict[str, float]] = {}


def job_name(config: RunConfig) -> str:
    """`name` or, if it is not set, the name of the images."""
    if config.name != RunConfig.model_fields["name"].default:
        return redacted(config.name)
    address = config.images.path.partition("?")[0] if "://" in config.images.path else config.images.path
    return redacted(re.split(r"[/:\\]", os.path.normpath(address))[-1].strip(".") or config.name)


def folder_name(name: str) -> str:
    """The job's name as a folder name that is valid on any disk. A name that had to be changed gets a hash, so two
    never become one."""
    safe = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", name))[:_LONGEST_NAME].strip("._-")
    if name and safe == name:
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:6]
    return f"{safe}-{digest}".strip("-")


class JobRecord:
    """Keeps the record of a run during the `with` block. If the record cannot be written, that is a warning, and the
    run continues; a link in the record's place raises CheckpointError."""

    def __init__(self, config: RunConfig, key: str, title: str) -> None:
        self._root, name = workspace_root(config), job_name(config)
        self._folder = f"{self._root}/{FOLDER}/{folder_name(name)}"
        self._path = f"{self._folder}/runs/{key}.json"
        _refuse_links(self._root, self._folder)
        before, self._is_told = None, False
        try:  # an earlier run of the same settings may have run more stages than this one
            before = read_state(self._path, JobRun)
        except PermissionError as error:
            logger.warning("%s: the job's record cannot be read (%s)", self._path, error.strerror)
        self.run = (before or JobRun(name=name)).model_copy(
            update={"name": name, "title": title, "process": process_name(), "started": time.time()}
            | {"ended": None, "error": None}
        )

    def __enter__(self) -> JobRecord:
        self._write()
        return self

    def uses(self, directories: Mapping[str, str]) -> None:
        """Record paths by stage. It is called before a stage writes, so that its directory always belongs to a run."""
        names = {stage: path.rpartition("/")[2] for stage, path in directories.items()}
        if not names.items() <= self.run.directories.items():
            self.run.directories |= names
            self._write()

    def results(self, accuracies: Mapping[str, Mapping[str, float]], page: str | None) -> None:
        """The results that `ls` and `open` show; written at the end."""
        self.run.accuracies = {who: dict(of_split) for who, of_split in accuracies.items()}
        self.run.page = "/".join(page.split("/")[-2:]) if page else self.run.page

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.run.ended = time.time()
        if error is not None:
            words = first_line_of(error) if isinstance(error, Exception) else "interrupted"
            self.run.error = redacted(truncated(words, redacted))[:500]
        self._write()
        if "://" not in self._root:
            self._link()

    def _write(self) -> None:
        try:
            _refuse_links(self._root, self._folder)
            write_bytes(self._path, self.run.model_dump_json(indent=2).encode())
        except (OSError, StageError) as error:
            if not self._is_told:
                logger.warning("%s: the job's record cannot be written (%s)", self._path, error)
            self._is_told = True

    def _link(self) -> None:
        links = {stage: f"../../{name}" for stage, name in self.run.directories.items()}
        if self.run.page:
            links[PAGE] = f"../../{self.run.page}"
        try:
            _refuse_links(self._root, self._folder)
            names = os.listdir(self._folder)
            if PAGE in names and (self.run.error is not None or PAGE not in links):
                return  # a run that did not end, or is one of a comparison, leaves the links to the student before
            before = os.readlink(f"{self._folder}/export") if "export" in names else ""
            if before and before != links.get("export", before) and os.path.isdir(f"{self._folder}/{before}"):
                words = "%s leads to this run from now on; the student before is in %s/%s"
                logger.warning(words, self._folder, self._root, os.path.basename(before))
            for name in names:  # those of the previous run, and none that another process makes now
                if os.path.islink(f"{self._folder}/{name}") and name not in links and not name.endswith(".tmp"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(f"{self._folder}/{name}")
            for name, target in links.items():
                if os.path.lexists(os.path.join(self._folder, target)):
                    _replace_link(f"{self._folder}/{name}", target)
            if self.run.error is None:
                _replace_link(f"{self._root}/{LATEST}", os.path.relpath(self._folder, self._root))
        except OSError as error:  # some disks have no links
            logger.warning("%s: its links cannot be written (%s)", self._folder, error)


def _replace_link(path: str, target: str) -> None:
    """Whole or not at all; raises OSError if something else than a link is there."""
    if os.path.lexists(path) and not os.path.islink(path):
        raise FileExistsError(f"{path} is there, and no link")
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    os.symlink(target, temporary)
    os.replace(temporary, path)


def _refuse_links(root: str, folder: str) -> None:
    """Raises CheckpointError if the folder of the records is a link."""
    if "://" not in root:
        for place in (f"{root}/{FOLDER}", folder, f"{folder}/runs"):
            refuse_link(place)


def read_jobs(workspace: str, all_or_none: bool = False, wanted: str = "") -> Iterator[tuple[str, JobRun]]:
    """The runs recorded in a workspace, by the path of the record. Damaged records are named and left out, or with
    `all_or_none` raise CheckpointError.

    Raises ConfigError if there is no workspace, or none with a record; it names the `wanted` job.
    """
    refuse_unreachable(workspace, "workspace")
    fs, root = open_filesystem(workspace)
    found = False

    @contextlib.contextmanager
    def damage_named() -> Iterator[None]:
        try:
            yield
        except (CheckpointError, PermissionError) as error:  # the latter for another user's files
            if all_or_none:
                raise CheckpointError(str(error)) from None
            logger.warning("left out: %s", error)

    _refuse_links(workspace, f"{workspace}/{FOLDER}")
    for name in fs.names(f"{root}/{FOLDER}"):
        folder, files = f"{workspace}/{FOLDER}/{name}", list[str]()
        with damage_named():
            _refuse_links(workspace, folder)
            files = fs.names(f"{root}/{FOLDER}/{name}/runs")
        for file in filter(_KEY.fullmatch, files):
            with damage_named():
                if (run := read_state(path := f"{folder}/runs/{file}", JobRun)) is not None:
                    found = True
                    yield path, run
    if not found:
        old = "; jobs of an older version get a record when they run again, which takes seconds if they are done"
        is_old = any(re.fullmatch(DIRECTORY, name) for name in fs.names(root))
        raise ConfigError(
            f"{f'no job {wanted!r}: ' if wanted else ''}{workspace}: no job has run here{old if is_old else ''}; if it "
            "ran elsewhere, give the folder that its `workspace` names"
        )


def state_of(workspace: str, run: JobRun) -> str:
    """done, failed, interrupted, running, or killed: without an end, and without a process that could bring it."""
    if run.ended is not None:
        return "done" if run.error is None else "interrupted" if run.error == "interrupted" else "failed"
    running = is_running(run.process)
    if running is None:  # on another machine
        places = [f"{workspace}/{name}" for name in run.directories.values()]
        running = any(is_held(place) for place in places if not os.path.islink(place))
    return "running" if running else "killed"


def named_runs(runs: list[tuple[str, JobRun]], name: str) -> list[tuple[str, JobRun]]:
    """The runs of one job. Raises ConfigError with the nearest name if there is none."""
    if found := [item for item in runs if name in (item[1].name, item[0].split("/")[-3])]:
        return found
    names = sorted({run.name for _, run in runs})
    raise ConfigError(f"no job {name!r} here{did_you_mean(name, names) or f'; there are {first_few(names)}'}")


def forget(workspace: str, paths: list[str]) -> None:
    """Delete records, and the links beside them if none is left."""
    for path in paths:
        folder = path.rpartition("/runs/")[0]
        _refuse_links(workspace, folder)
        Path(path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is there, or another `clean` was first
            os.rmdir(f"{folder}/runs")
            links = [f"{folder}/{name}" for name in os.listdir(folder)]
            latest = f"{workspace}/{LATEST}"
            if os.path.islink(latest) and os.readlink(latest) == os.path.relpath(folder, workspace):
                links.append(latest)
            for link in filter(os.path.islink, links):
                os.unlink(link)
            os.rmdir(folder)

"""MLflow's only writer: a thread of the driver, so that neither its start nor an outage delays a run."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from raydistill.config import RunConfig, shown_yaml
from raydistill.escaping import counted
from raydistill.runtime import interrupts
from raydistill.runtime.periodic import repeated
from raydistill.runtime.processes import process_name
from raydistill.secrets import redacted
from raydistill.storage.directory import workspace_root
from raydistill.tracking.experiments import experiment_name, find_experiment, mention_old_runs
from raydistill.tracking.liveness import end_children, end_dead, is_gone, signs_of_life
from raydistill.tracking.recording import ChildRun, Run, named, save_model
from raydistill.tracking.stores import UnusableError, connect, is_transient, reason, store_lock, tracking_uri
from raydistill.tracking.workspace_store import put_files, refuse_links_of, refuse_programs

logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_TRIES = 5.0
_GRACE_SECONDS = 30.0
_GRACE_OF_STRANGERS = 5.0  # for a store that never answered
_SECONDS_BETWEEN_BEATS = 60.0


class Tracker:
    """One parent run for each `job`, one child for each stage directory. A resumed stage continues its old run, and
    nothing is recorded twice.

    Every call returns at once. While MLflow does not answer, records wait, until half a minute after the run has ended.
    Records that MLflow refuses are left out. Each problem is a warning, and the last one names what is missing.
    """

    def __init__(self, config: RunConfig, job: str, title: str = "") -> None:
        self._config = config
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self.client: Any = None
        self._closing, self._closed_at = threading.Event(), math.inf
        self._trouble, self._missing = False, Counter[str]()
        self._beating = threading.Event()
        self._guest = self._recording = False
        self.experiment = ""
        self.changed = False  # something is in the store that was not there before
        self.uri, self._whence = tracking_uri(config)
        self._shown = redacted(self.uri)
        root = workspace_root(config)
        # The folder of the runs' files. A workspace's own store may be untrusted, or a copy, so the path that it names
        # does not count.
        is_own = self.uri == f"sqlite:///{root}/mlflow.db"
        self._files = Path(root, "mlartifacts").as_uri() if is_own else ""
        self._failed = not config.tracking.enabled
        if not self._failed and not self.uri:
            logger.warning("no MLflow run: SQLite needs a local workspace; set tracking.uri to a server")
            self._failed = True
        if not self._failed:
            mention_old_runs(root, self._shown)
        self.submit("the run", self._open)
        self.parent = Run(
            self, f"{config.name} · {title}" if title else config.name, {"raydistill.job": named(job)}, signs_of_life()
        )
        self.submit("the run's settings", self._begin)
        interrupts.before_forced_end.append(self._kill)
        self._beats = contextlib.ExitStack()
        self._beats.enter_context(repeated(self._beat, _SECONDS_BETWEEN_BEATS, "mlflow-beat"))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close("FINISHED" if kind is None else _how_it_ended(kind))

    @contextlib.contextmanager
    def child(self, name: str, directory: str = "", settings: dict[str, Any] | None = None) -> Iterator[ChildRun]:
        """A child run during a stage or a trial; its status tells how that ended. `directory` distinguishes runs of one
        name, and `settings` are what decides the result."""
        run = ChildRun(self, name, directory)
        if settings:
            run.params(settings)
        try:
            yield run
        except BaseException as error:
            run.end(_how_it_ended(type(error)))
            raise
        run.end("FINISHED")

    def close(self, status: str) -> None:
        """End the parent run and wait until all is written."""
        self.submit("how the run ended", lambda: self._end(status))
        self._closed_at = time.monotonic()
        self._closing.set()
        self._beats.close()
        self._writer.shutdown(wait=True)
        with contextlib.suppress(ValueError):  # the text of the warning
            interrupts.before_forced_end.remove(self._kill)
        if self._missing and not self._recording:
            logger.warning("nothing of this run is in MLflow at %s", self._shown)
        elif self._missing:
            what = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in self._missing.items())
            words = "%s of this run missing in MLflow at %s: %s"
            logger.warning(words, counted(self._missing.total(), "records"), self._shown, what)

    def _kill(self) -> None:
        self.end_orphans()
        self.close("KILLED")

    def end_orphans(self) -> None:
        """Mark children that a killed command left open as killed; a resumed one is opened again."""

        def end() -> None:
            if not self._guest:
                end_children(self.client, self.experiment, self.parent.id)

        self.submit("runs that were killed", end)

    def log_model(self, onnx_file: str, example: np.ndarray, about: dict[str, Any], register_as: str | None) -> None:
        """The ONNX file as the run's MLflow model, `model`, with its signature and an input example; once. It is
        registered if a name is given and no version of it is this run's."""

        def write() -> None:
            run = self.parent.id
            self.parent.once("model", lambda folder: save_model(onnx_file, example, about, folder))
            if register_as is None or self.client.search_model_versions(f"run_id = '{run}'"):
                return
            if not self.client.search_registered_models(f"name = '{register_as}'"):
                self.client.create_registered_model(register_as)
            place = f"{self._files}/{run}/artifacts" if self._files else self.client.get_run(run).info.artifact_uri
            self.client.create_model_version(register_as, f"{place}/model", run)

        self.submit("the model", write)

    def keep(self, run: str, path: str, folder: str | None = None) -> None:
        """A file or folder among the run's files, replacing earlier ones; in the writer's thread."""
        from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

        if not self._files:
            log = self.client.log_artifacts if Path(path).is_dir() else self.client.log_artifact
            log(run, path, folder)
        elif not re.fullmatch(r"[0-9a-f]{32}", run):
            raise UnusableError(f"has a run {run!r:.50}, which is not a valid run id: MLflow did not make it")
        else:
            own = LocalArtifactRepository(f"{self._files}/{run}/artifacts")
            (own.log_artifacts if Path(path).is_dir() else own.log_artifact)(path, folder)

    def keep_text(self, run: str, text: str, name: str) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch, name).write_text(text, encoding="utf-8")
            self.keep(run, f"{scratch}/{name}")

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """While this process looks and writes, no other one on this workspace or database does."""
        return store_lock(self.uri, workspace_root(self._config))

    def submit(self, what: str, call: Callable[[], None]) -> None:
        """Queue a call for the writer; `what` names it if it is lost. After `close` there is no writer: a forced end
        may close a second time."""
        if not self._failed and not self._closing.is_set():
            self._writer.submit(self._guarded, what, call)

    def _guarded(self, what: str, call: Callable[[], None]) -> None:
        while not self._failed:
            grace = _GRACE_SECONDS if self._recording else min(_GRACE_SECONDS, _GRACE_OF_STRANGERS)
            if self._trouble and time.monotonic() > self._closed_at + grace:
                self._missing[what] += 1
                return
            try:
                call()
            except UnusableError as error:
                self._failed = True
                self._missing[what] += 1
                named_by = "" if self._whence == "the workspace" else f" ({self._whence})"
                logger.warning("no MLflow run: %s%s %s", self._shown, named_by, error)
                return
            except Exception as error:  # MLflow, its database and its server fail in many ways; none may stop a run
                if not is_transient(error):
                    self._failed = not self._recording  # there is no store to record in
                    self._missing[what] += 1
                    words = "MLflow at %s refuses a record, which is left out: %s (%s)"
                    logger.warning(words, self._shown, what, reason(error))
                    return
                if not self._trouble:
                    words = "MLflow at %s does not answer (%s); what is to be recorded waits"
                    logger.warning(words, self._shown, reason(error))
                self._trouble = True
                if self._closing.wait(_SECONDS_BETWEEN_TRIES):
                    time.sleep(min(_SECONDS_BETWEEN_TRIES, 1.0))
            else:
                if self._trouble:
                    logger.warning("MLflow at %s answers again", self._shown)
                self._trouble = False
                return

    def _open(self) -> None:
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # between our own lines
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # MLflow looks for git, and complains if there is none
        if self._files:
            refuse_links_of(self.uri)
            refuse_programs(self.uri)
        self.client = connect(self.uri)
        name, whence = experiment_name(self._config)
        with self.lock():
            self.experiment = find_experiment(self.client, name, whence, self._files)
        if self._files:
            for place in put_files(self.uri, self.experiment, self._files):
                words = "MLflow at %s names %s as the place of files; they go into the workspace"
                logger.warning(words, self._shown, place)
        end_dead(self.client, self.experiment)

    def _begin(self) -> None:
        """The tags and name with which the parent run is found or created."""
        self._recording = True
        before, mine = self.parent.before, process_name()
        others = before is not None and before.data.tags.get("raydistill.process") != mine
        # The runs of dead processes have just been ended.
        self._guest = others and before.info.status == "RUNNING"
        if not self._guest:
            self._take_over()
        self.parent.write_params(self._config.resolved.model_dump(mode="json"))
        self.keep_text(self.parent.id, shown_yaml(self._config), "config.yaml")

    def _take_over(self) -> None:
        """Tags: this process is the one that the run lives and ends with."""
        self._guest = False
        self.client.update_run(self.parent.id, status="RUNNING")
        for tag, value in signs_of_life().items():
            self.client.set_tag(self.parent.id, tag, value)

    def _end(self, status: str) -> None:
        """If another process works on the run too, the run ends with that process. A finished run that is asked for
        again keeps its end time, if nothing is new."""
        if not self.parent.id or (self._guest and self._is_led()):
            return
        before = self.parent.before
        same = before is not None and before.info.status == status and not self.changed
        self.client.set_terminated(self.parent.id, status, before.info.end_time if before and same else None)

    def _is_led(self) -> bool:
        """Whether another process works on this run."""
        run = self.client.get_run(self.parent.id)
        return run.info.status == "RUNNING" and is_gone(run) is False

    def _beat(self) -> None:
        """A sign of life on the parent run, for other machines; one at a time, however long MLflow does not answer."""

        def write() -> None:
            try:
                if self._guest and not self._is_led():
                    self._take_over()
                if not self._guest:
                    self.client.set_tag(self.parent.id, "raydistill.alive", f"{time.time():.0f}")
            except Exception as error:
                if is_transient(error):  # this one is tried again
                    raise
                self._beating.clear()
                raise
            self._beating.clear()

        if not self._beating.is_set():
            self._beating.set()
            self.submit("a sign of life", write)


def _how_it_ended(kind: type[BaseException]) -> str:
    """After a signal, the signal counts as the cause of the end, whatever else fails."""
    return "KILLED" if interrupts.was_interrupted() or issubclass(kind, KeyboardInterrupt) else "FAILED"

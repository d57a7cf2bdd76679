"""MLflow, written by one writer: a thread of the driver, so that neither its start nor an outage holds up a run."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from raydistill.config import RunConfig, to_yaml
from raydistill.infra import interrupts
from raydistill.infra.artifacts import workspace_root

logger = logging.getLogger(__name__)
_MOST_CHARACTERS = 500
_SECONDS_BETWEEN_TRIES = 5.0
_GRACE_SECONDS = 30.0
_SECONDS_BETWEEN_BEATS = 60.0
_SILENT_SECONDS = 15 * 60.0  # room for clocks that differ, and for a server that was away for a while
# When a process began follows from the clock, which may be put right meanwhile.
_CLOCK_SECONDS = 60.0


def _named(text: str) -> str:
    """A name that MLflow takes: class names, prompts and arms may have letters that it refuses."""
    return re.sub(r"[^/\w.\- ]", "_", text)


class Tracker:
    """One parent run for each job, one child for each stage directory; a resumed stage goes on in its old run.

    Every call returns at once. While MLflow does not answer, what is to be recorded waits, until the run has ended and
    half a minute more; what it refuses is left out. Each is a warning.
    """

    def __init__(self, config: RunConfig, job: str) -> None:
        self._config, self._job = config, _named(job)  # stands between quotes in queries
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._client: Any = None
        self._closing, self._deadline = threading.Event(), math.inf
        self._trouble, self._lost = False, 0
        self._beating = threading.Event()
        self._experiment = self._parent = ""
        self._failed = not config.tracking.enabled
        self.uri = config.tracking.uri or f"sqlite:///{workspace_root(config)}/mlflow.db"
        if config.tracking.uri is None and "://" in workspace_root(config):
            logger.warning("no MLflow run: SQLite needs a local workspace; set tracking.uri to a server")
            self._failed = True
        if not self._failed:
            self._mention_old_runs()
        self._submit(self._open)
        interrupts.last_words.append(self._kill)
        threading.Thread(target=self._beat, name="mlflow-beat", daemon=True).start()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close("FINISHED" if kind is None else _how_it_ended(kind))

    @contextlib.contextmanager
    def child(self, name: str) -> Iterator[ChildRun]:
        """A child run for the time of a stage or a trial; its status tells how that ended."""
        run = ChildRun(self, name)
        try:
            yield run
        except BaseException as error:
            run.end(_how_it_ended(type(error)))
            raise
        run.end("FINISHED")

    def close(self, status: str) -> None:
        """End the parent run and wait until all is written."""
        self._submit(lambda: self._client.set_terminated(self._parent, status))
        self._deadline = time.monotonic() + _GRACE_SECONDS
        self._closing.set()
        self._writer.shutdown(wait=True)
        with contextlib.suppress(ValueError):  # it is what was called
            interrupts.last_words.remove(self._kill)
        if self._lost:
            logger.warning("%d record(s) of this run are not in MLflow at %s", self._lost, self.uri)

    def _kill(self) -> None:
        self.end_orphans()
        self.close("KILLED")

    def end_orphans(self) -> None:
        """Children that a killed command left open end as killed; one that is gone on with is opened again."""
        self._submit(lambda: self._end_children(self._parent))

    def log_job(self, metrics: dict[str, float], artifacts: list[str]) -> None:
        def write() -> None:
            for name, value in metrics.items():
                self._client.log_metric(self._parent, _named(name), value)
            for path in artifacts:
                self._client.log_artifact(self._parent, path)

        self._submit(write)

    def log_model(self, onnx_file: str, example: np.ndarray, about: dict[str, Any], register_as: str | None) -> None:
        """The ONNX file as the run's MLflow model, `model`, with its signature and an input example; once. Registered,
        where a name is given, if no version of it is this run's."""

        def write() -> None:
            if not self._client.list_artifacts(self._parent, "model"):
                with tempfile.TemporaryDirectory() as folder:
                    _save_model(onnx_file, example, about, f"{folder}/model")
                    self._client.log_artifacts(self._parent, f"{folder}/model", "model")
            if register_as is None or self._client.search_model_versions(f"run_id = '{self._parent}'"):
                return
            if not self._client.search_registered_models(f"name = '{register_as}'"):
                self._client.create_registered_model(register_as)
            source = f"{self._client.get_run(self._parent).info.artifact_uri}/model"
            self._client.create_model_version(register_as, source, self._parent)

        self._submit(write)

    def _beat(self) -> None:
        """Every minute, a sign of life on the parent run, for who looks from another machine; one at a time, however
        long MLflow does not answer."""

        def write() -> None:
            self._client.set_tag(self._parent, "raydistill.alive", f"{time.time():.0f}")
            self._beating.clear()

        while not self._closing.wait(_SECONDS_BETWEEN_BEATS):
            if not self._beating.is_set():
                self._beating.set()
                with contextlib.suppress(RuntimeError):  # the writer is closed a moment after the wait has ended
                    self._submit(write)

    def _submit(self, call: Callable[[], None]) -> None:
        if not self._failed:
            self._writer.submit(self._guarded, call)

    def _guarded(self, call: Callable[[], None]) -> None:
        while not self._failed:
            if self._trouble and time.monotonic() > self._deadline:
                self._lost += 1
                return
            try:
                call()
            except Exception as error:  # MLflow, its database and its server fail in many ways; none may stop a run
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                if not _may_pass(error):
                    self._failed = not self._parent  # there is nothing to record in
                    self._lost += 1
                    logger.warning("MLflow at %s refuses a record, which is left out (%s)", self.uri, first)
                    return
                if not self._trouble:
                    logger.warning("MLflow at %s does not answer (%s); what is to be recorded waits", self.uri, first)
                self._trouble = True
                if self._closing.wait(_SECONDS_BETWEEN_TRIES):
                    time.sleep(min(_SECONDS_BETWEEN_TRIES, 1.0))
            else:
                if self._trouble:
                    logger.warning("MLflow at %s answers again", self.uri)
                self._trouble = False
                return

    def _open(self) -> None:
        # Its own retries would hold the writer for minutes, also when the run has ended.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # between our own lines
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # MLflow asks for git, and says so where there is none
        logging.getLogger("alembic").setLevel(logging.WARNING)
        import mlflow  # half a second, here in the writer's thread

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._client = mlflow.MlflowClient(tracking_uri=self.uri)
        name = self._config.name
        found = self._client.get_experiment_by_name(name)
        self._experiment = found.experiment_id if found else self._new_experiment(name)
        self._end_dead()
        self._parent = self._reopen(f"tags.`raydistill.job` = '{self._job}'", {"raydistill.job": self._job}, name)
        self._client.set_tag(self._parent, "raydistill.process", _process(os.getpid()))
        self._client.set_tag(self._parent, "raydistill.alive", f"{time.time():.0f}")
        self._log_params(self._parent, self._config.model_dump(mode="json"))
        self._client.log_text(self._parent, to_yaml(self._config), "config.yaml")

    def _new_experiment(self, name: str) -> str:
        """Its files lie beside the workspace's own database: MLflow would put them wherever the command was given."""
        place = None
        if self._config.tracking.uri is None:
            place = Path(workspace_root(self._config), "mlartifacts").as_uri()
        made: str = self._client.create_experiment(name, artifact_location=place)
        return made

    def _mention_old_runs(self) -> None:
        """MLflow kept runs in folders before it wanted a database. Today's `mlruns` has files alone, no meta.yaml."""
        for place in sorted({Path.cwd(), Path(workspace_root(self._config)).parent}):
            if any(place.glob("mlruns/*/meta.yaml")):
                logger.warning(
                    "%s/mlruns has runs that are not in MLflow at %s; to see them: mlflow migrate-filestore --source "
                    "%s --target sqlite:///old.db, then mlflow ui --backend-store-uri sqlite:///old.db",
                    place, self.uri, place,
                )  # fmt: skip

    def _end_children(self, parent: str) -> None:
        query = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
        for run in self._client.search_runs([self._experiment], query):
            self._client.set_terminated(run.info.run_id, "KILLED")

    def _end_dead(self) -> None:
        """Runs whose process is gone, as after SIGKILL, and another machine's that are silent for a quarter of an hour
        end as killed; this job's is opened again."""
        for run in self._client.search_runs([self._experiment], "attributes.status = 'RUNNING'"):
            process = run.data.tags.get("raydistill.process")
            if process is not None and _is_gone(process, run.data.tags.get("raydistill.alive")):
                self._end_children(run.info.run_id)
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _reopen(self, query: str, tags: dict[str, str], name: str, ended: str | None = None) -> str:
        """The run with these tags, made if there is none. A run that a killed driver left open is gone on with; none is
        given where it has the status `ended`."""
        runs = self._client.search_runs([self._experiment], query, max_results=1)
        if runs:
            if runs[0].info.status == ended:
                return ""
            run_id: str = runs[0].info.run_id
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        created: str = self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id
        return created

    def _log_params(self, run_id: str, tree: dict[str, Any], prefix: str = "") -> None:
        """Short scalars as params; one that changed since the run began becomes a tag, since params cannot change."""
        from mlflow.exceptions import MlflowException

        for key, value in tree.items():
            if isinstance(value, dict):
                self._log_params(run_id, value, f"{prefix}{key}.")
            elif len(str(value)) <= _MOST_CHARACTERS:
                try:
                    self._client.log_param(run_id, _named(prefix + key), value)
                except MlflowException:
                    self._client.set_tag(run_id, _named(f"changed.{prefix}{key}"), value)


def _process(pid: int) -> str:
    """A process as no other is called, on any machine: numbers of processes come again, and containers have their
    own."""
    import psutil

    space = "/proc/self/ns/pid"
    place = os.readlink(space) if os.path.exists(space) else "-"
    return f"{platform.node()} {place} {pid} {psutil.Process(pid).create_time():.0f}"


def _is_gone(process: str, alive: str | None) -> bool:
    """Whether a process of this machine has ended, or one of another was silent since `alive`, in seconds of the epoch,
    for so long that it has, too. Without that sign nothing is known of it here."""
    import psutil

    *place, pid, began = process.split(" ")
    if place != _process(os.getpid()).split(" ")[:-2]:
        return alive is not None and time.time() - float(alive) > _SILENT_SECONDS
    try:
        now = _process(int(pid)).rpartition(" ")[2]
    except psutil.NoSuchProcess:
        return True
    return abs(float(now) - float(began)) > _CLOCK_SECONDS


def _how_it_ended(kind: type[BaseException]) -> str:
    """Whatever goes wrong after a signal, it was the signal that ended the work."""
    return "KILLED" if interrupts.pressed() or issubclass(kind, KeyboardInterrupt) else "FAILED"


def _save_model(onnx_file: str, example: np.ndarray, about: dict[str, Any], folder: str) -> None:
    import mlflow.onnx
    import onnx
    import onnxruntime
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    inputs = TensorSpec(example.dtype, (-1, *example.shape[1:]), "images")
    logits = TensorSpec(np.dtype(np.float32), (-1, len(about["classes"])), "logits")
    # Said here, since MLflow would run the model to find out.
    needs = [f"{package.__name__}=={package.__version__}" for package in (onnx, onnxruntime, np)]
    mlflow.onnx.save_model(
        onnx.load(onnx_file), folder, signature=ModelSignature(Schema([inputs]), Schema([logits])),
        input_example={"images": example}, pip_requirements=needs, metadata=about,
    )  # fmt: skip


def _may_pass(error: Exception) -> bool:
    """Whether it is the server, its database or the way there that failed, rather than what it was asked."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED",
                                    "REQUEST_LIMIT_EXCEEDED")  # fmt: skip
    # What `requests` raises are OSErrors; a file that is not there will not come.
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError)


class ChildRun:
    """The child run of one stage or trial. Its name, unique in its parent, is what a resumed one is found by. Where it
    has the status `ended` already, nothing is written."""

    def __init__(self, tracker: Tracker, name: str, ended: str | None = None) -> None:
        self._tracker, self._name, self._ended = tracker, _named(name), ended
        self._run = ""
        tracker._submit(self._start)

    def _start(self) -> None:
        tracker, name = self._tracker, self._name
        query = f"tags.`raydistill.stage` = '{name}' and tags.`mlflow.parentRunId` = '{tracker._parent}'"
        tags = {"raydistill.stage": name, "mlflow.parentRunId": tracker._parent}
        self._run = tracker._reopen(query, tags, name, self._ended)

    def _submit(self, write: Callable[[], None]) -> None:
        self._tracker._submit(lambda: write() if self._run else None)

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Metrics at a step; writing a step twice, as a resumed epoch does, is no harm."""
        self.log_each(lambda: [(metrics, step)])

    def log_each(self, read: Callable[[], list[tuple[dict[str, float], int]]]) -> None:
        """Metrics at several steps, which are read when they are to be written."""
        now = int(time.time() * 1000)

        def write() -> None:
            from mlflow.entities import Metric

            for metrics, step in read():
                values = [Metric(_named(name), float(value), now, step) for name, value in metrics.items()]
                self._tracker._client.log_batch(self._run, metrics=values)

        self._submit(write)

    def params(self, values: dict[str, Any]) -> None:
        self._submit(lambda: self._tracker._log_params(self._run, values))

    def note(self, tags: dict[str, str]) -> None:
        def write() -> None:
            for name, value in tags.items():
                if value:
                    self._tracker._client.set_tag(self._run, f"raydistill.{name}", value)

        self._submit(write)

    def end(self, status: str) -> None:
        def write() -> None:
            self._tracker._client.set_terminated(self._run, status)

        self._submit(write)

"""One MLflow run. Everything is recorded once, even if a command is repeated, resumed, or runs beside an equal one."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import math
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raydistill.config import RunConfig
from raydistill.config.keys import flattened
from raydistill.data.sample import SampleSet
from raydistill.escaping import one_line, printable
from raydistill.secrets import redacted, redacted_tree

if TYPE_CHECKING:
    from raydistill.tracking.tracker import Tracker

_MOST_CHARACTERS, _MOST_OF_TAG = 500, 5000
_MOST_METRICS, _MOST_PARAMS = 500, 100  # in one request
_LARGEST = 1.7976931348623157e308  # MLflow's infinity


def named(text: str) -> str:
    """A name that MLflow accepts: class names, prompts and arms may have characters that it refuses."""
    return re.sub(r"[^/\w.\- ]", "_", text)


class Run:
    """A run found by the tags of its `key`, or created with them and `more`. Nothing is written to a run that already
    has the status `ended`."""

    def __init__(
        self, tracker: Tracker, name: str, key: dict[str, str], more: dict[str, str], ended: str | None = None
    ) -> None:
        self._tracker, self.name, self._own_key, self._more, self._ended = tracker, one_line(name), key, more, ended
        self.id = ""
        self.before: Any = None  # its status when it was found
        tracker.submit(f"the start of {name}", self._start)

    def _key(self) -> dict[str, str]:
        return self._own_key

    def _start(self) -> None:
        client, key = self._tracker.client, self._key()
        query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in key.items())
        with self._tracker.lock():
            found = client.search_runs(
                [self._tracker.experiment], query, max_results=1, order_by=["attributes.start_time ASC"]
            )
            if not found:
                tags = {**key, **_source(), **self._more}
                run = client.create_run(self._tracker.experiment, run_name=self.name, tags=tags)
                self.id, self._tracker.changed = run.info.run_id, True
                return
        self.before = found[0]
        if found[0].info.status != self._ended:
            self.id = found[0].info.run_id
            self._reopen()

    def _reopen(self) -> None:
        """A parent's status depends on who works on it."""

    def _submit(self, what: str, write: Callable[[], None]) -> None:
        self._tracker.submit(f"{what} of {self.name}", lambda: write() if self.id else None)

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Metrics at a step."""
        self.log_each(lambda: [(metrics, step)])

    def log_each(self, read: Callable[[], list[tuple[dict[str, float], int]]]) -> None:
        """Metrics at several steps, read when they are written. It leaves out values that the run has at a later step,
        or equal ones at this step."""
        now = int(time.time() * 1000)

        def write() -> None:
            from mlflow.entities import Metric

            client, records = self._tracker.client, read()
            with self._tracker.lock():
                there = {m.key: (m.step, m.value) for m in client.get_run(self.id).data.to_proto().metrics}
                new = [
                    Metric(key, number, now, step)
                    for metrics, step in records
                    for key, number in ((named(name), float(value)) for name, value in metrics.items())
                    if not _has(there.get(key), step, number)
                ]
                for k in range(0, len(new), _MOST_METRICS):
                    client.log_batch(self.id, metrics=new[k : k + _MOST_METRICS])
            self._tracker.changed |= bool(new)

        self._submit("metrics", write)

    def params(self, values: dict[str, Any]) -> None:
        """Nested mappings are written with dots."""
        self._submit("settings", lambda: self.write_params(values))

    def write_params(self, values: dict[str, Any]) -> None:
        """Short values as params. One that changed since the run began becomes a tag, because params cannot change."""
        from mlflow.entities import Param, RunTag

        client = self._tracker.client
        flat = {named(key): str(value) for key, value in flattened(redacted_tree(values))}
        flat = {
            key: value if value.isprintable() else printable(value)
            for key, value in flat.items()
            if len(value) <= _MOST_CHARACTERS
        }
        with self._tracker.lock():  # an equal command may write the same at this moment
            there = client.get_run(self.id).data.params
            new = [Param(key, value) for key, value in flat.items() if key not in there]
            for k in range(0, len(new), _MOST_PARAMS):
                client.log_batch(self.id, params=new[k : k + _MOST_PARAMS])
            if other := [RunTag(f"changed.{k}", v) for k, v in flat.items() if there.get(k, v) != v]:
                client.log_batch(self.id, tags=other)

    def note(self, tags: dict[str, str]) -> None:
        def write() -> None:
            for name, value in tags.items():
                if value:
                    text = printable(redacted(value))[:_MOST_OF_TAG]
                    self._tracker.client.set_tag(self.id, f"raydistill.{named(name)}", text)

        self._submit("notes", write)

    def data(self, config: RunConfig, samples: SampleSet) -> None:
        """The images of the run, identified by their content."""

        def write() -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            path = one_line(redacted(config.images.path))
            counts = {f"{split} images": samples.num_rows(split) for split in samples.shards}
            dataset = Dataset(
                name=path.rstrip("/").rpartition("/")[2][:_MOST_CHARACTERS] or path[:_MOST_CHARACTERS],
                digest=fingerprint(samples),
                source_type="fs" if "://" in path else "local",
                source=json.dumps({"uri": path}),
                profile=json.dumps({**counts, "classes": len(samples.classes)}),
            )
            used = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
            with self._tracker.lock():
                self._tracker.client.log_inputs(self.id, datasets=used)

        self._submit("the data set", write)

    def files(self, paths: list[str], folder: str | None = None) -> None:
        """Files and folders; earlier ones are replaced."""

        def write() -> None:
            for path in paths:
                self._tracker.keep(self.id, path, folder)

        self._submit("files", write)

    def text(self, text: str, name: str) -> None:
        self._submit(name, lambda: self._tracker.keep_text(self.id, text, name))

    def once(self, folder: str, make: Callable[[str], None]) -> None:
        """Make a folder of files and keep it, unless it exists already; in the writer's thread."""
        tag = f"raydistill.has.{folder}"
        if tag in self._tracker.client.get_run(self.id).data.tags:
            return
        with tempfile.TemporaryDirectory() as scratch:
            make(f"{scratch}/{folder}")
            self._tracker.keep(self.id, f"{scratch}/{folder}", folder)
        self._tracker.client.set_tag(self.id, tag, "yes")
        self._tracker.changed = True

    def end(self, status: str) -> None:
        self._submit("the end", lambda: self._tracker.client.set_terminated(self.id, status))


class ChildRun(Run):
    """The child run of one stage or trial. It is found by its directory or, without one, by its name."""

    def __init__(self, tracker: Tracker, name: str, directory: str = "", ended: str | None = None) -> None:
        stage = {"raydistill.stage": named(name)}
        super().__init__(
            tracker, named(name), {"raydistill.directory": directory} if directory else stage, stage, ended
        )

    def _key(self) -> dict[str, str]:
        return {**self._own_key, "mlflow.parentRunId": self._tracker.parent.id}

    def _reopen(self) -> None:
        self._tracker.client.update_run(self.id, status="RUNNING")
        self._tracker.changed = True


def fingerprint(samples: SampleSet) -> str:
    """A hash of a sample set's images and labels, in order, and of its class names."""
    whole = json.dumps([samples.classes, samples.ids, samples.labels], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


def save_model(onnx_file: str, example: np.ndarray, about: dict[str, Any], folder: str) -> None:
    """In MLflow's own format, with a signature."""
    import mlflow.onnx
    import onnx
    import onnxruntime
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    inputs = TensorSpec(example.dtype, (-1, *example.shape[1:]), "images")
    logits = TensorSpec(np.dtype(np.float32), (-1, len(about["classes"])), "logits")
    # given here, because MLflow would run the model to find out
    needs = [f"{package.__name__}=={package.__version__}" for package in (onnx, onnxruntime, np)]
    mlflow.onnx.save_model(
        onnx.load(onnx_file), folder, signature=ModelSignature(Schema([inputs]), Schema([logits])),
        input_example={"images": example}, pip_requirements=needs, metadata=about,
    )  # fmt: skip


def _source() -> dict[str, str]:
    """Tags from which MLflow's pages show who started a run, and how."""
    program, *words = sys.argv
    name = "raydistill" if Path(program).name == "__main__.py" else Path(program).name
    user = str(os.getuid())
    with contextlib.suppress(KeyError, OSError):  # a user without a name
        user = getpass.getuser()
    return {
        "mlflow.user": user,
        "mlflow.source.name": " ".join([name, *words[:1]]) if name == "raydistill" else name,
        "mlflow.source.type": "LOCAL",
        "raydistill.command": one_line(redacted(shlex.join([name, *words])))[:_MOST_OF_TAG],
        "raydistill.version": metadata.version("raydistill"),
    }


def _has(latest: tuple[int, float] | None, step: int, value: float) -> bool:
    if latest is None or latest[0] != step:
        return latest is not None and latest[0] > step
    same = min(max(value, -_LARGEST), _LARGEST) == latest[1]
    return same or (math.isnan(value) and math.isnan(latest[1]))

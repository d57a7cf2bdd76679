"""What MLflow keeps: names and values that it would refuse, runs that failed or were killed, and all of it while it
does not answer."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from raydistill.config import load_config
from raydistill.data.sample import SampleSet
from raydistill.errors import StageError
from raydistill.models.formats import to_onnx
from raydistill.runtime.processes import process_name
from raydistill.tracking import stores
from raydistill.tracking import tracker as tracking
from raydistill.tracking.recording import ChildRun, fingerprint
from raydistill.tracking.tracker import Tracker
from tests.processes import together, wait_for
from tests.servers import free_port, mlflow_server


@pytest.fixture(scope="module")
def new_store(tmp_path_factory) -> Path:
    """A database that MLflow has just made: its migrations take seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    stores.connect(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def workspace_with_store(new_store, tmp_path) -> None:
    shutil.copy(new_store, tmp_path / "mlflow.db")


def runs_of(tracker: Tracker) -> dict[str, mlflow.entities.Run]:
    client = mlflow.MlflowClient(tracking_uri=tracker.uri)
    return {run.info.run_name: run for run in client.search_runs([tracker.experiment])}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_name_ends_the_record(tmp_path, caplog) -> None:
    words = [f"workspace={tmp_path}", "images.path=x", "name=Ann's set", "generate.pipeline=p"]
    config = load_config([*words, 'generate.templates={"a {class}, 100%":2,"ein Bild: {class}":1}'])
    for _ in range(2):  # the second time its run is found again
        with Tracker(config, job="prepare-1/Ann's set") as tracker:
            with tracker.child("scratch+generated, seed 0") as record:
                record.log({"recall of 'größe+1'": 0.5})
            tracker.parent.log({"kd+generated_test_accuracy": 0.25})
    assert not caplog.records
    runs = runs_of(tracker)
    assert len(runs) == 2
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs.pop("Ann's set")
    assert parent.data.metrics == {"kd_generated_test_accuracy": 0.25}
    assert parent.data.params["generate.templates.a _class__ 100_"] == "2.0"
    (child,) = runs.values()
    assert child.data.metrics == {"recall of _größe_1_": 0.5}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_names_of_strangers_are_text_in_the_record(tmp_path, caplog) -> None:
    odd = "\x1b[2Jcat\u202egnp\x00\n<b>"
    config = load_config([f"workspace={tmp_path}", "images.path=x/y"])
    config = config.model_copy(update={"name": odd, "images": config.images.model_copy(update={"path": f"x/{odd}"})})
    samples = SampleSet(str(tmp_path), (odd,), 8, {"train": (3,)}, {"train": 3}, 0, {"train": "i"}, {"train": "l"})
    with Tracker(config, job=odd, title=odd) as tracker, tracker.child(odd, settings={"prompt": odd, odd: 1}) as record:
        record.note({"reason": odd})
        record.data(config, samples)
    assert not caplog.records
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        words = {
            str(word)
            for table in ("experiments", "runs", "tags", "params", "datasets", "metrics", "inputs")
            for row in store.execute(f"select * from {table}")
            for word in row
        }
    assert not [word for word in words if re.search("[\x00-\x08\x0b-\x1f\u202e]", word)]
    assert r"\x1b[2Jcat\u202egnp\x00\n<b>" in words


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_files_lie_in_the_workspace_wherever_the_command_is_given(tmp_path, monkeypatch) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with Tracker(load_config([f"workspace={tmp_path}/ein#ß 100%", "images.path=x"]), job=name) as tracker:
            pass
        client = mlflow.MlflowClient(tracking_uri=tracker.uri)
        text = Path(client.download_artifacts(tracker.parent.id, "config.yaml", str(tmp_path))).read_text()
        assert "workspace" in text
    assert len(list((tmp_path / "ein#ß 100%" / "mlartifacts").rglob("config.yaml"))) == 2
    assert not any(path for name in ("here", "there") for path in (tmp_path / name).iterdir())
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"here", "there", "ein#ß 100%"}


def test_long_values_are_in_the_config_alone_and_changed_ones_are_tags(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # MLflow puts a local store's artifacts there
    words = [f"workspace={tmp_path}", "images.path=x", f"teacher.prompts=['{'a' * 500} {{class}}']", "name=n"]
    for epochs in (3, 4):
        config = load_config([*words, f"distill.epochs={epochs}"])
        with Tracker(config, job="j") as tracker:
            pass
    run = runs_of(tracker)["n"]
    assert "teacher.prompts" not in run.data.params
    assert run.data.params["images.path"] == "x"
    assert (run.data.params["distill.epochs"], run.data.tags["changed.distill.epochs"]) == ("3", "4")
    assert [tag for tag in run.data.tags if tag.startswith("changed.")] == ["changed.distill.epochs"]
    client = mlflow.MlflowClient(tracking_uri=tracker.uri)
    assert load_config([client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))]) == config


@pytest.mark.parametrize(("error", "status"), [(StageError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_run_ends_as_its_stage_did(error, status, tmp_path) -> None:
    tracker = Tracker(load_config([f"workspace={tmp_path}", "images.path=x", "name=n"]), job="j")
    with pytest.raises(type(error)), tracker:  # noqa: PT012
        with tracker.child("prepare-1"):
            pass
        with tracker.child("adapt-1"):
            raise error
    tracker._kill()  # a forced end that comes too late
    ends = {name: run.info.status for name, run in runs_of(tracker).items()}
    assert ends == {"n": status, "prepare-1": "FINISHED", "adapt-1": status}


def test_runs_whose_process_is_gone_end_as_killed(tmp_path) -> None:
    def left_open(job: str) -> str:
        """A run that was killed in its first stage. Gives its id."""
        tracker = Tracker(load_config([*words, f"name={job}"]), job)
        ChildRun(tracker, f"stage of {job}")
        tracker._beats.close()
        tracker._writer.shutdown()
        return tracker.parent.id

    words = [f"workspace={tmp_path}", "images.path=x"]
    (ended := subprocess.Popen(["true"])).wait()
    *place, _, began = process_name().split(" ")
    now, quarter = time.time(), 15 * 60
    there = {
        "dead": f"{' '.join(place)} {ended.pid} {began}",
        "reused": f"{' '.join(place)} {os.getpid()} 0",
        "elsewhere": f"other - {ended.pid} {began}",
        "silent": f"other - {ended.pid} {began}",
        "heard": f"other - {ended.pid} {began}",
        "alive": process_name(),
    }
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    found = {}
    for job, process in there.items():
        parent = left_open(job)
        client.set_tag(parent, "raydistill.process", process)
        said = client.get_run(parent).data.tags["raydistill.alive"]
        assert abs(float(said) - time.time()) < 60
        alive = {"silent": now - quarter - 1, "heard": now - quarter + 60, "alive": 0}.get(job, said)
        if job == "elsewhere":  # of a version that gave no sign of life
            client.delete_tag(parent, "raydistill.alive")
        else:
            client.set_tag(parent, "raydistill.alive", alive)
        with Tracker(load_config([*words, f"name={job}"]), "another job") as tracker:
            pass
        children = client.search_runs([tracker.experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
        found[job] = {client.get_run(parent).info.status, *(child.info.status for child in children)}
    killed = {"dead", "reused", "silent"}
    assert found == {job: {"KILLED" if job in killed else "RUNNING"} for job in there}


def test_a_run_gives_signs_of_life_until_it_ends(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tracking, "_SECONDS_BETWEEN_BEATS", 0.05)
    with Tracker(load_config([f"workspace={tmp_path}", "images.path=x"]), job="j") as tracker:
        wait_for(lambda: bool(tracker.parent.id), 60)
        client = mlflow.MlflowClient(tracking_uri=tracker.uri)
        client.set_tag(tracker.parent.id, "raydistill.alive", "0")
        wait_for(lambda: float(client.get_run(tracker.parent.id).data.tags["raydistill.alive"]) > 0, 60)
    client.set_tag(tracker.parent.id, "raydistill.alive", "0")
    time.sleep(0.3)
    assert client.get_run(tracker.parent.id).data.tags["raydistill.alive"] == "0"
    assert client.get_run(tracker.parent.id).info.status == "FINISHED"


def test_runs_in_a_folder_are_mentioned(tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    for name, lines in {"artifacts": 0, "meta.yaml": 1}.items():
        (tmp_path / "mlruns" / "0" / name).touch()
        with Tracker(load_config([f"workspace={tmp_path}", "images.path=x"]), job="j"):
            pass
        assert len(caplog.records) == lines
    assert f"{tmp_path}/mlruns has runs that are not in MLflow at sqlite:///{tmp_path}/mlflow.db" in caplog.text


def recorded(folder: Path) -> tuple[str, list[float]]:
    """A run of ten epochs, each with its metric: the status of its child, and what is in the store."""
    config = load_config([f"workspace={folder}", "images.path=x"])
    with Tracker(config, job="j") as tracker, tracker.child("distill-1") as record:
        for epoch in range(10):
            record.log({"loss": float(epoch)}, epoch)
    return losses_of(tracker)


def losses_of(tracker: Tracker) -> tuple[str, list[float]]:
    run, client = runs_of(tracker)["distill-1"], mlflow.MlflowClient(tracking_uri=tracker.uri)
    return run.info.status, [metric.value for metric in client.get_metric_history(run.info.run_id, "loss")]


def failing(monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], calls: range) -> None:
    """MLflow fails in these calls of those that log metrics."""
    log_batch, number = mlflow.MlflowClient.log_batch, iter(range(10**6))

    def log_or_fail(self, *arguments, **options):
        if options.get("metrics") and next(number) in calls:
            raise error()
        return log_batch(self, *arguments, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_or_fail)
    monkeypatch.setattr(tracking, "_SECONDS_BETWEEN_TRIES", 0.01)


@pytest.mark.parametrize("error", [ConnectionResetError, lambda: MlflowException("API request failed")])
def test_no_metric_is_lost_while_mlflow_does_not_answer(error, monkeypatch, tmp_path, caplog) -> None:
    failing(monkeypatch, error, range(3, 9))
    assert recorded(tmp_path) == ("FINISHED", list(range(10)))
    said = [record.getMessage().partition("mlflow.db ")[2] for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("does not answer")
    assert said[1] == "answers again"


def test_what_mlflow_refuses_is_left_out_alone(monkeypatch, tmp_path, caplog) -> None:
    failing(monkeypatch, lambda: MlflowException("no", error_code=INVALID_PARAMETER_VALUE), range(4, 5))
    assert recorded(tmp_path)[1] == [epoch for epoch in range(10) if epoch != 4]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "refuses a record, which is left out: metrics of distill-1 (no)" in caplog.text
    assert "1 record of this run missing in MLflow" in caplog.text


def test_a_run_does_not_wait_for_ever_for_mlflow(monkeypatch, tmp_path, caplog) -> None:
    failing(monkeypatch, ConnectionRefusedError, range(2, 10**6))
    monkeypatch.setattr(tracking, "_GRACE_SECONDS", 0.1)
    started = time.monotonic()
    assert recorded(tmp_path)[1] == [0, 1]
    assert time.monotonic() - started < 30
    # Eight metrics, and that the child and the parent came to an end.
    assert "10 records of this run missing in MLflow" in caplog.text


@pytest.mark.slow
def test_a_server_that_was_down_has_all_metrics_in_the_end(monkeypatch, tmp_path, caplog, capfd) -> None:
    monkeypatch.setattr(tracking, "_SECONDS_BETWEEN_TRIES", 0.5)
    port = free_port()
    config = load_config([f"workspace={tmp_path}", "images.path=x", f"tracking.uri=http://127.0.0.1:{port}"])
    with ExitStack() as servers:
        server = servers.enter_context(mlflow_server(tmp_path, port))
        with Tracker(config, "j") as tracker, tracker.child("distill-1") as record:
            record.log({"loss": 0.0}, 0)
            wait_for(lambda: record.id and losses_of(tracker)[1] == [0.0], 60)
            os.killpg(server.pid, 9)
            for epoch in range(1, 10):
                record.log({"loss": float(epoch)}, epoch)
            wait_for(lambda: "does not answer" in caplog.text, 60)
            servers.enter_context(mlflow_server(tmp_path, port))
        assert losses_of(tracker) == ("FINISHED", list(range(10)))
        assert "answers again" in caplog.text
        assert capfd.readouterr().out == ""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_student_is_a_model_that_mlflow_loads_and_registers_once(tmp_path) -> None:
    class Sums(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.sum(dim=(2, 3))

    file, about = tmp_path / "model.onnx", {"classes": ["größe", "b", "c"]}
    to_onnx(Sums().eval(), torch.rand(2, 3, 4, 4), about, file)
    config = load_config([f"workspace={tmp_path}", "images.path=x", "name=mine"])
    for _ in range(2):
        with Tracker(config, job="j") as tracker:
            tracker.log_model(str(file), np.zeros((1, 3, 4, 4), np.float32), about, "product")
    client = mlflow.MlflowClient(tracking_uri=tracker.uri)
    (version,) = client.search_model_versions("name = 'product'")
    assert version.run_id == tracker.parent.id
    folder = client.download_artifacts(tracker.parent.id, "model", str(tmp_path))
    model = mlflow.pyfunc.load_model(folder)
    images = np.random.default_rng(0).random((5, 3, 4, 4)).astype(np.float32)
    np.testing.assert_allclose(model.predict({"images": images})["logits"], images.sum((2, 3)), rtol=1e-5)
    assert model.metadata.metadata["classes"] == about["classes"]
    assert model.metadata.signature.inputs.input_dict()["images"].shape == (-1, 3, 4, 4)
    assert model.metadata.saved_input_example_info is not None


TOGETHER = """
import sys
import mlflow
from raydistill.config import load_config
from raydistill.tracking.tracker import Tracker

_, folder, name = sys.argv
print("ready", flush=True)
sys.stdin.readline()
with Tracker(load_config([f"workspace={folder}", "images.path=x", f"name={name}"]), job="j") as tracker:
    with tracker.child("distill", "distill-1", {"epochs": 10}) as record:
        for epoch in range(10):
            record.log({"loss": 1 / (1 + epoch)}, epoch)
    tracker.parent.log({"student_test_accuracy": 0.5})
"""


def test_processes_on_one_new_store_lose_nothing_and_record_equal_things_once(tmp_path) -> None:
    folder = tmp_path / "new"
    names = ("equal", "equal", "other")
    assert together(TOGETHER, *((str(folder), name) for name in names)) == [("", "")] * 3
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    for name in set(names):
        found = client.search_runs([client.get_experiment_by_name(name).experiment_id])
        runs = {run.info.run_name: run for run in found}
        assert sorted(run.info.run_name for run in found) == ["distill", name]
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        # MLflow sorts by time. Of two equal commands either may be first with an epoch, by a clock of its own.
        losses = client.get_metric_history(runs["distill"].info.run_id, "loss")
        assert sorted((metric.step, metric.value) for metric in losses) == [(k, 1 / (1 + k)) for k in range(10)]
        assert len(client.get_metric_history(runs[name].info.run_id, "student_test_accuracy")) == 1


def test_a_finished_run_that_is_asked_for_again_stays_as_it_was(tmp_path) -> None:
    samples = SampleSet(str(tmp_path), ("a", "b"), 8, {"train": (3,)}, {"train": 3}, 0, {"train": "i"}, {"train": "l"})
    config = load_config([f"workspace={tmp_path}", "images.path=s3://bucket/set?sig=abcdef", "name=n"])
    found = []
    for _ in range(2):
        with Tracker(config, "j", "net · seed 0") as tracker:
            tracker.parent.data(config, samples)
            for share in (0.25, float("nan"), float("inf")):
                tracker.parent.log({"share": share, "other": 1.0})
            with tracker.child("distill", "distill-1") as record:
                if not found:
                    record.log_each(lambda: [({"loss": 1.0}, 1), ({"loss": 0.5}, 2)])
        found.append({name: run.to_dictionary() for name, run in runs_of(tracker).items()})
        tracker.client.set_terminated(runs_of(tracker)["distill"].info.run_id, "FINISHED", 0)
    parent, child = found[0]["n · net · seed 0"], found[0]["distill"]
    assert child["data"]["params"] == {}
    assert child["data"]["tags"]["raydistill.directory"] == "distill-1"
    (data,) = parent["inputs"]["dataset_inputs"]
    assert data["dataset"]["digest"] == fingerprint(samples)
    assert "abcdef" not in str(found)
    assert parent["data"]["tags"]["mlflow.source.type"] == "LOCAL"
    assert parent["data"]["tags"]["mlflow.user"]
    history = tracker.client.get_metric_history(tracker.parent.id, "other")
    assert [metric.value for metric in history] == [1.0]
    assert found[1]["n · net · seed 0"]["inputs"] == parent["inputs"]


def test_where_nothing_is_new_a_run_ended_when_it_did(tmp_path) -> None:
    ends = []
    for _ in range(2):
        with Tracker(load_config([f"workspace={tmp_path}", "images.path=x", "name=n"]), "j") as tracker:
            tracker.parent.log({"accuracy": 0.5})
        ends.append(runs_of(tracker)["n"].info.end_time)
    assert ends[0] == ends[1]


def test_no_password_of_the_job_is_in_the_store(tmp_path, caplog) -> None:
    words = [f"workspace={tmp_path}", "images.path=https://me:q7Zw9x@h/set.parquet", "name=n"]
    words += ["tune.storage=mysql://me:q7Zw9x@h/studies", "compare.student_weights=s3://b/w?token=q7Zw9x"]
    with Tracker(load_config(words), "j") as tracker:
        tracker.parent.note({"reason": "no host at mysql://me:q7Zw9x@h"})
        with tracker.child("distill", "distill-1", {"path": "https://me:q7Zw9x@h"}):
            pass
    assert not caplog.records
    folder = Path(tracker.client.download_artifacts(tracker.parent.id, "", str(tmp_path / "files")))
    stored = "".join(path.read_text() for path in folder.rglob("*.yaml")) + str(runs_of(tracker))
    assert "q7Zw9x" not in stored
    assert "mysql://***@h/studies" in stored


def test_a_run_goes_on_where_its_store_takes_none(tmp_path, caplog) -> None:
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("update alembic_version set version_num = 'ffffffffffff'")
    started = time.monotonic()
    with Tracker(load_config([f"workspace={tmp_path}", "images.path=x"]), "j") as tracker:
        for epoch in range(10):
            tracker.parent.log({"loss": 1.0}, epoch)
    assert time.monotonic() - started < 20
    assert [record.getMessage().partition("mlflow.db")[2] for record in caplog.records] == [
        f" was made by a newer MLflow than the {mlflow.__version__} here (its schema is ffffffffffff): install that "
        "version, or name another store in tracking.uri",
        "",
    ]
    assert caplog.records[1].getMessage().startswith("nothing of this run is in MLflow at")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", ["copied", "an experiment's", "a run's"])
def test_files_go_where_the_job_says_and_not_where_its_store_does(tmp_path, caplog, case) -> None:
    def record(workspace: Path, text: str) -> str:
        with Tracker(load_config([f"workspace={workspace}", "images.path=x"]), job="j") as tracker:
            tracker.parent.text(text, "note.txt")
        return tracker.parent.id

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    shutil.copy(tmp_path / "mlflow.db", first)
    record(first, "first")
    shutil.copytree(first, second)
    victim = tmp_path / "victim"
    with contextlib.closing(sqlite3.connect(second / "mlflow.db")) as store, store:
        if case == "an experiment's":
            store.execute("update experiments set artifact_location = ?", [victim.as_uri()])
        elif case != "copied":
            store.execute("update runs set artifact_uri = ?", [f"{victim.as_uri()}/x/artifacts"])
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    run = record(second, "second")
    assert "they go into the workspace" in caplog.text
    assert (second / f"mlartifacts/{run}/artifacts/note.txt").read_text() == "second"
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert not victim.exists()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{second}/mlflow.db")
    assert {file.path for file in client.list_artifacts(run)} == {"config.yaml", "note.txt"}


ENDLESS = "with recursive r(x) as (select 1 union all select x + 1 from r) select"
STRANGE = {
    "a trigger": f"create trigger t after update on runs begin insert into tags {ENDLESS} x, x, x from r; end",
    "a trigger that leads files away": "create trigger t after update on runs begin update runs set artifact_uri = "
    "'file:///tmp/victim' where artifact_uri != 'file:///tmp/victim'; end",
    "a trigger on a view": "create view v as select 1; create trigger t instead of insert on v begin select 1; end",
    "a view without end": f"alter table tags rename to tags2; create view tags as {ENDLESS} tags2.* from tags2, r",
}


@pytest.mark.parametrize("case", [*STRANGE, "a folder", "a pipe", "junk", "holes", "a pipe for its lock"])
def test_a_strange_store_neither_runs_nor_holds_up(tmp_path, caplog, case) -> None:
    store = tmp_path / "mlflow.db"
    if case in STRANGE:
        with contextlib.closing(sqlite3.connect(store)) as database:
            database.executescript(STRANGE[case])
    elif case != "a pipe for its lock":
        store.unlink()
        {"a folder": store.mkdir, "a pipe": lambda: os.mkfifo(store), "junk": lambda: store.write_bytes(b"junk" * 999),
         "holes": lambda: os.truncate(os.open(store, os.O_CREAT | os.O_RDWR), 2 * 10**9)}[case]()  # fmt: skip
    else:
        os.mkfifo(tmp_path / "mlflow.db.lock")
    began = time.monotonic()
    with Tracker(load_config([f"workspace={tmp_path}", "images.path=x"]), job="j") as tracker:
        tracker.parent.text("a", "note.txt")
    assert time.monotonic() - began < 20
    if case == "a pipe for its lock":
        assert not caplog.records
        return
    assert len(caplog.records) == 2
    assert re.search(f"^no MLflow run: sqlite:///{store} (is|holds|cannot be) .*", caplog.messages[0])


def test_signs_of_life_that_are_none_are_passed_over(tmp_path, caplog) -> None:
    config = load_config([f"workspace={tmp_path}", "images.path=x"])
    tags = {"a": ("\x1b[2J", "soon"), "b": ("one two three four", "1e999"), "c": ("x pid:[1] 5 6", "nan")}
    for job, (process, alive) in tags.items():
        with Tracker(config, job=job) as tracker:
            pass
        for tag, value in (("process", process), ("alive", alive)):
            tracker.client.set_tag(tracker.parent.id, f"raydistill.{tag}", value)
        tracker.client.update_run(tracker.parent.id, status="RUNNING")
    with Tracker(config, job="d") as tracker:
        tracker.parent.log({"loss": 1.0})
    assert not caplog.records
    assert tracker.client.get_run(tracker.parent.id).data.metrics == {"loss": 1.0}


@pytest.mark.parametrize("name", ["mlflow.db", "mlflow.db.lock", "mlflow.db-journal", "mlartifacts", "mlartifacts/a/b"])
def test_a_store_that_is_a_link_is_not_used(tmp_path, caplog, name) -> None:
    workspace, victim = tmp_path / "w", tmp_path / "victim"
    (workspace / name).parent.mkdir(parents=True)
    shutil.copy(tmp_path / "mlflow.db", victim)
    before = victim.read_bytes()
    (workspace / name).symlink_to(victim)
    with Tracker(load_config([f"workspace={workspace}", "images.path=x"]), job="j") as tracker:
        tracker.parent.text("a", "note.txt")
    assert f"no MLflow run: sqlite:///{workspace}/mlflow.db is not used: {workspace}/{name} is a link to" in caplog.text
    assert victim.read_bytes() == before

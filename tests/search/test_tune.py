"""tune: what is proposed, what is remembered through a kill, what counts as best; and whole on small real searches."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raydistill.config import RunConfig, load_config
from raydistill.errors import ConfigError, StageError
from raydistill.infra.artifacts import StageDirectory
from raydistill.search.space import read_space
from raydistill.search.trials import _Search, open_study, read_trials
from raydistill.search.tune import tune_job
from raydistill.stages.run import run_stages

SPACE = """
loss.temperature: {log: [1, 20]}
loss.projection_head: {categorical: [linear, two_layer]}
loss.projection_dim: {int: [4, 16], step: 4}
"""
GRID = "loss.temperature: {float: [2, 6], step: 2}\nloss.projection_head: {categorical: [linear, two_layer]}\n"


@pytest.fixture
def space_file(tmp_path):
    def write(text: str = SPACE) -> str:
        path = tmp_path / f"space{abs(hash(text))}.yaml"
        path.write_text(text)
        return f"tune.space={path}"

    return write


class Silent:
    def started(self, number, choices, own) -> None: ...

    def measured(self, number, record) -> None: ...

    def ended(self, trial) -> None: ...


def engine(config: RunConfig, folder: Path) -> tuple[_Search, object]:
    """The search algorithm on the study in a folder, with trials that train nothing."""
    directory = StageDirectory(str(folder), "tune", "{}")
    folder.mkdir(exist_ok=True)
    space = read_space(config.tune.space, config)
    study = open_study(config, directory, space.own(config))
    return _Search(config, space, study, lambda choices: (None, directory), None, Silent()), study


def score(choices: dict) -> float:
    """Deterministic, and smooth in what is numeric."""
    wide = choices.get("loss.projection_head") == "two_layer"
    return 1 / choices["loss.temperature"] + 0.1 * wide + 0.001 * choices.get("loss.projection_dim", 0)


def play(search: _Search, study, most: int) -> Iterator[int]:
    """Up to `most` trials from proposal to end; numbers as they are proposed, before they end."""
    for turn in range(most):
        if search.suggest(f"t{turn}") == "FINISHED":
            return
        number = search._ot_trials[f"t{turn}"].number
        yield number
        choices = next(t for t in read_trials(study) if t.number == number).choices
        result = {"finished": True, "epoch": 3, "seconds": 1.0, "val_accuracy": score(choices)}
        search.on_trial_complete(f"t{turn}", result)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "qmc", "random", "grid"])
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(sampler, words, space_file, tmp_path) -> None:
    text = GRID if sampler == "grid" else "loss.temperature: {log: [1, 20]}\nloss.projection_dim: {int: [4, 16]}\n"
    config = load_config([*words, space_file(text), f"tune.sampler={sampler}", "tune.trials=14"])
    search, study = engine(config, tmp_path / "unbroken")
    assert list(play(search, study, 99)) == list(range(7 if sampler == "grid" else 14))
    expected, chance = read_trials(study), random.Random(0)
    for _ in range(99):
        search, study = engine(config, tmp_path / "broken")
        few = chance.randrange(1, 4)
        killed_in = chance.random() < 0.7
        for at, _ in enumerate(play(search, study, few), start=1):
            if at == few and killed_in:  # between the proposal and its end
                break
        if read_trials(study)[-1].state != "running" and len(read_trials(study)) == len(expected):
            break
    found = read_trials(study)
    assert [t.choices for t in found] == [t.choices for t in expected]
    assert [t.values for t in found] == [t.values for t in expected]
    assert {t.state for t in found} == {"complete"}


def test_the_first_trial_has_the_jobs_own_values_and_more_trials_go_on(words, space_file, tmp_path) -> None:
    short = load_config([*words, space_file(), "tune.trials=3", "loss.projection_dim=8"])
    search, study = engine(short, tmp_path / "study")
    list(play(search, study, 99))
    first = read_trials(study)
    assert (first[0].own, first[0].choices) == (
        True, {"loss.temperature": 4.0, "loss.projection_head": "two_layer", "loss.projection_dim": 8},
    )  # fmt: skip
    assert [t.own for t in first] == [True, False, False]
    search, study = engine(
        load_config([*words, space_file(), "tune.trials=5", "loss.projection_dim=8"]), tmp_path / "study"
    )
    assert list(play(search, study, 99)) == [3, 4]
    assert read_trials(study)[:3] == first


def test_a_value_that_the_space_does_not_hold_is_not_invented_for_the_first_trial(words, space_file, tmp_path) -> None:
    search, study = engine(load_config([*words, space_file(), "loss.projection_dim=7"]), tmp_path / "study")
    next(play(search, study, 1))
    assert read_trials(study)[0].choices == {"loss.temperature": 4.0, "loss.projection_head": "two_layer"}


def test_what_becomes_of_a_trial_is_remembered(words, space_file, tmp_path) -> None:
    search, study = engine(load_config([*words, space_file(), "tune.trials=6"]), tmp_path / "study")
    ends = [
        ({"finished": True, "epoch": 3, "val_accuracy": 0.5, "seconds": 2.0}, False, "complete", ""),
        ({"finished": True, "epoch": 3, "val_accuracy": float("nan")}, False, "failed", r"not finite: [nan]"),
        ({"failed": "distill: the loss is not finite"}, False, "failed", "distill: the loss is not finite"),
        (None, True, "failed", "its process was lost"),
        ({"epoch": 2, "val_accuracy": 0.1}, False, "pruned", ""),
    ]
    for result, error, _, _ in ends:
        search.suggest("t")
        if result and "epoch" in result and "finished" not in result:
            search.falls_behind("t", result)
        search.on_trial_complete("t", result, error)
    found = read_trials(study)
    assert [t.state for t in found] == [state for _, _, state, _ in ends]
    assert all(reason in t.reason for t, (_, _, _, reason) in zip(found, ends, strict=True))
    assert [t.epochs for t in found] == [3, 0, 0, 0, 2]


def test_a_trial_whose_settings_make_no_job_is_a_failed_one_and_the_next_is_taken(words, space_file, tmp_path) -> None:
    search, study = engine(load_config([*words, space_file(), "tune.trials=3"]), tmp_path / "study")
    answers = iter([ConfigError("these do not fit"), None, ConfigError("nor these")])

    def make_job(choices):
        if error := next(answers):
            raise error
        return None, StageDirectory(str(tmp_path), "distill", "{}")

    search._make_job = make_job
    assert list(play(search, study, 99)) == [1]
    assert [(t.state, t.reason) for t in read_trials(study)] == [
        ("failed", "these do not fit"), ("complete", ""), ("failed", "nor these"),
    ]  # fmt: skip


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_a_trial_that_falls_behind_ends_after_its_grace_and_a_good_one_does_not(
    pruner, words, space_file, tmp_path
) -> None:
    more = ["tune.trials=20", f"tune.pruner={pruner}", "tune.grace_epochs=2", "distill.epochs=20"]
    search, _ = engine(load_config([*words, space_file(), *more]), tmp_path / "study")

    def last_epoch(level: float) -> int:
        search.suggest("t")
        for epoch in range(1, 20):
            record = {"epoch": float(epoch), "step": 4.0 * epoch, "val_accuracy": level * epoch / 20}
            if search.falls_behind("t", record):
                search.on_trial_complete("t", record)
                return epoch
        search.on_trial_complete("t", {"finished": True, "epoch": 20, "val_accuracy": level})
        return 20

    levels = [last_epoch(0.8) for _ in range(6)]
    assert levels[0] == 20
    assert 2 <= last_epoch(0.1) < 20
    assert last_epoch(0.95) == 20


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["tune.space=null"], "Give --space FILE"),
        (["views.per_image=fresh"], "would run the teacher again in every trial"),
        (["tune.sampler=grid"], "a grid needs a list of values"),
        (["tune.space=VIEWS"], "3 combinations of keys that stages before training depend on"),
        (["tune.space=STUDENT"], "no model of this name|unknown|no such"),
        (["tune.storage=sqlite:////nowhere/study.db"], "tune.storage=sqlite:////nowhere/study.db: cannot be opened"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_starts(more, message, words, space_file, progress, tmp_path):
    files = {
        "tune.space=VIEWS": space_file("views.per_image: {int: [1, 3]}\nloss.temperature: {log: [1, 2]}"),
        "tune.space=STUDENT": space_file('student.model: {categorical: ["timm:test_resnet", "timm:test_resnat"]}'),
    }
    config = load_config([*words, space_file(), "tune.trials=2", *(files.get(word, word) for word in more)])
    with pytest.raises(ConfigError, match=message):
        tune_job(config, progress)
    assert not list((tmp_path / "workspace").glob("*-*/DONE"))


def test_objectives_that_are_known_at_the_end_alone_cannot_prune(words):
    with pytest.raises(ConfigError, match=r"set tune.pruner=none"):
        load_config([*words, "tune.objectives=[val_accuracy,parameters]"])


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session")
def test_a_search_and_the_same_again_and_more(words, space_file, progress, tmp_path) -> None:
    workspace = tmp_path / "workspace"
    words = [*words, space_file(), "distill.learning_rate=1e-5", "tune.pruner=none", "tune.confirm_seeds=0"]
    words += ["tracking.enabled=true"]
    config = load_config([*words, "tune.trials=3"])
    taught = run_stages(config, progress, "teach")
    features = {p: p.stat().st_mtime_ns for p in workspace.glob("teach-*/*")}
    search = tune_job(config, progress)
    # Not one pass of the teacher, and nothing that reads the test split.
    assert {p: p.stat().st_mtime_ns for p in workspace.glob("teach-*/*")} == features
    assert taught.samples is not None
    assert not list(workspace.glob("evaluate-*"))
    assert [(t.number, t.state, t.epochs) for t in search.trials] == [(k, "complete", 3) for k in range(3)]
    own = run_stages(config, progress, "distill")
    assert own.seconds["distill"] == 0  # trial 0 was this run
    assert search.trials[0].values == [own.student.val_accuracy]
    with sqlite3.connect(workspace / "mlflow.db") as database:
        states = dict(database.execute("select name, status from runs where name like 'trial %'").fetchall())
    assert states == {f"trial {k:05d}": "FINISHED" for k in range(3)}
    for name in ("search.html", "search.json", "best.yaml"):
        assert (Path(search.path) / name).stat().st_size > 0

    students = {p: p.stat().st_mtime_ns for p in workspace.glob("distill-*/*")}
    again = tune_job(config, progress)
    assert (again.trials, again.verdict) == (search.trials, search.verdict)
    assert {p: p.stat().st_mtime_ns for p in workspace.glob("distill-*/*")} == students

    # One more trial, and a confirmation with a seed that no trial has seen.
    more = tune_job(load_config([*words, "tune.trials=4", "tune.confirm_seeds=1"]), progress)
    assert more.trials[:3] == search.trials
    assert len(more.trials) == 4
    best = load_config([*words, f"{more.path}/best.yaml"])
    assert run_stages(best, progress, "distill").seconds["distill"] == 0
    if more.best:
        assert [gain.split for gain in more.confirmed] == ["val", "test"]
        assert len(list(workspace.glob("evaluate-*/DONE"))) == 2
    else:
        assert "the job's own values" in more.verdict


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session")
def test_trials_that_all_fail_end_the_search_with_the_reasons_counted(words, space_file, progress) -> None:
    words = [*words, space_file(), "distill.learning_rate=1e30", "tune.trials=3"]
    with pytest.raises(StageError, match=r"none of the 3 trials came to an end:\n  \d x distill: the loss or its"):
        tune_job(load_config(words), progress)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session")
class TestSlow:
    def test_each_value_of_an_earlier_stage_is_made_once(self, words, space_file, progress, tmp_path) -> None:
        file = space_file("views.per_image: {categorical: [1, 3]}\nloss.temperature: {log: [1, 20]}")
        more = ["tune.trials=5", "tune.confirm_seeds=0", "tune.sampler=random"]
        search = tune_job(load_config([*words, file, *more]), progress)
        views = {t.choices.get("views.per_image") for t in search.trials[1:]}
        assert len(list((tmp_path / "workspace").glob("teach-*/DONE"))) == 1 + len({1, 3})
        for trial in search.trials[1:]:
            identity = json.loads((Path(trial.directory) / "identity.json").read_text())
            assert identity["views"]["per_image"] == trial.choices["views.per_image"]
        assert views <= {1, 3}

    def test_a_space_may_turn_the_teacher_on(self, words, space_file, progress) -> None:
        off = {"kd_weight": 0, "alignment_weight": 0, "uniformity_weight": 0}
        file = space_file(json.dumps({"loss": {"categorical": {"none": off, "kd": {**off, "kd_weight": 1}}}}))
        words = [*words, *(f"loss.{key}=0" for key in off), file]
        more = ["tune.trials=6", "tune.confirm_seeds=0", "tune.sampler=random", "tune.pruner=none"]
        search = tune_job(load_config([*words, *more]), progress)
        assert search.trials[0].choices == {"loss": "none"}
        assert {t.choices["loss"] for t in search.trials} == {"none", "kd"}
        assert {t.state for t in search.trials} == {"complete"}
        for weight, label in ((0, "none"), (1, "kd")):
            alone = run_stages(load_config([*words, f"loss.kd_weight={weight}"]), progress, "distill")
            assert alone.seconds["distill"] == 0
            assert {t.directory for t in search.trials if t.choices["loss"] == label} == {alone.student.path}

    def test_trials_at_once_are_all_recorded(self, words, space_file, progress, tmp_path) -> None:
        more = ["tune.trials=8", "tune.concurrent=4", "tune.confirm_seeds=0", "tracking.enabled=true"]
        search = tune_job(load_config([*words, space_file(), *more]), progress)
        assert [t.number for t in search.trials] == list(range(8))
        with sqlite3.connect(tmp_path / "workspace" / "mlflow.db") as database:
            rows = database.execute("select name, status from runs where name like 'trial %'").fetchall()
        assert sorted(rows) == [(f"trial {k:05d}", "FINISHED") for k in range(8)]

    def test_a_front_of_two_objectives(self, words, space_file, progress) -> None:
        file = space_file(
            'student.model: {categorical: ["timm:test_resnet", "timm:test_vit"]}\nloss.temperature: {log: [1, 9]}'
        )
        more = ["student.size=32", "tune.objectives=[val_accuracy,parameters]", "tune.pruner=none", "tune.trials=4"]
        search = tune_job(load_config([*words, file, *more, "tune.confirm_seeds=0", "tune.sampler=random"]), progress)
        assert search.front
        assert search.best_number in search.front
        assert b"Pareto front" in (Path(search.path) / "search.html").read_bytes()


@pytest.mark.slow
def test_trials_of_two_workers_go_through_ray_train(words, space_file, progress) -> None:
    """In a Ray of its own, with the dashboard that Tune's clean-up asks."""
    more = ["distill.num_workers=2", "tune.trials=3", "tune.confirm_seeds=0", "distill.epochs=9", "distill.val_every=1"]
    search = tune_job(load_config([*words, space_file(), *more]), progress)
    assert {t.state for t in search.trials} <= {"complete", "pruned"}
    assert search.trials[0].state == "complete"


@pytest.mark.slow
def test_sigterm_ends_the_search_and_its_trial_as_killed(words, space_file, tmp_path) -> None:
    words = [*words, space_file(), "distill.epochs=2000", "tracking.enabled=true"]
    code, workspace = "from raydistill.cli import main; main()", tmp_path / "workspace"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "tune", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not list(workspace.glob("distill-*/epochs/*.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130, process.stdout.read()
    with sqlite3.connect(workspace / "mlflow.db") as database:
        states = dict(database.execute("select name, status from runs").fetchall())
    assert states == {"raydistill": "KILLED", "trial 00000": "KILLED"}


@pytest.mark.slow
def test_a_search_that_is_killed_ten_times(words, space_file, tmp_path) -> None:
    words = [*words, space_file(), "tune.trials=12", "tune.confirm_seeds=0", "distill.epochs=12", "distill.val_every=1"]
    words += ["tracking.enabled=true"]

    def search(folder: str) -> subprocess.Popen:
        code = "from raydistill.cli import main; main()"
        arguments = [sys.executable, "-c", code, "tune", *words, f"workspace={tmp_path}/{folder}"]
        return subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    unbroken = search("unbroken")
    assert unbroken.wait(600) == 0, unbroken.stdout.read()
    chance, killed = random.Random(0), 0
    for _ in range(10):
        process = search("broken")
        time.sleep(chance.uniform(15, 30))
        if process.poll() is not None:
            break
        killed += 1
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = search("broken")
    assert last.wait(600) == 0, last.stdout.read()
    assert killed >= 2
    found, expected = (
        json.loads(next(Path(tmp_path, folder).glob("tune-*/search.json")).read_text())
        for folder in ("broken", "unbroken")
    )
    assert [t["number"] for t in found["trials"]] == list(range(12))
    for key in ("choices", "values", "state"):
        assert [t[key] for t in found["trials"]] == [t[key] for t in expected["trials"]]
    assert found["best_number"] == expected["best_number"]
    with sqlite3.connect(tmp_path / "broken" / "mlflow.db") as database:
        rows = database.execute("select name, status from runs where name like 'trial %'").fetchall()
    assert sorted(rows) == [(f"trial {k:05d}", "FINISHED") for k in range(12)]

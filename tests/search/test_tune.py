"""tune: what is proposed, what is remembered through a kill, what counts as best; and whole on small real searches."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import html
import io
import itertools
import json
import os
import pickle
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import pytest
from ray import tune
from rich.console import Console

from raydistill.cluster.plan import plan_resources
from raydistill.config import RunConfig, load_config
from raydistill.engine import checkpoints
from raydistill.errors import CheckpointError, ConfigError, StageError
from raydistill.identity import distill_directory
from raydistill.pages import study as study_page
from raydistill.pages.study import search_page
from raydistill.pages.templates import Table
from raydistill.results import Outcome
from raydistill.run import run_stages
from raydistill.runtime.progress import Progress
from raydistill.search import forecast
from raydistill.search import tune as tune_module
from raydistill.search.confirmation import gains_of, search_verdict
from raydistill.search.directory import tune_directory
from raydistill.search.display import Clock, SearchDisplay
from raydistill.search.forecast import forecast_lines, seconds_per_step
from raydistill.search.significance import Answers
from raydistill.search.space import read_space
from raydistill.search.study import (
    Trial,
    drawn_at_random,
    drop_pruned,
    num_trials,
    open_study,
    read_trials,
    refuse_others,
)
from raydistill.search.trainable import TrialWork, run_trial
from raydistill.search.trial_resources import plan_trials
from raydistill.search.trials import StudySearch
from raydistill.search.tune import tune_job
from raydistill.storage.directory import StageDirectory, workspace_root
from raydistill.storage.jobs import JobRecord
from raydistill.tracking.recording import ChildRun
from raydistill.tracking.tracker import Tracker
from tests.processes import wait_for

SPACE = """
loss.temperature: {log: [1, 20]}
loss.projection_head: {categorical: [linear, simclr]}
loss.projection_dim: {int: [4, 16], step: 4}
"""
GRID = "loss.temperature: {float: [2, 6], step: 2}\nloss.projection_head: {categorical: [linear, simclr]}\n"


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


def engine(config: RunConfig, folder: Path) -> tuple[StudySearch, optuna.Study]:
    """The search algorithm on the study in a folder, with trials that train nothing."""
    directory = StageDirectory(str(folder), "tune", "{}")
    folder.mkdir(exist_ok=True)
    space = read_space(config.tune.space, config)
    study = open_study(config, directory, space.own(config))

    def make_job(choices):
        name = f"distill-{hashlib.sha256(json.dumps(choices).encode()).hexdigest()[:12]}"
        return None, StageDirectory(f"{workspace_root(config)}/{name}", "distill", "{}")

    return StudySearch(config, space, study, make_job, None, Silent()), study


def score(choices: dict) -> float:
    """Deterministic, and smooth in what is numeric."""
    wide = choices.get("loss.projection_head") == "simclr"
    return 1 / choices["loss.temperature"] + 0.1 * wide + 0.001 * choices.get("loss.projection_dim", 0)


def play(search: StudySearch, study, most: int) -> Iterator[int]:
    """Up to `most` trials from proposal to end; numbers as they are proposed, before they end."""
    for turn in range(most):
        if search.suggest(f"t{turn}") == "FINISHED":
            return
        number = search._running[f"t{turn}"][0].number
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


class Killed(BaseException):
    pass


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid", "cmaes"])
@pytest.mark.parametrize("at", [0, 1, 2, 12])
def test_a_trial_that_was_half_drawn_when_the_search_was_killed_is_drawn_to_its_end(
    sampler, at, words, space_file, tmp_path
) -> None:
    text = "loss.temperature: {float: [2, 6], step: 2}\nloss.projection_dim: {int: [4, 16], step: 4}\n"
    text += "" if sampler == "cmaes" else "loss.projection_head: {categorical: [linear, simclr]}\n"
    config = load_config([*words, space_file(text), f"tune.sampler={sampler}", "tune.trials=14"])
    search, study = engine(config, tmp_path / "unbroken")
    list(play(search, study, 99))
    search, broken = engine(config, tmp_path / "broken")
    list(play(search, broken, at))

    def killed(trial):
        search._space.entries["loss.temperature"].draw("loss.temperature", trial)
        raise Killed

    search._draw = lambda trial, own: killed(trial)
    with pytest.raises(Killed):
        search.suggest("t")
    assert read_trials(broken)[-1].choices.keys() == {"loss.temperature"}
    search, broken = engine(config, tmp_path / "broken")
    list(play(search, broken, 99))
    assert [t.choices for t in read_trials(broken)] == [t.choices for t in read_trials(study)]


@pytest.mark.parametrize("together", [1, 3])
def test_a_grid_is_walked_through_once_however_many_run_at_once(together, words, space_file, tmp_path) -> None:
    config = load_config([*words, space_file(GRID), "tune.sampler=grid", "tune.trials=99"])
    search, study = engine(config, tmp_path / "study")
    assert num_trials(config, search._space) == 7
    assert num_trials(load_config([*words, space_file(GRID), "tune.trials=99"]), search._space) == 99
    good, bad = {"finished": True, "epoch": 3, "val_accuracy": 0.5}, {"failed": "no luck"}
    running: list[str] = []
    for turn in range(99):
        if search.suggest(f"t{turn}") == "FINISHED":
            break
        running.append(f"t{turn}")
        if len(running) == together:
            search.on_trial_complete(running.pop(0), bad if turn == 3 else good)
    for left in running:
        search.on_trial_complete(left, good)
    cells = [json.dumps(t.choices, sort_keys=True) for t in read_trials(study) if not t.own]
    assert len(cells) == len(set(cells)) == 6


def test_of_two_trials_of_equal_settings_the_second_waits_for_the_first(words, space_file, tmp_path) -> None:
    search, study = engine(load_config([*words, space_file(), "tune.trials=3"]), tmp_path / "study")
    places = iter(["a", "a", "b"])
    search._make_job = lambda choices: (None, StageDirectory(next(places), "distill", "{}"))
    assert search.suggest("first")["number"] == 0
    assert search.suggest("second") is None
    assert search.suggest("third") is None
    search.on_trial_complete("first", {"finished": True, "epoch": 3, "val_accuracy": 1})
    assert search.suggest("fourth")["number"] == 1
    assert search.suggest("fifth")["number"] == 2
    assert search.suggest("sixth") == "FINISHED"
    assert [t.state for t in read_trials(study)] == ["complete", "running", "running"]


def test_the_jobs_own_trial_is_the_job_and_no_other(words, space_file, tiny_set, tmp_path) -> None:
    file = space_file("loss.temperature: {log: [1, 20]}\nviews.min_scale: {fixed: 0.5}\nloss.kd_weight: {fixed: 3}\n")
    config = load_config([*words, file, "views.min_scale=0.2"])
    space = read_space(config.tune.space, config)
    splits = dict.fromkeys(("train", "val", "test"), "x")
    samples = dataclasses.replace(tiny_set.samples, ids=splits, labels=splits)
    own, searched = (Outcome(samples=samples, directories={"teach": place}) for place in ("own", "searched"))
    record = JobRecord(config, "0" * 12, "")
    make_job = tune_module._job_maker(config, space, {"own": own, "{}": searched}, record)
    job, directory = make_job(None)
    assert directory.name in record.run.directories.values()  # or `clean` would delete what is trained
    assert directory == distill_directory(config, samples)
    assert (job.config.views, job.config.loss, job.targets) == (config.views, config.loss, "own")
    job, directory = make_job(space.own(config))
    assert (job.config.views.min_scale, job.config.loss.kd_weight, job.targets) == (0.5, 3, "searched")
    assert directory != distill_directory(config, samples)
    # The engine says which of the two it is.
    asked = []
    search, study = engine(config, tmp_path / "study")
    make = search._make_job
    search._make_job = lambda choices: (asked.append(choices), make(choices))[1]
    list(play(search, study, 2))
    assert asked == [None, read_trials(study)[1].choices]


def test_the_first_trial_has_the_jobs_own_values_and_more_trials_go_on(words, space_file, tmp_path) -> None:
    short = load_config([*words, space_file(), "tune.trials=3", "loss.projection_dim=8"])
    search, study = engine(short, tmp_path / "study")
    list(play(search, study, 99))
    first = read_trials(study)
    assert (first[0].own, first[0].choices) == (
        True, {"loss.temperature": 4.0, "loss.projection_head": "simclr", "loss.projection_dim": 8},
    )  # fmt: skip
    assert [t.own for t in first] == [True, False, False]
    search, study = engine(
        load_config([*words, space_file(), "tune.trials=5", "loss.projection_dim=8"]), tmp_path / "study"
    )
    assert list(play(search, study, 99)) == [3, 4]
    assert read_trials(study)[:3] == first
    # A value that the space does not hold is not invented.
    search, study = engine(load_config([*words, space_file(), "loss.projection_dim=7"]), tmp_path / "other")
    next(play(search, study, 1))
    assert read_trials(study)[0].choices == {"loss.temperature": 4.0, "loss.projection_head": "simclr"}


def test_what_becomes_of_a_trial_is_remembered(words, space_file, tmp_path) -> None:
    search, study = engine(load_config([*words, space_file(), "tune.trials=6"]), tmp_path / "study")
    ends = [
        ({"finished": True, "epoch": 3, "val_accuracy": 0.5, "seconds": 2.0}, False, "complete", ""),
        ({"finished": True, "epoch": 3, "val_accuracy": float("nan")}, False, "failed", r"not finite: [nan]"),
        ({"finished": True, "epoch": 3, "val_accuracy": float("inf")}, False, "failed", r"not finite: [inf]"),
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
    assert [t.epochs for t in found] == [3, 0, 0, 0, 0, 2]
    assert study.best_trial.number == 0


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


class Following(Silent):
    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []

    def measured(self, number, record) -> None:
        self.told.append((number, record))


def test_every_epoch_is_followed_and_those_with_a_value_are_judged(words, space_file, tmp_path) -> None:
    search, study = engine(load_config([*words, space_file(), "tune.grace_epochs=2"]), tmp_path / "study")
    search._display = Following()
    search.suggest("t")
    for epoch in (1, 2, 3):
        record = {"epoch": epoch, "step": 4 * epoch, "loss": 1.0, "pid": 7, "seconds": 1.0}
        assert not search.falls_behind("t", record | ({"val_accuracy": 0.5} if epoch == 2 else {}))
    assert study.trials[0].intermediate_values == {2: 0.5}
    last = {"epoch": 4, "step": 16, "loss": 0.5, "val_accuracy": 0.7, "finished": True}
    assert not search.falls_behind("t", last)
    assert [record["epoch"] for _, record in search._display.told] == [1, 2, 3, 4]
    assert search._display.told[-1] == (0, {"epoch": 4, "step": 16, "loss": 0.5, "val_accuracy": 0.7})


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_a_rung_whose_report_was_lost_with_the_search_is_judged_when_it_goes_on(
    pruner, words, space_file, tmp_path
) -> None:
    more = ["tune.trials=20", f"tune.pruner={pruner}", "tune.grace_epochs=2", "distill.epochs=20"]
    config = load_config([*words, space_file(), *more])
    records = [{"epoch": epoch, "val_accuracy": 0.1 * epoch} for epoch in range(1, 20)]
    search, study = engine(config, tmp_path / "study")
    for _ in range(4):
        search.suggest("t")
        for record in records:
            assert not search.falls_behind("t", record)
        search.on_trial_complete("t", {"finished": True, "epoch": 20, "val_accuracy": 2})
    search.suggest("t")
    poor = [{"epoch": epoch, "val_accuracy": 0.01 * epoch} for epoch in range(1, 20)]
    assert not search.falls_behind("t", poor[0])
    # Killed before it heard of the second epoch, whose checkpoint is there: the trial tells of both again.
    search, study = engine(config, tmp_path / "study")
    assert search.suggest("t")["number"] == 4
    assert [search.falls_behind("t", record) for record in poor[:3]][-2:] != [False, False]
    # A student that was trained before costs nothing more, and is kept.
    search.on_trial_complete("t", poor[2])
    search.suggest("t")
    assert not any(search.falls_behind("t", {**record, "trained_before": True}) for record in poor)
    assert set(study.trials[5].intermediate_values) == set(range(1, 20))


class Heard:
    """Tune's side of `report`: keeps what it hears, and ends the trial at an epoch."""

    def __init__(self, stop_at: int = 0) -> None:
        self.records: list[dict] = []
        self.stop_at = stop_at

    def __call__(self, record: dict) -> None:
        assert not (self.records and self.records[-1].get("epoch") == self.stop_at), "it listens no more"
        self.records.append(record)
        if record.get("epoch") == self.stop_at:
            sys.exit(0)


@pytest.fixture
def trained(tiny_set, monkeypatch):
    """Runs the trainable of a trial of 4 epochs, val measured on the 2nd and 4th, in this process."""
    monkeypatch.setenv("TUNE_FUNCTION_THREAD_TIMEOUT_S", "2")

    def run(heard: Heard, name: str = "trial", distill: dict[str, object] | None = None, **changes) -> StageDirectory:
        job = tiny_set.job(name, distill={"val_every": 2} | (distill or {}))
        job = dataclasses.replace(job, **changes)
        directory = StageDirectory(job.path, "distill", "{}")
        plan = dataclasses.replace(plan_resources(job.config, 2.0, 0.0, 1), train_workers=0)
        monkeypatch.setattr(tune, "report", heard)
        with pytest.raises(SystemExit) if heard.stop_at else contextlib.nullcontext():
            run_trial({"work": pickle.dumps(TrialWork(job, directory, plan, ("val_accuracy",)))})
        return directory

    return run


def test_a_trial_whose_val_rises_no_more_ends_with_the_epoch_at_which_it_stopped(trained) -> None:
    settings = {"epochs": 30, "val_every": 1, "patience": 1, "learning_rate": 1e-6, "schedule": "constant"}
    first, again = Heard(), Heard()
    for heard in (first, again):  # the second finds it trained
        trained(heard, distill=settings)
        assert [r["epoch"] for r in heard.records] == list(range(1, len(heard.records) + 1))
        assert [r.get("finished", False) for r in heard.records] == [False] * (len(heard.records) - 1) + [True]
    assert 1 < len(first.records) == len(again.records) < 30
    assert first.records[-1]["shipped"] == again.records[-1]["shipped"]


def learnt(records: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "images_per_second", "waits_for_data")} for r in records
    ]


def test_a_trial_tells_of_every_epoch_and_again_of_those_before_it_was_killed(trained) -> None:
    unbroken, first, second, done = Heard(), Heard(stop_at=3), Heard(), Heard()
    trained(unbroken, "unbroken")
    assert [r["epoch"] for r in unbroken.records] == [1, 2, 3, 4]
    assert ["val_accuracy" in r for r in unbroken.records] == [False, True, False, True]
    assert [r.get("finished", False) for r in unbroken.records] == [False, False, False, True]
    # Tune waits for the end of a trial that it ended, before the next one takes its process.
    assert os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] == "600"
    trained(first)
    assert [r["epoch"] for r in first.records] == [1, 2, 3]
    directory = trained(second)
    assert learnt(second.records) == learnt(unbroken.records)
    trained(done)
    assert [r.get("trained_before") for r in done.records] == [True, True, True, None]
    took = json.loads((Path(directory.path) / "seconds.json").read_text())["seconds"]
    assert done.records[-1]["seconds"] == took > 0
    assert learnt(done.records)[-1] == learnt(unbroken.records)[-1]


def test_a_trial_that_tune_has_ended_says_nothing_more_whatever_goes_wrong_on_its_way_out(trained, monkeypatch) -> None:
    """Its last checkpoint cannot be written: this comes up after Tune's end, which nobody may wait for."""
    written = []
    save = checkpoints.save_file

    def full(weights, path):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        save(weights, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    heard = Heard(stop_at=2)
    trained(heard)
    assert len(written) == 2
    assert [r["epoch"] for r in heard.records] == [1, 2]


def test_whatever_a_trial_fails_of_is_told_with_its_kind(trained, monkeypatch) -> None:
    for targets, words in {
        "/dev/null": "NotADirectoryError: ",
        "/nowhere": "/nowhere/train-00000.safetensors is",
    }.items():
        heard = Heard()
        trained(heard, targets=targets)
        (record,) = heard.records
        assert record["failed"].startswith(words)
        assert targets in record["failed"]
        assert record["seconds"] > 0


def test_checkpoints_of_trials_that_ended_early_are_dropped_and_no_others(tmp_path) -> None:
    root = tmp_path / "w"

    def trial(place: Path, state: str) -> Trial:
        (place / "checkpoints/step-000000001").mkdir(parents=True)
        (place / "checkpoints/step-000000001/state.pt").touch()
        (place / "checkpoints/newest.json").write_text('["step-000000001"]')
        return Trial(0, state, {}, None, False, 1, 1.0, str(place), "")

    states = ["complete", "pruned", "failed", "running"]
    places = [root / f"distill-00000000000{number}" for number in range(len(states))]
    # A study is in a database that somebody else may have filled: of what it names, places in the workspace count.
    others = [tmp_path / "victim", root / "photos", root / "..", root / "teach-000000000000"]
    moved = trial(tmp_path / "before/distill-00000000000a", "pruned")
    trial(root / "distill-00000000000a", "pruned")
    lost = Trial(9, "pruned", {}, None, False, 1, 1.0, str(tmp_path / "nowhere/distill-0123456789ab"), "")
    drop_pruned([*map(trial, places, states), *(trial(o, "pruned") for o in others), moved, lost], str(root))
    assert [(place / "checkpoints").exists() for place in places] == [True, False, True, True]
    assert all((place / "checkpoints/step-000000001/state.pt").exists() for place in others)
    assert not (root / "distill-00000000000a/checkpoints").exists()
    assert (tmp_path / "before/distill-00000000000a/checkpoints").exists()


def test_a_study_of_a_stranger_is_refused_by_the_trial_or_the_note_that_is_odd(words, space_file, tmp_path) -> None:
    config = load_config([*words, space_file()])
    odd = {"seconds": ["x", [1], -1, float("inf")], "epochs": ["many", None, -3]}
    for name, value in [(name, value) for name, values in odd.items() for value in values]:
        study = optuna.create_study()
        study.tell(study.ask(), 0.5)
        study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={name: value}))
        with pytest.raises(CheckpointError, match=r"^the study's trial 1 is not what raydistill writes"):
            read_trials(study)
    for value in ("\x1b[2J", None, float("nan"), -1):
        study = optuna.create_study()
        study.set_user_attr("seconds of command x", value)
        with pytest.raises(CheckpointError, match=r"note 'seconds of command x' is not .* not a number of seconds"):
            assert Clock(study).seconds is None
    space = read_space(config.tune.space, config)
    key = next(key for key, entry in space.entries.items() if entry.categorical is not None)
    for label in ("no such label", None, 3.5):
        with pytest.raises(CheckpointError, match=r"trial 7 is not what raydistill writes .the space does not hold"):
            refuse_others([Trial(7, "complete", {key: label}, [1.0], False, 1, 1.0, "", "")], space)
    for number, make in enumerate((Path.mkdir, os.mkfifo, lambda path: path.write_bytes(b"junk" * 999))):
        folder = tmp_path / f"odd{number}"
        folder.mkdir()
        make(folder / "study.db")
        with pytest.raises(ConfigError, match=f"tune.storage=sqlite:///{folder}/study.db (is no|cannot be)"):
            engine(config, folder)
    engine(config, tmp_path / "own")
    with contextlib.closing(sqlite3.connect(tmp_path / "own/study.db")) as database:
        database.execute("create trigger t after insert on trials begin delete from trials; end")
    with pytest.raises(ConfigError, match="holds a trigger, 't', which would run when it is used"):
        engine(config, tmp_path / "own")


def test_a_study_of_a_stranger_runs_no_code(words, space_file, tmp_path) -> None:
    """Optuna keeps the state of CMA-ES in the study, as a pickle."""

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "RAN",)

    text = "loss.temperature: {log: [1, 20]}\nloss.projection_dim: {int: [4, 16]}\n"
    config = load_config([*words, space_file(text), "tune.sampler=cmaes", "tune.trials=14"])
    search, study = engine(config, tmp_path / "study")
    list(play(search, study, 10))
    with contextlib.closing(sqlite3.connect(tmp_path / "study/study.db")) as database, database:
        of_cma = "trial_system_attributes where key like 'cma:optimizer:%'"
        assert database.execute(f"select count(*) from {of_cma}").fetchone()[0] > 0
        database.execute(f"delete from {of_cma} and key != 'cma:optimizer:0'")
        payload = json.dumps(pickle.dumps(Payload()).hex())
        database.execute("update trial_system_attributes set value_json = ? where key = 'cma:optimizer:0'", [payload])
    search, study = engine(config, tmp_path / "study")
    with pytest.raises(CheckpointError, match="which could run code"):
        list(play(search, study, 2))
    assert not (tmp_path / "RAN").exists()


PAIR = ["distill.num_workers=2"]


@pytest.mark.parametrize(
    ("more", "machine", "together", "share", "threads"),
    [
        ([], (2.0, 0.0, 2), 1, {"CPU": 2.0}, 2),
        ([], (8.0, 0.0, 8), 2, {"CPU": 4.0}, 4),
        (["tune.concurrent=1"], (8.0, 0.0, 8), 1, {"CPU": 4.0}, 8),
        ([], (8.0, 2.0, 8), 2, {"CPU": 4.0, "GPU": 1.0}, 4),
        # Four nodes of 2 cores and two of 8: no share is larger than a node, and no trial has more threads than it.
        ([], (8.0, 0.0, 2), 4, {"CPU": 2.0}, 2),
        (["tune.concurrent=8"], (16.0, 0.0, 8), 8, {"CPU": 2.0}, 2),
        (["tune.concurrent=2"], (16.0, 0.0, 8), 2, {"CPU": 4.0}, 8),
        (["tune.concurrent=3"], (2.0, 0.0, 2), 3, {"CPU": 0.66}, 1),
        # Two workers a trial: the GPUs would do for 4 trials, the CPUs for 2.
        (PAIR, (4.0, 8.0, 4), 2, {"CPU": 0.01}, 2),
        (PAIR, (16.0, 4.0, 16), 2, {"CPU": 0.01}, 8),
        (PAIR, (1.9, 0.0, 2), 1, {"CPU": 0.01}, 1),
        ([*PAIR, "tune.concurrent=2"], (4.0, 0.0, 4), 2, {"CPU": 0.01}, 2),
    ],
)
def test_trials_share_the_machines(more, machine, together, share, threads, words) -> None:
    config = load_config([*words, *more])
    layout = plan_trials(config, plan_resources(config, *machine))
    assert (layout.together, layout.share, layout.plan.train_threads) == (together, share, threads)
    assert layout.plan.train_workers == (2 if more[:1] == PAIR else 0)


@pytest.mark.parametrize(
    ("more", "machine", "message"),
    [
        (["tune.concurrent=30"], (2.0, 0.0, 2), r"get 0.06 each of 2 CPUs"),
        (["tune.concurrent=30"], (64.0, 2.0, 64), r"2 GPUs, which is too little; lower it"),
        ([*PAIR, "tune.concurrent=3"], (4.0, 0.0, 4), r"tune.concurrent=3 .* need 6 CPUs, and there are 4 CPUs and 0"),
        ([*PAIR, "tune.concurrent=3"], (64.0, 4.0, 64), r"need 6 CPUs and 6 GPUs"),
    ],
)
def test_more_trials_at_once_than_fit_are_refused(more, machine, message, words) -> None:
    config = load_config([*words, *more])
    with pytest.raises(ConfigError, match=message):
        plan_trials(config, plan_resources(config, *machine))


def test_keys_that_a_sampler_does_not_model_are_named(words, space_file) -> None:
    text = SPACE + "distill.momentum: {float: [0.1, 0.2]}\n"  # the job's is 0.9

    def at_random(sampler: str) -> list[str]:
        config = load_config([*words, space_file(text), f"tune.sampler={sampler}"])
        return drawn_at_random(config, read_space(config.tune.space, config))

    assert at_random("tpe") == at_random("random") == []
    assert at_random("gp") == at_random("qmc") == ["distill.momentum"]
    assert at_random("cmaes") == ["loss.projection_head", "distill.momentum"]


def test_a_key_that_the_first_trial_lacks_is_searched_with_the_others(words, space_file, tmp_path) -> None:
    """The job's momentum is outside the space, whose other key says nothing: the best value is found all the same."""
    text = "distill.momentum: {float: [0, 0.5]}\nloss.temperature: {log: [1, 20]}\n"
    config = load_config([*words, space_file(text), "tune.trials=60"])
    search, study = engine(config, tmp_path / "study")
    for turn in range(60):
        search.suggest(f"t{turn}")
        choices = read_trials(study)[-1].choices
        value = 1 - abs(choices.get("distill.momentum", 0.5) - 0.1)
        search.on_trial_complete(f"t{turn}", {"finished": True, "epoch": 3, "val_accuracy": value})
    found = [t.choices["distill.momentum"] for t in read_trials(study)[1:]]
    assert np.median(np.abs(np.array(found[30:]) - 0.1)) < 0.05 < np.median(np.abs(np.array(found[:10]) - 0.1))


def test_a_forecast_counts_the_confirmation(words) -> None:
    config = load_config([*words, "tune.confirm_seeds=3", "cluster.price_per_hour=6", "tune.pruner=none"])
    lines = forecast_lines(config, left=10, together=4, each=20.0, before=50.0)
    assert lines == [
        "tune: 10 trials, 4 at a time, of about 20 s each: about 60 s",
        "tune: then 6 trainings with 3 new seeds to confirm, 50 s of earlier stages for each: about 4 min",
        "tune: about 6 min in all, 0.55 at 6 an hour",
    ]
    (unknown,) = forecast_lines(config, left=10, together=4, each=None, before=50.0)
    assert "time unknown" in unknown
    alone = load_config([*words, "tune.confirm_seeds=0"])
    assert forecast_lines(alone, 10, 1, 20.0, 50.0)[-1] == "tune: about 3 min in all"


def test_a_forecast_of_steps_that_cannot_be_taken_is_unknown(tiny_set, monkeypatch) -> None:
    assert seconds_per_step(tiny_set.job("a"), 1) > 0

    def out_of_memory(job, worker):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(forecast, "distill_loop", out_of_memory)
    assert seconds_per_step(tiny_set.job("a"), 1) is None


def test_the_clock_adds_up_over_commands_also_one_that_was_killed(words, space_file, tmp_path, monkeypatch) -> None:
    now = itertools.count(0.0, 7.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    config = load_config([*words, space_file()])
    _, study = engine(config, tmp_path / "study")
    killed = Clock(study)  # 0
    killed.note()  # 7 s, and no more is heard of it
    with Clock(study) as clock:
        clock.tick()  # only 7 s later, which is not worth a note
        first = clock.seconds
    assert first > 7
    with Clock(engine(config, tmp_path / "study")[1]) as clock:
        assert clock.seconds > first


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_runs_that_a_killed_command_did_not_come_to_are_written_by_the_next(
    words, space_file, progress, tmp_path
) -> None:
    config = load_config([*words, space_file(), "tune.trials=4", "tracking.enabled=true"])
    search, study = engine(config, tmp_path / "study")
    list(play(search, study, 2))
    search.suggest("t")
    search.on_trial_complete("t", {"failed": "no luck"})
    place = Path(read_trials(study)[0].directory) / "epochs"
    place.mkdir(parents=True)
    (place / "00001.json").write_text(json.dumps({"epoch": 1, "step": 4, "loss": 2.0}))

    def search_again() -> dict[str, object]:
        with Tracker(config, job="x") as tracker:
            tracker.end_orphans()
            SearchDisplay(config, progress, read_trials(study), 4, Clock(study)).record_ended(tracker)
        client = tracker.client
        found = client.search_runs([tracker.experiment], "tags.`raydistill.stage` LIKE 'trial%'")
        return {run.info.run_name: run for run in found}

    with Tracker(config, job="x") as tracker:  # the first was being written, the others not yet
        ChildRun(tracker, "trial 00000")
    runs = search_again()
    assert {name: run.info.status for name, run in runs.items()} == {
        "trial 00000": "FINISHED", "trial 00001": "FINISHED", "trial 00002": "FAILED",
    }  # fmt: skip
    assert runs["trial 00000"].data.metrics == {
        "epoch": 1, "step": 4, "loss": 2.0, "seconds": 1, "val_accuracy": read_trials(study)[0].values[0],
    }  # fmt: skip
    assert runs["trial 00000"].data.params["own values"] == "True"
    assert runs["trial 00002"].data.tags["raydistill.reason"] == "no luck"
    again = search_again()
    assert {n: r.info.end_time for n, r in again.items()} == {n: r.info.end_time for n, r in runs.items()}


def test_the_order_of_labels_and_of_keys_makes_another_search(words, space_file, progress) -> None:
    def name(text: str) -> str:
        config = load_config([*words, space_file(text)])
        return tune_directory(config, read_space(config.tune.space, config), progress).name

    families = ["kd: {kd_weight: 1}", "dkd: {dkd_weight: 1}"]
    texts = [f"loss: {{categorical: {{{', '.join(order)}}}}}\n" for order in (families, families[::-1])]
    texts += ["loss.temperature: {log: [1, 2]}\n" + texts[0], texts[0] + "loss.temperature: {log: [1, 2]}\n"]
    assert len({name(text) for text in texts}) == 4
    assert name(texts[0]) == name(texts[0].replace(" ", "  "))


def test_what_makes_another_search_is_said_line_by_line(words, space_file) -> None:
    said = io.StringIO()
    for text, sampler in (("[1, 2]", "tpe"), ("[1, 3]", "random"), ("[1, 3]", "random")):
        config = load_config([*words, space_file(f"loss.temperature: {{log: {text}}}\n"), f"tune.sampler={sampler}"])
        tune_directory(config, read_space(config.tune.space, config), Progress(Console(file=said, width=200))).begin()
    first, *changes = ("".join(line.split()).strip(",") for line in said.getvalue().splitlines())
    assert first.startswith("tune:anewsearch,sincethischangedfromtheonein")
    assert changes == ["-2.0", "+3.0", '-"sampler":"tpe"', '+"sampler":"random"']


def test_what_a_stranger_changed_is_said_in_few_lines(words, space_file) -> None:
    said = io.StringIO()
    config = load_config([*words, space_file("loss.temperature: {log: [1, 2]}\n")])
    directory = tune_directory(config, read_space(config.tune.space, config), Progress(Console(file=io.StringIO())))
    directory.begin()
    other = json.loads(directory.identity) | {"space": [[str(k), {}] for k in range(5000)]}
    directory.write_json("identity.json", other)
    config = load_config([*words, space_file("loss.temperature: {log: [1, 3]}\n")])
    tune_directory(config, read_space(config.tune.space, config), Progress(Console(file=said, width=200)))
    assert len(said.getvalue().splitlines()) == 52
    assert "more lines" in said.getvalue()


def test_a_study_of_other_objectives_is_refused(words, space_file, tmp_path) -> None:
    engine(load_config([*words, space_file()]), tmp_path / "study")
    config = load_config([*words, space_file(), "tune.objectives=[val_accuracy, parameters]", "tune.pruner=none"])
    with pytest.raises(ConfigError, match="has a study of 1 objectives: name another database"):
        engine(config, tmp_path / "study")


def page_of(study: optuna.Study, *objectives: str, verdict: str = "a verdict") -> str:
    return search_page(
        study, objectives, name="a job", verdict=verdict, tiles=[("0.9", "best")], best=Table(["trial"], [["0"]])
    ).decode()


@pytest.mark.parametrize(
    ("directions", "pictures", "said"),
    [
        (["maximize", "minimize"], 5, "<h2>Pareto front</h2>"),
        (["maximize"], 2, "Which settings matter is not known yet: this takes 20 trials"),
    ],
)
def test_the_page_has_the_pictures_that_the_trials_suffice_for(directions, pictures, said) -> None:
    study = optuna.create_study(directions=directions)
    for turn in range(5):
        trial = study.ask()
        study.tell(trial, [trial.suggest_float("loss.temperature", 1, 9), turn][: len(directions)])
    page = page_of(study, *["val_accuracy", "parameters"][: len(directions)])
    assert page.count("<svg") == pictures
    assert said in page


def test_trials_that_ended_early_are_compared_at_an_epoch_that_all_reached() -> None:
    """Only two come to an end, and those alone would say that the temperature does nothing."""
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=optuna.pruners.NopPruner())
    for number in range(24):
        trial = study.ask()
        first, second = trial.suggest_float("loss.temperature", 1, 9), trial.suggest_float("loss.kd_weight", 0, 1)
        assert 0 <= second <= 1
        trial.report(first / 9, 1)
        if number >= 2:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        trial.report(0.9, 2)
        study.tell(trial, 0.95)
    compared, when = study_page._compared(study)
    assert len(compared) == 24
    assert all(t.value == pytest.approx(t.params["loss.temperature"] / 9) for t in compared)
    assert when == "after epoch 1, which all 24 trials reached"
    page = page_of(study, "val_accuracy")
    assert page.count("<svg") == 4
    assert "What it depends on, after epoch 1, which all 24 trials reached" in page
    table = page[page.index("share of the variance") :]
    assert table.index("loss.temperature") < table.index("loss.kd_weight")


@pytest.mark.filterwarnings("error:Glyph")
def test_labels_of_strangers_are_text_in_the_pictures_of_a_search() -> None:
    """No formula, which would end a picture, no control sign, and none taken for another one."""
    labels = ["$x$", r"$\frac{1}$", "\x1b[2Jcat\u202e", "<img src=x onerror=alert(1)>", f"{'a' * 99}b", f"{'a' * 99}c",
              "two\nlines", 1, None]  # fmt: skip
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))
    for turn in range(20):
        trial = study.ask()
        trial.suggest_categorical("loss", labels)
        study.tell(trial, trial.suggest_float("$\x1b]0;k$", 0, 1) + turn % 3)
    page = page_of(study, "val_accuracy", verdict="ends\x1b[2J<b>")
    assert page.count("<svg") == 4
    assert "ends\\x1b[2J&lt;b&gt;" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]|<img|J<b>", page)
    (drawn,) = re.findall("<svg[^>]*by loss.*?</svg>", page, flags=re.S)
    shown = [html.unescape(text) for text in re.findall("<text[^>]*>(.*?)</text>", drawn)]
    expected = {"$x$", r"$\frac{1}$", r"\x1b[2Jcat\u202e", "<img src=x onerror=alert(1)>", r"two\nlines", "None"}
    assert expected <= set(shown)
    assert all(len(text) < 70 for text in shown)


OFF = [f"loss.{name}_weight=0" for name in ("kd", "alignment", "uniformity")]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["tune.space=null"], "give --space FILE"),
        (["tune.objectives=[val_accuracy,parameters]"], "set tune.pruner=none"),
        (["views.per_image=fresh"], "would run the teacher again in every trial"),
        (["tune.sampler=grid"], "a grid needs a list of values"),
        (["tune.space=VIEWS"], "3 combinations of keys that change the stages"),
        (["tune.space=STUDENT"], "no model of this name|unknown|no such"),
        (["tune.storage=sqlite:////nowhere/study.db"], "tune.storage=sqlite:////nowhere/study.db: cannot be opened"),
        (["tune.concurrent=1000"], "tune.concurrent=1000 trials at once"),
        (["distill.num_workers=2", "tune.concurrent=1000"], "tune.concurrent=1000 trials at once, with 2 workers each"),
        (["tune.space=HEADS", "tune.sampler=cmaes"], "would draw every key of this space at random"),
        (["tune.sampler=cmaes", "tune.objectives=[loss,parameters]", "tune.pruner=none"], "takes one objective"),
        (["tune.space=LOSSES", "views.per_image=fresh", *OFF], "would run the teacher again in every trial"),
        (["tune.space=PRECISION", "teacher.head=fine_tune"], "distill.precision: teacher.head=fine_tune trains the"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_starts(more, message, words, space_file, progress, tmp_path):
    files = {
        "tune.space=VIEWS": space_file("views.per_image: {int: [1, 3]}\nloss.temperature: {log: [1, 2]}"),
        "tune.space=STUDENT": space_file('student.model: {categorical: ["timm:test_resnet", "timm:test_resnat"]}'),
        "tune.space=HEADS": space_file("loss.projection_head: {categorical: [linear, simclr]}"),
        "tune.space=LOSSES": space_file("loss: {categorical: {task: {kd_weight: 0}, kd: {kd_weight: 1}}}"),
        "tune.space=PRECISION": space_file("distill: {categorical: {a: {precision: bf16}, b: {precision: fp32}}}"),
    }
    with pytest.raises(ConfigError, match=message):
        tune_job(load_config([*words, space_file(), "tune.trials=2", *(files.get(w, w) for w in more)]), progress)
    assert not list((tmp_path / "workspace").glob("*-*/DONE"))


@pytest.mark.parametrize(
    ("gain", "seeds", "said"),
    [
        ({"val": 0.2, "test": 0.2}, 3, "on test, p "),
        ({"val": 0.2, "test": 0.02}, 3, "so this may be chance: "),
        ({"val": 0.2, "test": -0.02}, 3, "keep the job's own values"),
        ({"val": 0.2}, 3, "on val, which the search selected by, p "),
        ({"val": 0.2, "test": 0.2}, 1, "one seed cannot show a difference: set tune.confirm_seeds=3"),
    ],
)
def test_what_the_search_did_not_choose_by_decides(words, gain, seeds, said) -> None:
    """Half of 200 images are right with the job's own values; each seed errs on five others of them."""
    ids = np.arange(200)
    answers = {
        split: {"own": [Answers(ids, (ids + 5 * seed) % 200 < 100) for seed in range(seeds)],
                "best": [Answers(ids, (ids + 5 * seed) % 200 < 100 + 200 * points) for seed in range(seeds)]}
        for split, points in gain.items()
    }  # fmt: skip
    trials = [Trial(n, "complete", {}, [0.5 + n / 10], n == 0, 1, 1.0, "", "") for n in range(2)]
    gains = gains_of(answers)
    assert {g.split: pytest.approx(g.gain) for g in gains} == gain
    config = load_config([*words, f"tune.confirm_seeds={seeds}"])
    assert said in search_verdict(config, trials[1], trials, gains)


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session", "taught")
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
@pytest.mark.usefixtures("ray_session", "taught")
def test_trials_that_all_fail_end_the_search_with_the_reasons_counted(words, space_file, progress) -> None:
    words = [*words, space_file(), "distill.learning_rate=1e30", "tune.trials=3"]
    with pytest.raises(StageError, match=r"none of the 3 trials is complete:\n  \d x distill: the loss or its"):
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

    def test_a_trial_that_fails_in_training_is_named_and_the_others_go_on(self, words, space_file, progress) -> None:
        file = space_file("distill.learning_rate: {categorical: [0.001, 0.002, 1.0e+30]}")
        more = ["tune.trials=4", "tune.sampler=grid", "tune.pruner=none", "tune.confirm_seeds=0"]
        search = tune_job(load_config([*words, "distill.learning_rate=0.001", file, *more]), progress)
        trials = {t.choices["distill.learning_rate"]: t for t in search.trials}
        assert {rate: t.state for rate, t in trials.items()} == {0.001: "complete", 0.002: "complete", 1e30: "failed"}
        assert "the loss or its" in trials[1e30].reason
        assert search.trials[search.best_number].state == "complete"

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
        assert "<h2>Pareto front</h2>" in (Path(search.path) / "search.html").read_text()


def start_search(words: list[str]) -> subprocess.Popen:
    """As a command of its own, in a session that can be killed whole."""
    arguments = [sys.executable, "-c", "from raydistill.cli import main; main()", "tune", *words]
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_trials_of_two_workers_go_through_ray_train(words, space_file, tmp_path) -> None:
    """In a Ray of its own, with the dashboard that Tune's clean-up asks: the session's has none."""
    more = ["distill.num_workers=2", "tune.trials=3", "tune.confirm_seeds=0", "distill.epochs=9", "distill.val_every=1"]
    process = start_search([*words, space_file(), *more])
    assert process.wait(280) == 0, process.stdout.read()
    (path,) = (tmp_path / "workspace").glob("tune-*/search.json")
    states = [trial["state"] for trial in json.loads(path.read_text())["trials"]]
    assert set(states) <= {"complete", "pruned"}
    assert states[0] == "complete"


@pytest.mark.slow
def test_sigterm_ends_the_search_and_its_trial_as_killed(words, space_file, tmp_path) -> None:
    words = [*words, space_file(), "distill.epochs=2000", "tracking.enabled=true", "tune.concurrent=1"]
    workspace = tmp_path / "workspace"
    process = start_search(words)
    wait_for(lambda: process.poll() is not None or list(workspace.glob("distill-*/epochs/*.json")))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143, process.stdout.read()
    with sqlite3.connect(workspace / "mlflow.db") as database:
        states = dict(database.execute("select name, status from runs").fetchall())
    assert states == {"raydistill": "KILLED", "trial 00000": "KILLED"}


@pytest.mark.slow
def test_a_search_that_is_killed_ten_times(words, space_file, tmp_path) -> None:
    words = [*words, space_file(), "tune.trials=12", "tune.confirm_seeds=0", "distill.epochs=12", "distill.val_every=1"]
    words += ["tracking.enabled=true", "tune.concurrent=1"]

    def search(folder: str) -> subprocess.Popen:
        return start_search([*words, f"workspace={tmp_path}/{folder}"])

    def epochs(folder: str) -> list[float]:
        return sorted(path.stat().st_mtime for path in tmp_path.glob(f"{folder}/distill-*/epochs/*.json"))

    unbroken = search("unbroken")
    assert unbroken.wait(600) == 0, unbroken.stdout.read()
    first, *_, end = epochs("unbroken")
    chance = random.Random(0)
    for _ in range(10):
        before, process = len(epochs("broken")), search("broken")
        wait_for(lambda: process.poll() is not None or len(epochs("broken")) > before)  # noqa: B023
        assert process.poll() is None, "ended before it was killed ten times"
        time.sleep(chance.uniform(0, (end - first) / 10))  # half the work is left after ten
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = search("broken")
    assert last.wait(600) == 0, last.stdout.read()
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

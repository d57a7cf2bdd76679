"""distill: which epoch ships, what is counted as lost, and the student that is written."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raydistill.engine import loop, reporter, val
from raydistill.engine.distillation_model import DistillationModel
from raydistill.engine.loop import distill_loop
from raydistill.engine.records import read_epochs, read_progress
from raydistill.errors import DataError
from raydistill.models.student import read_student, split_logits
from raydistill.stages.distill import distill_student
from raydistill.storage.directory import StageDirectory
from tests.training import distil, ends_at, here, interrupt, weights


def test_steps_that_are_taken_again_are_counted_over_all_losses(tiny_set, progress, monkeypatch) -> None:
    monkeypatch.setattr(reporter, "seconds_between_looks", lambda path: -1)  # after every step
    job = tiny_set.job("broken")
    for last in (14, 18):  # the steps after 13 and 17 are never reported; checkpoints are at 10 and 15
        interrupt(job, last)
    distil(job, progress)
    assert read_progress(job.path) == (job.total_steps, (13 - 10) + (17 - 15))
    assert progress.images_again == 5 * job.batch_size
    assert 0 < progress.seconds_again < 60


def test_loaded_weights_are_the_ones_that_ship(tiny_set, progress) -> None:
    job = tiny_set.job("ships", distill={"ema_decay": 0.8})
    records = []
    result = distil(job, progress, records.append)
    assert [r["epoch"] for r in records] == [1, 2, 3, 4]
    student, classes = read_student(result.path)
    assert classes == job.samples.classes
    logits, labels = split_logits(student, tiny_set.samples, "val", torch.device("cpu"), 5)
    assert (logits.argmax(1) == labels).mean() == result.val_accuracy
    assert load_file(Path(result.path) / "student.safetensors").keys() == student.network.state_dict().keys()
    assert not Path(result.path, "checkpoints").exists()


def scripted_val(monkeypatch: pytest.MonkeyPatch, right_of_12: list[int]) -> None:
    """The val images that are right, epoch by epoch, of what is else a real training; a resumed one is told the same
    again."""

    def logits(student, samples, split, device, size):
        epoch = round(learnt_steps(student) / 5)
        labels = np.zeros(12, int)
        right = np.arange(12) < right_of_12[epoch - 1]
        return np.stack([right, ~right], axis=1).astype(np.float32), labels

    monkeypatch.setattr(val, "split_logits", logits)


def learnt_steps(student: torch.nn.Module) -> int:
    """Batch norm counts the batches that it has seen."""
    return int(next(value for name, value in student.state_dict().items() if name.endswith("num_batches_tracked")))


@pytest.mark.parametrize(
    ("keep", "right", "ships", "killed", "ema"),
    [
        ("best", [2, 11, 6, 10], 2, None, None),
        ("best", [2, 11, 6, 10], 2, None, 0.9),
        ("best", [2, 11, 6, 10], 2, 8, None),
        ("best", [2, 11, 6, 10], 2, 12, 0.9),
        ("best", [2, 11, 11, 10], 3, 19, None),  # of equals the latest
        ("best", [0, 0, 0, 0], 4, None, None),
        ("last", [2, 11, 6, 10], 4, None, None),
        # 2^-7 is below 5 % of four looks, 2^-6 is not. Two right against none of twelve tell nothing.
        ("auto", [2, 11, 6, 4], 2, 12, None),
        ("auto", [2, 11, 6, 5], 4, None, None),
        ("auto", [2, 11, 6, 5], 4, 19, 0.9),
        ("auto", [0, 2, 0, 0], 4, None, None),
    ],
)
def test_the_epoch_that_ships(tiny_set, progress, monkeypatch, keep, right, ships, killed, ema) -> None:
    """Also where training was killed before or after it: the weights of that epoch, bit for bit."""
    scripted_val(monkeypatch, right)
    settings = {"keep": keep, "val_every": 1, "ema_decay": ema}
    job = tiny_set.job("job", distill=settings)
    if killed:
        interrupt(job, killed)
    result = distil(job, progress)
    student, _ = read_student(result.path)
    assert learnt_steps(student) == 5 * ships
    accuracy = right[ships - 1] / 12
    assert (result.kept_epoch, result.val_accuracy) == (ships, pytest.approx(accuracy))
    assert f"epoch {ships} of 4 ships: {accuracy:.3f} on val" in result.kept
    assert json.loads(Path(result.path, "student.json").read_text())["training"]["kept_epoch"] == ships
    if right[ships - 1] < max(right):
        why = "distill.keep=last" if keep == "last" else "12 val images do not show that it is better"
        assert f"although epoch 2 had {right[1] / 12:.3f}" in result.kept
        assert why in result.kept
    whole = tiny_set.job("whole", distill={**settings, "keep": "last"})
    with contextlib.suppress(KeyboardInterrupt):
        distill_loop(whole, here(ends_at(5 * ships + 1)))
    prefix = "ema.body.network." if ema else "model.student.body.network."
    expected = {k.removeprefix(prefix): v for k, v in weights(whole).items() if k.startswith(prefix)}
    for name, value in student.network.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_epochs_that_were_lost_are_not_taken_for_done(tiny_set, progress, monkeypatch) -> None:
    """Those who follow a resumed training hear of each epoch when it is there."""
    monkeypatch.setattr(reporter, "seconds_between_looks", lambda path: 3600)  # at the end of epochs alone
    job = tiny_set.job("job", distill={"checkpoint_seconds": 3600})
    interrupt(job, 17)
    assert len(read_epochs(job.path)) == 3
    steps = []
    distil(job, progress, lambda record: steps.append((record["epoch"], len(read_epochs(job.path)))))
    assert steps == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert progress.images_again == 15 * job.batch_size


@pytest.mark.parametrize(("workers", "num_train"), [(2, 3), (1, 1)])
def test_a_worker_of_one_image_a_step_is_refused_where_batch_norm_needs_two(
    make_set, progress, workers, num_train
) -> None:
    """case C13"""
    small = make_set("few", num_train=num_train)
    job = small.job("student", distill={"num_workers": workers})
    directory = StageDirectory(job.path, "distill", "{}")
    with pytest.raises(DataError, match=rf"the student has {num_train} image.*batch norm"):
        distill_student(job, directory, None, progress, lambda record: None)
    assert not list(Path(job.path).iterdir())


@pytest.mark.parametrize(
    ("keep", "averaged", "latest", "ships"),
    [
        ("auto", 2, 11, "latest"),  # 2^-9 is below 5 % of two looks
        ("auto", 6, 11, "averaged"),  # 2^-5 is not
        ("auto", 11, 2, "averaged"),
        ("best", 8, 9, "latest"),
        ("best", 9, 9, "averaged"),
        ("last", 2, 11, "averaged"),
    ],
)
def test_the_weights_that_ship_are_the_averaged_ones_unless_val_shows_the_latest_to_be_better(
    tiny_set, progress, monkeypatch, keep, averaged, latest, ships
) -> None:
    """Bit for bit, and the record, the sentence and the student's own file say which."""
    settings = {"keep": keep, "val_every": 4, "ema_decay": 0.9}
    twin = tiny_set.job("twin", distill=settings)
    distill_loop(twin, here())
    made, split = [], val.split_logits
    monkeypatch.setattr(loop, "DistillationModel", lambda job: made.append(DistillationModel(job)) or made[-1])

    def logits(student, *more):
        labels = split(student, *more)[1]
        right = np.arange(12) < (latest if student is made[-1].student else averaged)
        return np.eye(3)[np.where(right, labels, (labels + 1) % 3)], labels

    monkeypatch.setattr(val, "split_logits", logits)
    job = tiny_set.job("job", distill=settings)
    result = distil(job, progress)
    [record] = [record for record in read_epochs(job.path) if "val_accuracy" in record]
    other = {"latest": "averaged", "averaged": "latest"}[ships]
    by_name = {"averaged": averaged / 12, "latest": latest / 12}
    assert record["is_averaged"] == (ships == "averaged")
    assert (record["val_accuracy_averaged"], record["val_accuracy_latest"]) == tuple(by_name.values())
    assert result.val_accuracy == record["val_accuracy"] == by_name[ships]
    assert f"it has the {ships} weights (the {other} ones had {by_name[other]:.3f})" in result.kept
    assert json.loads(Path(result.path, "student.json").read_text())["training"]["kept"] == result.kept
    prefix = {"averaged": "ema.body.network.", "latest": "model.student.body.network."}[ships]
    expected = {k.removeprefix(prefix): v for k, v in weights(twin).items() if k.startswith(prefix)}
    for name, value in read_student(result.path)[0].network.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("keep", "ships"), [("best", 2), ("auto", 4)])
@pytest.mark.parametrize("killed", [None, 13, 19])
def test_a_training_that_stops_says_so_and_ships_by_the_same_rule(
    tiny_set, progress, monkeypatch, keep, ships, killed
) -> None:
    scripted_val(monkeypatch, [2, 9, 9, 8, 12, 12, 12, 12])
    settings = {"keep": keep, "val_every": 1, "patience": 2, "epochs": 8}
    job, records = tiny_set.job("job", distill=settings), []
    if killed:
        interrupt(job, killed)
    result = distil(job, progress, records.append)
    if keep == "best":
        ships = 3  # of equals the latest
    assert [record["epoch"] for record in read_epochs(job.path)] == [1, 2, 3, 4]
    assert records[-1]["epoch"] == 4
    assert (result.kept_epoch, result.steps) == (ships, 20)
    assert learnt_steps(read_student(result.path)[0]) == 5 * ships
    assert result.kept.startswith("stopped after epoch 4 of 8: val has not risen since epoch 2; ")
    assert f"epoch {ships} of 8 ships: {[2, 9, 9, 8][ships - 1] / 12:.3f} on val" in result.kept


def test_a_training_that_was_killed_when_it_had_stopped_trains_no_further(tiny_set, progress, monkeypatch) -> None:
    scripted_val(monkeypatch, [5, 4, 12, 12])
    job = tiny_set.job("job", distill={"val_every": 1, "patience": 1})
    distill_loop(job, here())
    result = distil(job, progress)
    assert (result.kept_epoch, result.steps, len(read_epochs(job.path))) == (2, 10, 2)


@pytest.mark.parametrize(("settings", "key"), [({"keep": "best"}, "keep=best"), ({"patience": 3}, "patience=3")])
def test_what_needs_val_is_refused_without(tiny_set, progress, settings, key) -> None:
    job = tiny_set.job("job", distill=settings)
    samples = replace(job.samples, shards={**job.samples.shards, "val": ()}, num_labelled={"train": 12, "val": 0})
    with pytest.raises(DataError, match=f"distill.{key} needs labelled val images"):
        distil(replace(job, samples=samples), progress)

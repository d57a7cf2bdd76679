"""What val decides during training: averaged or latest weights, and when training stops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel

from raydistill.engine import loop
from raydistill.engine.batches import DistillJob
from raydistill.engine.checkpoints import latest_step
from raydistill.engine.distillation_model import DistillationModel
from raydistill.engine.loop import distill_loop
from raydistill.engine.records import read_epochs
from tests.training import assert_same, here, in_two_processes, interrupt, untimed, weights

Records = list[dict[str, float]]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[DistillationModel]:
    """Those that train."""
    made = list[DistillationModel]()
    monkeypatch.setattr(loop, "DistillationModel", lambda job: made.append(DistillationModel(job)) or made[-1])
    return made


@pytest.mark.parametrize("decay", [0.3, 0.6, 0.9999])
def test_the_average_is_that_of_torch_with_a_decay_that_warms_up(tiny_set, models, decay) -> None:
    """That of TensorFlow's ExponentialMovingAverage with `num_updates`, after the first step, which torch copies."""
    references = list[AveragedModel]()

    def warmed(average: torch.Tensor, now: torch.Tensor, num: torch.Tensor | int) -> torch.Tensor:
        n = int(num) - 1
        return average + (now - average) * (1 - min(decay, (1 + n) / (10 + n)))

    def after(*_: object) -> None:
        if not references:
            references.append(AveragedModel(models[0].student, avg_fn=warmed, use_buffers=True))
        references[0].update_parameters(models[0].student)

    hook = register_optimizer_step_post_hook(after)
    try:
        job = tiny_set.job("job", distill={"ema_decay": decay, "epochs": 2})
        distill_loop(job, here())
    finally:
        hook.remove()
    found = {k.removeprefix("ema."): v for k, v in weights(job).items() if k.startswith("ema.")}
    expected = references[0].module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_a_decay_too_long_for_the_run_does_not_average_its_beginning(tiny_set) -> None:
    """Over ten steps; with the decay alone, 99 % of the average would be the random start."""
    job = tiny_set.job("job", distill={"ema_decay": 0.999, "epochs": 2, "schedule": "constant", "learning_rate": 0.01})
    torch.manual_seed(job.config.seed)
    start = torch.cat([value.detach().flatten() for value in DistillationModel(job).student.parameters()])
    record = distill_loop(job, here())
    state, names = weights(job), [name for name, _ in DistillationModel(job).student.named_parameters()]
    latest, average = (
        torch.cat([state[f"{of}.{name}"].flatten() for name in names]) for of in ("model.student", "ema")
    )
    assert (average - latest).norm() < 0.5 * (start - latest).norm()
    assert {"val_accuracy", "val_accuracy_averaged", "val_accuracy_latest", "is_averaged"} <= record.keys()


def rose_at(records: Records) -> list[int]:
    """For each epoch, the one at which val was last higher than ever before; 0 before val is measured."""
    found, highest, at = [], -1.0, 0
    for record in records:
        if record.get("val_accuracy", -1.0) > highest:
            highest, at = record["val_accuracy"], int(record["epoch"])
        found.append(at)
    return found


def stops_where_it_should(job: DistillJob, patience: int, every: int = 1) -> int:
    """The epoch after which the training of a job stopped, by its records."""
    records = read_epochs(job.path)
    lasting = [
        record["epoch"] - at >= patience and record["epoch"] % every == 0
        for record, at in zip(records, rose_at(records), strict=True)
    ]
    assert lasting == [False] * (len(records) - 1) + [True]
    assert [record["epoch"] for record in records if "not_risen_since" in record] == [len(records)]
    assert records[-1]["not_risen_since"] == rose_at(records)[-1]
    assert latest_step(job.path) == records[-1]["step"] == 5 * len(records)
    return len(records)


STALLS = {"epochs": 30, "learning_rate": 1e-6, "schedule": "constant"}  # soon val rises no more


@pytest.mark.parametrize(
    ("patience", "every", "ema"), [(1, 1, None), (3, 1, None), (3, 2, None), (1, 5, 0.9), (3, 1, 0.9)]
)
def test_training_stops_when_val_has_not_risen_and_not_before(tiny_set, patience, every, ema) -> None:
    job = tiny_set.job("job", distill={**STALLS, "patience": patience, "val_every": every, "ema_decay": ema})
    record = distill_loop(job, here())
    assert record == read_epochs(job.path)[-1]
    assert stops_where_it_should(job, patience, every) < 30
    assert "kept_epoch" in record
    assert distill_loop(job, here()) == record  # there is nothing more to do
    assert_same(job, job)


def test_without_patience_it_trains_to_the_end_and_the_steps_before_are_the_same(tiny_set) -> None:
    patient, other = (tiny_set.job(name, distill={**STALLS, "epochs": 8, "val_every": 1} | more)
                      for name, more in (("patient", {"patience": 2}), ("other", {})))  # fmt: skip
    for job in (patient, other):
        distill_loop(job, here())
    records, longer = read_epochs(patient.path), read_epochs(other.path)
    assert len(records) < len(longer) == 8
    assert not any("not_risen_since" in record for record in longer)
    for one, two in zip(records[:-1], longer, strict=False):
        assert untimed(one) == untimed(two)


@pytest.mark.parametrize("kept", [0, 3600])
def test_it_stops_at_the_same_step_after_a_resume(tiny_set, kept) -> None:
    """Also where the last checkpoint is older than some epochs, whose records are there."""
    settings = {**STALLS, "patience": 3, "val_every": 1, "checkpoint_seconds": kept}
    unbroken, broken = (tiny_set.job(name, distill=settings) for name in ("unbroken", "broken"))
    expected = distill_loop(unbroken, here())
    stopped = stops_where_it_should(unbroken, 3)
    for epoch in (2, stopped - 1):
        interrupt(broken, 5 * epoch + 2)
    assert untimed(distill_loop(broken, here())) == untimed(expected)
    assert_same(unbroken, broken)


def test_two_workers_stop_at_the_same_step_also_after_a_resume(make_set, after_every_step) -> None:
    settings = {**STALLS, "batch_size": 5, "patience": 1, "val_every": 1, **after_every_step}
    unbroken, broken = (make_set(name, num_train=25).job("job", distill=settings) for name in ("unbroken", "broken"))
    in_two_processes(unbroken)
    stopped = stops_where_it_should(unbroken, 1)
    assert stopped < 30
    in_two_processes(broken, kill_at=5 * (stopped - 1) + 2)
    in_two_processes(broken)
    assert_same(unbroken, broken)
    assert [*map(untimed, read_epochs(broken.path))] == [*map(untimed, read_epochs(unbroken.path))]


@pytest.mark.parametrize("class_weights", [None, (5.0, 1.0, 0.2)], ids=["equal", "by class"])
def test_labels_of_two_workers_train_the_student_of_one(make_set, class_weights) -> None:
    """Their shares are three images and two, some without a label, and the student has no batch norm, which would see
    each worker's images by themselves."""
    settings = {"optimizer": "sgd", "momentum": 0, "learning_rate": 0.1, "epochs": 1, "batch_size": 5}
    loss: dict[str, object] = {"alignment_weight": 0, "uniformity_weight": 0, "label_smoothing": 0.2}
    loss["class_weights"] = class_weights and "balanced"
    alone, both = (
        replace(
            make_set(name, num_train=23, labelled=11).job(
                "job", distill=settings, loss=loss, student={"model": "timm:test_vit", "size": 32}
            ),
            class_weights=class_weights,
        )
        for name in ("alone", "both")
    )
    distill_loop(alone, here())
    in_two_processes(both)
    one, two = weights(alone), weights(both)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)
    [first], [second] = read_epochs(alone.path), read_epochs(both.path)
    assert second["task"] == pytest.approx(first["task"], rel=1e-5)

"""The loop in this process, on small real images: it learns, resumes exactly, and stops where it should."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import load, save
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from raydistill.config import Distill, Loss
from raydistill.data.targets import UNLABELLED
from raydistill.engine import loop, reporter
from raydistill.engine.checkpoints import latest_checkpoint, latest_step
from raydistill.engine.distillation_model import BestStudent, DistillationModel
from raydistill.engine.loop import distill_loop, learning_rate
from raydistill.engine.records import read_epochs, read_progress
from raydistill.errors import CheckpointError, DivergedError
from tests.training import assert_same, here, in_two_processes, interrupt, untimed, weights

ALONE = {name: 0 for name in Loss.model_fields if name.endswith("_weight")}
CRD = {"crd_weight": 1.0, "crd_memory": 24, "crd_negatives": 16}


def test_it_learns(tiny_set) -> None:
    job = tiny_set.job("learns", distill={"epochs": 30, "val_every": 1})
    record = distill_loop(job, here())
    assert record["loss"] < read_epochs(job.path)[0]["loss"] - 1
    assert record["val_accuracy"] > 0.8
    assert record["step"] == 30 * 5


@pytest.mark.parametrize(
    ("distill", "loss", "last", "announced", "resumes_at"),
    [
        *(({"optimizer": optimizer, "ema_decay": ema, "warmup_epochs": 1}, {}, 12, None, 10)
          for optimizer in ("adamw", "sgd") for ema in (None, 0.9)),
        ({}, {}, 8, 7, 7),  # a preemption saves at once and loses no step
        ({"checkpoint_seconds": 3600}, {}, 12, None, 0),  # short epochs do not all end in a checkpoint
        ({}, {"kd_weight": [1.0, 0.0], "task_weight": [0.0, 1.0]}, 12, None, 10),
        # The memory of CRD too, in the middle of a ring as at its end.
        ({}, CRD, 9, 8, 8),
        ({}, CRD, 13, 12, 12),
    ],
)  # fmt: skip
def test_resumed_equals_unbroken(tiny_set, distill, loss, last, announced, resumes_at) -> None:
    unbroken, broken = (tiny_set.job(name, distill=distill, loss=loss) for name in ("unbroken", "broken"))
    expected = distill_loop(unbroken, here())
    interrupt(broken, last, announced)
    assert latest_step(broken.path) == resumes_at
    record = distill_loop(broken, here())
    assert latest_step(broken.path) == broken.total_steps
    assert_same(unbroken, broken)
    assert untimed(record) == untimed(expected)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_first_steps_that_are_not_finite_leave_no_trace(tiny_set, monkeypatch, optimizer) -> None:
    """Of fp16, whose scale is halved until gradients do not overflow."""
    scaler, empty_like = torch.amp.GradScaler, torch.empty_like
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *words, **more: scaler(*words, init_scale=2.0**26, **more))
    monkeypatch.setattr(torch, "empty_like", lambda *words, **more: empty_like(*words, **more).fill_(1e9))
    job = tiny_set.job("job", distill={"optimizer": optimizer, "precision": "fp16", "epochs": 4})
    distill_loop(job, here())
    assert all(bool((value.float().abs() < 100).all()) for value in latest_checkpoint(job.path)[0].values())


def test_a_checkpoint_of_an_optimizer_that_was_not_fused_goes_on(tiny_set, monkeypatch) -> None:
    job = tiny_set.job("job", distill={"precision": "fp16"})
    interrupt(job, 12)
    weights, state, meta = latest_checkpoint(job.path)
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    monkeypatch.setattr(loop, "latest_checkpoint", lambda path: (weights, state, meta))
    assert distill_loop(job, here())["step"] == job.total_steps


@pytest.mark.parametrize("what", ["names", "shapes", "optimizer"])
def test_a_checkpoint_whose_state_does_not_fit_names_both_versions(tiny_set, monkeypatch, what) -> None:
    job = tiny_set.job("job")
    interrupt(job, 12)
    weights, state, meta = latest_checkpoint(job.path)
    if what == "optimizer":
        state["optimizer"]["param_groups"] = state["optimizer"]["param_groups"][1:]
    else:
        name = next(name for name in weights if name.endswith("conv1.weight"))
        value = weights.pop(name)
        weights[name.replace("conv1", "first") if what == "names" else name] = value[:1]
    monkeypatch.setattr(loop, "latest_checkpoint", lambda path: (weights, state, {**meta, "torch": "9.0.0"}))
    with pytest.raises(CheckpointError) as refused:
        distill_loop(job, here())
    (message,) = refused.value.args
    assert "/checkpoints: torch 9.0.0, " in message
    assert " wrote the checkpoint of step 10, and it does not load with torch " in message
    assert torch.__version__.partition("+")[0] in message
    assert "\n" not in message


def test_epochs_after_the_last_checkpoint_count_as_lost(tiny_set, monkeypatch) -> None:
    monkeypatch.setattr(reporter, "seconds_between_looks", lambda path: 3600)  # at the end of epochs alone
    job = tiny_set.job("broken", distill={"checkpoint_seconds": 3600})
    interrupt(job, 12)
    distill_loop(job, here())
    assert read_progress(job.path) == (job.total_steps, 10)


def test_finished_loop_gives_its_record_again(tiny_set) -> None:
    job = tiny_set.job("finished")
    assert distill_loop(job, here()) == distill_loop(job, here())


@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt"])
def test_damaged_checkpoint_is_passed_over(tiny_set, file) -> None:
    """As after a loss of power: of the right length, with zeros where data should be."""
    unbroken, broken = tiny_set.job("unbroken"), tiny_set.job("broken")
    distill_loop(unbroken, here())
    interrupt(broken, 12)
    newest = sorted(Path(broken.path, "checkpoints").glob("step-*"))[-1] / file
    newest.write_bytes(newest.read_bytes()[:-500] + bytes(500))
    distill_loop(broken, here())
    assert_same(unbroken, broken)


def test_memory_stream_and_device_train_the_same_student_resumed_or_not(tiny_set) -> None:
    names = ("memory", "stream", "device", "device, resumed")
    memory, *others = (tiny_set.job(name, distill={"cache": name.partition(",")[0]}) for name in names)
    interrupt(others[-1], 12)
    for job in (memory, *others):
        distill_loop(job, here())
    for job in others:
        assert_same(memory, job)


def test_two_workers_resume_within_an_epoch_and_count_the_images_and_terms_of_both(make_set, after_every_step) -> None:
    """Their shares of a batch are three images and two."""
    settings = {"batch_size": 5, "epochs": 2, "keep": "best", "val_every": 1, **after_every_step}
    unbroken, broken = (make_set(name, num_train=23).job("job", distill=settings) for name in ("unbroken", "broken"))
    in_two_processes(unbroken)
    in_two_processes(broken, kill_at=8)
    assert latest_step(broken.path) == 7
    assert latest_checkpoint(broken.path)[2]["sums"]["images"] == 2 * 5
    in_two_processes(broken)
    assert_same(unbroken, broken)
    assert [*map(untimed, read_epochs(broken.path))] == [*map(untimed, read_epochs(unbroken.path))]
    assert [record["images"] for record in read_epochs(broken.path)] == [25, 25]


def test_a_non_finite_loss_stops_with_the_step_and_keeps_the_last_good_checkpoint(tiny_set) -> None:
    job = tiny_set.job("diverges", distill={"learning_rate": 1e-3})
    interrupt(job, 6)
    good = weights(job)
    for shard in Path(job.targets).iterdir():
        stored = load(shard.read_bytes())
        shard.write_bytes(save(stored | {"features": np.full_like(stored["features"], np.inf)}))
    with pytest.raises(DivergedError, match=r"step 5 .*epoch 1"):
        distill_loop(job, here())
    for name, value in weights(job).items():
        assert torch.equal(value, good[name])
        assert torch.isfinite(value.float()).all()


class Waits(TorchDispatchMode):
    """Operations whose result the host has to know, which on a GPU wait for all work before. Optimizers that are not
    fused count steps in tensors of the host: these are left out."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.counts = self.in_optimizer = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name.startswith("index") and name != "index_select" else []
        masks = [i for i in indices if i is not None and i.dtype == torch.bool]
        if self.counts and not self.in_optimizer and (masks or name.startswith(self.NAMES)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [*({"loss": ALONE | {weight: 1.0}} for weight in ALONE),
     {"loss": CRD, "distill": {"clip_norm": 1.0, "ema_decay": 0.9, "optimizer": "sgd", "warmup_epochs": 0.5}},
     {"views": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}, "distill": {"precision": "bf16"}},
     {"loss": {"class_weights": "balanced", "label_smoothing": 0.1}, "distill": {"layer_decay": 0.7}},
     {"distill": {"cache": "device"}}],
    ids=str,
)  # fmt: skip
def test_no_step_waits_for_the_device(make_set, settings) -> None:
    """Ten steps, between which no epoch ends and nothing is read."""
    distill = {"epochs": 1, "batch_size": 4} | settings.get("distill", {})
    job, waits = make_set("set", num_train=100, labelled=50).job("job", **(settings | {"distill": distill})), Waits()
    if job.config.loss.class_weights:
        job = replace(job, class_weights=(1.0, 2.0, 3.0))

    def after(step: int) -> bool:
        waits.counts = 10 <= step < 20
        return False

    def optimizing(now: bool):
        return lambda *_: setattr(waits, "in_optimizer", now)

    hooks = [register_optimizer_step_pre_hook(optimizing(True)), register_optimizer_step_post_hook(optimizing(False))]
    try:
        with waits:
            distill_loop(job, replace(here(), preempted=after))
    finally:
        for hook in hooks:
            hook.remove()
    assert waits.found == []


def test_the_first_of_many_bad_steps_is_named_and_none_is_saved(make_set) -> None:
    """All are looked at together, long after."""
    job = make_set("set", num_train=120).job("job", distill={"batch_size": 2, "epochs": 1, "checkpoint_seconds": 1e-9})

    def after(step: int) -> bool:
        if step == 7:  # the next step's gradient is not finite
            spoilt["loss"] = torch.nan
        return step > 7  # as if a node were about to be lost: a checkpoint is due after each

    spoilt, backward = {"loss": 0.0}, torch.Tensor.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", lambda self: backward(self + spoilt["loss"] * self))
        with pytest.raises(DivergedError, match=r"step 7 \(epoch 0\)"):
            distill_loop(job, replace(here(), preempted=after))
    assert latest_step(job.path) <= 7
    assert all(torch.isfinite(value.float()).all() for value in weights(job).values())


def test_soft_targets_of_other_samples_are_refused(tiny_set) -> None:
    job = tiny_set.job("swapped")
    first, second = sorted(Path(job.targets).iterdir())[:2]
    shutil.copy(second, first)
    with pytest.raises(CheckpointError, match="other samples"):
        distill_loop(job, here())


def test_seed_decides_the_student(tiny_set) -> None:
    one, again, other = tiny_set.job("one"), tiny_set.job("again"), tiny_set.job("other")
    other = replace(other, config=other.config.model_copy(update={"seed": 1}))
    for job in (one, again, other):
        distill_loop(job, here())
    assert_same(one, again)
    changed = [name for name, value in weights(one).items() if not torch.equal(value, weights(other)[name])]
    assert changed


def test_learning_rate_closed_form() -> None:
    settings = Distill(epochs=10, learning_rate=2.0, warmup_epochs=2, schedule="cosine")
    rates = [learning_rate(settings, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([2.0 * (k + 1) / 10 for k in range(10)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * k / 40) for k in range(40)])
    constant = Distill(epochs=10, learning_rate=2.0, schedule="constant")
    assert {learning_rate(constant, step, 5) for step in range(50)} == {2.0}


@pytest.mark.parametrize("kept", ["best", "last"])
def test_a_long_epoch_resumes_at_its_last_checkpoint_and_ends_as_an_unbroken_one(
    tiny_set, kept, after_every_step
) -> None:
    """However often, and with all that an epoch adds up: terms, images, and the seconds of the steps that count."""
    settings = {"epochs": 2, "batch_size": 4, "keep": kept, "ema_decay": 0.9, **after_every_step}
    unbroken, broken = (tiny_set.job(name, distill=settings, loss=CRD) for name in ("unbroken", "broken"))
    distill_loop(unbroken, here())
    seconds = [0.0]
    for step in (6, 9, 16):
        interrupt(broken, step)
        sums = latest_checkpoint(broken.path)[2]["sums"]
        assert latest_step(broken.path) == step - 1
        assert sums["images"] == (step - 1) % 10 * 4
        seconds.append(sums["seconds"])
    assert 0 < seconds[1] < seconds[2]
    distill_loop(broken, here())
    assert_same(unbroken, broken)
    assert [*map(untimed, read_epochs(broken.path))] == [*map(untimed, read_epochs(unbroken.path))]


def test_checkpoints_take_no_more_than_a_quarter_of_the_time(tiny_set) -> None:
    """However often they are asked for: one that takes a second comes no sooner than four seconds after the last."""
    job = tiny_set.job("job", distill={"checkpoint_seconds": 1e-9})
    report = reporter.Reporter(job, here(), 0, {})
    assert report.checkpoint_due(1, False, 0.0)
    assert not report.checkpoint_due(2, False, 3600.0)
    assert report.checkpoint_due(job.total_steps, True, 3600.0)


def test_an_epoch_no_better_than_the_last_ships_seldom() -> None:
    """In a simulated training that learns nothing more, where the best of many epochs is always above the last."""
    rng = np.random.default_rng(0)
    shipped = 0
    for _ in range(400):
        image, epochs = rng.normal(size=(200, 1)), rng.normal(size=(200, 12))
        right = torch.from_numpy(image + epochs > 0)
        kept = BestStudent(torch.nn.Identity(), 200)
        for epoch in range(12):
            kept.offer(torch.nn.Identity(), epoch + 1, right[:, epoch])
        shipped += kept.is_better_than(right[:, -1], 12)
    assert 0 < shipped <= 0.05 * 400 + 3 * (0.05 * 0.95 * 400) ** 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("weight", ALONE)
def test_every_term_trains_by_itself(tiny_set, weight, precision) -> None:
    job = tiny_set.job(
        weight, loss=ALONE | {weight: 1.0}, distill={"epochs": 1, "batch_size": 20, "precision": precision}
    )
    term = weight.removesuffix("_weight")
    torch.manual_seed(job.config.seed)
    start = DistillationModel(job).state_dict()
    record = distill_loop(job, here())
    assert record["step"] == job.total_steps > 1
    assert math.isfinite(record[term])
    assert record["loss"] == pytest.approx(record[term], rel=1e-5)
    after = {name.removeprefix("model."): value for name, value in weights(job).items() if name.startswith("model.")}
    assert all(torch.isfinite(value.float()).all() for value in after.values())
    moved = [name for name in after if "conv" in name and not torch.equal(after[name], start[name])]
    assert len(moved) == len([name for name in after if "conv" in name]) > 3


@pytest.mark.parametrize("term", ["task", "kd", "alignment", "crd", "feature"])
def test_a_weight_that_changes_is_at_first_what_a_constant_one_is(tiny_set, term) -> None:
    """An epoch of one step: it is taken with the first weight."""
    settings = {"epochs": 1, "batch_size": 40}
    constant, falling = (
        tiny_set.job(name, loss=CRD | {f"{term}_weight": weight}, distill=settings)
        for name, weight in (("constant", 1.0), ("falling", [1.0, 0.0]))
    )
    one, two = distill_loop(constant, here()), distill_loop(falling, here())
    assert one["step"] == two["step"] == 1
    assert one["loss"] == two["loss"]
    assert_same(constant, falling)


def test_a_weight_goes_from_the_first_to_the_last_over_all_steps(tiny_set) -> None:
    job = tiny_set.job("changes", loss=ALONE | {"kd_weight": [0.0, 3.0]}, distill={"epochs": 3, "batch_size": 40})
    distill_loop(job, here())
    assert [r["loss"] / r["kd"] for r in read_epochs(job.path)] == pytest.approx([0, 1, 2], abs=1e-6)


def test_crd_trains_on_labelled_and_unlabelled_images(tiny_set) -> None:
    job = tiny_set.job("crd", loss=ALONE | CRD, distill={"epochs": 30})
    record = distill_loop(job, here())
    second = read_epochs(job.path)[1]  # by then the memory is full
    assert record["crd"] < second["crd"] - 1
    state = weights(job)
    assert state["memory.put_in"] == job.total_steps * 8
    images, labels = state["memory.image_M"], state["memory.label_M"]
    assert set(labels.tolist()) == {UNLABELLED, 0, 1, 2}
    split = job.train_split
    shown = np.concatenate([split.shard(k).labels_R for k in range(len(split.shard_rows))])
    assert labels.tolist() == shown[images].tolist()  # each with its own
    torch.testing.assert_close(state["memory.teacher_MP"].norm(dim=1), torch.ones(24))
    assert torch.isfinite(state["memory.log_mean"]).all()


def test_crd_remembers_no_image_that_takes_no_part(tiny_set) -> None:
    job = tiny_set.job("crd", loss=ALONE | CRD, distill={"labelled_share": 1.0, "epochs": 1})
    distill_loop(job, here())
    assert UNLABELLED not in weights(job)["memory.label_M"]


@pytest.fixture
def pretrained(tmp_path) -> dict[str, object]:
    """A student that starts from given weights."""
    torch.manual_seed(5)
    network = timm.create_model("test_resnet", num_classes=7)
    save_file(network.state_dict(), tmp_path / "start.safetensors")
    return {"model": "timm:test_resnet", "init": "pretrained", "weights": str(tmp_path / "start.safetensors")}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_body_rate_of_zero_keeps_all_but_the_classifier_through_a_resume(
    tiny_set, pretrained, optimizer, ema
) -> None:
    settings = {"body_rate": 0, "optimizer": optimizer, "weight_decay": 0.3, "ema_decay": ema}
    unbroken, broken = (
        tiny_set.job(name, student=pretrained, distill=settings, loss=CRD) for name in ("unbroken", "broken")
    )
    distill_loop(unbroken, here())
    interrupt(broken, 12)
    distill_loop(broken, here())
    assert_same(unbroken, broken)
    start = load_file(pretrained["weights"])
    for prefix in ("model.student.body.network.", *(["ema.body.network."] if ema else [])):
        found = {n.removeprefix(prefix): value for n, value in weights(broken).items() if n.startswith(prefix)}
        assert found.keys() == start.keys()
        for name, value in start.items():
            if not name.startswith("fc."):
                assert torch.equal(found[name], value), name
    torch.manual_seed(broken.config.seed)
    for name, value in DistillationModel(broken).named_parameters():
        assert torch.equal(weights(broken)[f"model.{name}"], value) is not value.requires_grad, name


def test_a_body_rate_scales_the_steps_of_the_body_alone(tiny_set, pretrained) -> None:
    """Plain gradient descent, one step."""
    settings = {"optimizer": "sgd", "momentum": 0, "weight_decay": 0, "schedule": "constant", "epochs": 1}
    settings |= {"batch_size": 40, "learning_rate": 0.5}
    jobs = {
        rate: tiny_set.job(f"rate {rate}", student=pretrained, distill=settings | {"body_rate": rate})
        for rate in (1.0, 0.1)
    }
    torch.manual_seed(0)
    start = {f"model.{name}": value for name, value in DistillationModel(jobs[1.0]).state_dict().items()}
    for job in jobs.values():
        assert distill_loop(job, here())["step"] == 1
    whole, tenth = (weights(job) for job in jobs.values())
    body, others = [], []
    for name, value in start.items():
        if not value.is_floating_point() or "running" in name:
            assert torch.equal(whole[name], tenth[name])  # batch norm saw the same images
            continue
        is_body = name.startswith("model.student.body.network.") and ".fc." not in name
        (body if is_body else others).append(name)
        expected = (whole[name] - value) * (0.1 if is_body else 1.0)
        torch.testing.assert_close(tenth[name] - value, expected, rtol=1e-3, atol=3e-7, msg=name)
    moved = [name for name in body if not torch.equal(whole[name], start[name])]
    assert len(moved) > len(body) / 2
    assert len(others) == 2 + 2 * 4


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_the_recorded_rate_is_the_classifiers(tiny_set, pretrained, rate) -> None:
    settings = {"schedule": "constant", "learning_rate": 0.01, "body_rate": rate, "epochs": 1}
    assert distill_loop(tiny_set.job("rate", student=pretrained, distill=settings), here())["learning_rate"] == 0.01

"""The loop in this process, on small real images: it learns, resumes exactly, and stops where it should."""

from __future__ import annotations

import contextlib
import itertools
import json
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

from raydistill.cluster.plan import plan_resources
from raydistill.config import Distill, Loss
from raydistill.data.targets import UNLABELLED
from raydistill.engine import batches, loop
from raydistill.engine.batches import DistillJob, read_batches
from raydistill.engine.checkpoints import latest_checkpoint, latest_step, read_progress
from raydistill.engine.loop import Trainee, distill_loop, learning_rate
from raydistill.engine.workers import Worker
from raydistill.errors import CheckpointError, DataError, DivergedError
from raydistill.models.student import read_student, split_logits
from raydistill.stages.distill import distill_student
from raydistill.storage.directory import StageDirectory


def here(preempted=lambda step: False) -> Worker:
    return Worker(0, 1, "cpu", 1, preempted)


def weights(job: DistillJob) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(job.path)
    assert checkpoint is not None
    return checkpoint[0]


def assert_same(first: DistillJob, second: DistillJob) -> None:
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def killed_at(step: int):
    """What the machine's end looks like to the loop: nothing after this step happens."""

    def preempted(at: int) -> bool:
        if at == step:
            raise KeyboardInterrupt
        return False

    return here(preempted)


def epochs_of(job: DistillJob) -> list[dict[str, float]]:
    return [json.loads(path.read_text()) for path in sorted(Path(job.path, "epochs").iterdir())]


def untimed(records: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k != "images_per_second"} for record in records]


def test_it_learns(tiny_set) -> None:
    job = tiny_set.job("learns", distill={"epochs": 30, "val_every": 1})
    record = distill_loop(job, here())
    first = json.loads(Path(job.path, "epochs", "00001.json").read_text())
    assert record["loss"] < first["loss"] - 1
    assert record["val_accuracy"] > 0.8
    assert record["step"] == 30 * 5


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resumed_equals_unbroken(tiny_set, optimizer, ema) -> None:
    settings = {"optimizer": optimizer, "ema_decay": ema, "warmup_epochs": 1}
    unbroken, broken = (tiny_set.job(name, distill=settings) for name in ("unbroken", "broken"))
    expected = distill_loop(unbroken, here())
    with pytest.raises(KeyboardInterrupt):
        distill_loop(broken, killed_at(12))
    assert latest_step(broken.path) == 10  # the end of the second epoch
    record = distill_loop(broken, here())
    assert_same(unbroken, broken)
    assert {k: v for k, v in record.items() if k != "images_per_second"} == {
        k: v for k, v in expected.items() if k != "images_per_second"
    }


@pytest.mark.parametrize("what", ["names", "shapes", "optimizer"])
def test_a_checkpoint_whose_state_does_not_fit_names_both_versions(tiny_set, monkeypatch, what) -> None:
    job = tiny_set.job("job")
    with pytest.raises(KeyboardInterrupt):
        distill_loop(job, killed_at(12))
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
    assert "that of step 10 was written by torch 9.0.0, " in message
    assert "and this is torch " + torch.__version__.partition("+")[0] in message
    assert "\n" not in message


def test_a_preemption_saves_at_once_and_loses_no_step(tiny_set) -> None:
    unbroken, preempted = tiny_set.job("unbroken"), tiny_set.job("preempted")
    expected = distill_loop(unbroken, here())

    def notice(step: int) -> bool:
        if step == 8:
            raise KeyboardInterrupt
        return step == 7

    with pytest.raises(KeyboardInterrupt):
        distill_loop(preempted, here(notice))
    assert latest_step(preempted.path) == 7
    record = distill_loop(preempted, here())
    assert_same(unbroken, preempted)
    assert record["loss"] == expected["loss"]  # the epoch's mean covers the steps before the notice too


def test_short_epochs_do_not_all_end_in_a_checkpoint(tiny_set) -> None:
    """And what is gone on with from an older one is the same."""
    unbroken, broken = tiny_set.job("unbroken"), tiny_set.job("broken", distill={"checkpoint_seconds": 3600})
    expected = distill_loop(unbroken, here())
    with pytest.raises(KeyboardInterrupt):
        distill_loop(broken, killed_at(12))
    assert latest_step(broken.path) == 0
    record = distill_loop(broken, here())
    assert latest_step(broken.path) == broken.total_steps
    assert_same(unbroken, broken)
    assert record["loss"] == expected["loss"]


def test_steps_that_are_taken_again_are_counted_over_all_losses(tiny_set, progress, monkeypatch) -> None:
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_REPORTS", -1)  # after every step
    job = tiny_set.job("broken")
    for ends_at in (14, 18):  # the steps after 13 and 17 are never reported; checkpoints are at 10 and 15
        with pytest.raises(KeyboardInterrupt):
            distill_loop(job, killed_at(ends_at))
    plan = plan_resources(job.config, 2, 0, 1)
    distill_student(job, StageDirectory(job.path, "distill", "{}"), plan, progress, lambda record: None)
    assert read_progress(job.path) == (job.total_steps, (13 - 10) + (17 - 15))
    assert progress.images_again == 5 * job.batch_size
    assert 0 < progress.seconds_again < 60


def test_epochs_after_the_last_checkpoint_count_as_lost(tiny_set, monkeypatch) -> None:
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_REPORTS", 3600)  # at the end of epochs alone
    job = tiny_set.job("broken", distill={"checkpoint_seconds": 3600})
    with pytest.raises(KeyboardInterrupt):
        distill_loop(job, killed_at(12))
    distill_loop(job, here())
    assert read_progress(job.path) == (job.total_steps, 10)


def test_finished_loop_gives_its_record_again(tiny_set) -> None:
    job = tiny_set.job("finished")
    assert distill_loop(job, here()) == distill_loop(job, here())


@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt"])
@pytest.mark.parametrize("left", [0, 1000, "zeros"])
def test_damaged_checkpoint_is_passed_over(tiny_set, file, left) -> None:
    """Cut off, or, as after a loss of power, of the right length with zeros where data should be."""
    unbroken, broken = tiny_set.job("unbroken"), tiny_set.job("broken")
    distill_loop(unbroken, here())
    with pytest.raises(KeyboardInterrupt):
        distill_loop(broken, killed_at(12))
    newest = sorted(Path(broken.path, "checkpoints").glob("step-*"))[-1] / file
    data = newest.read_bytes()
    newest.write_bytes(data[:-500] + bytes(500) if left == "zeros" else data[:left])
    distill_loop(broken, here())
    assert_same(unbroken, broken)


def test_checkpoint_whose_json_was_never_written_does_not_count(tiny_set) -> None:
    job = tiny_set.job("broken")
    with pytest.raises(KeyboardInterrupt):
        distill_loop(job, killed_at(12))
    sorted(Path(job.path, "checkpoints").glob("step-*"))[-1].joinpath("checkpoint.json").unlink()
    assert latest_step(job.path) == 5


def test_memory_and_stream_train_the_same_student(tiny_set) -> None:
    jobs = [tiny_set.job(cache, distill={"cache": cache}) for cache in ("memory", "stream")]
    for job in jobs:
        distill_loop(job, here())
    assert_same(*jobs)


def test_the_workers_of_a_node_share_its_memory(tiny_set, monkeypatch) -> None:
    """Each would hold the whole split: where one may, two may not."""
    job = tiny_set.job("cached", distill={"cache": "auto"})
    split = sum(tiny_set.samples.shards["train"]) * 3 * tiny_set.samples.size**2
    monkeypatch.setattr(batches, "available_bytes", lambda: 4 * split * 1.9)
    chosen: list[str] = []
    for name in ("InMemory", "Streamed"):
        reader = getattr(batches, name)
        monkeypatch.setattr(batches, name, lambda *given, n=name, r=reader: chosen.append(n) or r(*given))
    job = replace(job, targets=None)
    for beside in (1, 2):
        next(read_batches(job, 0, Worker(0, 1, "cpu", 1, lambda step: False, beside=beside)))
    assert chosen == ["InMemory", "Streamed"]


def test_workers_together_see_the_global_batch(tiny_set) -> None:
    job = tiny_set.job("batches")

    def first_batches(rank: int, size: int):
        batches = read_batches(job, 0, Worker(rank, size, "cpu", 1, lambda step: False))
        return [next(batches) for _ in range(6)]

    alone, split = first_batches(0, 1), [first_batches(rank, 3) for rank in range(3)]
    for step, whole in enumerate(alone):
        together = np.concatenate([split[rank][step].parameters_VP for rank in range(3)])
        assert sorted(map(tuple, together)) == sorted(map(tuple, whole.parameters_VP))
        assert [len(split[rank][step].labels_V) for rank in range(3)] == [3, 3, 2]


def in_two_processes(job: DistillJob, kill_at: int | None = None) -> None:
    """The loop as Ray Train runs it: two workers that average their gradients. The machine may end after a step."""
    torch.multiprocessing.spawn(_as_rank, (job, kill_at, f"{job.path}/rendezvous-{kill_at}"), 2)


def _as_rank(rank: int, job: DistillJob, kill_at: int | None, rendezvous: str) -> None:
    loop._LEAST_GAP = 0.0  # here too each step may end in a checkpoint
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    worker = Worker(rank, 2, "cpu", 1, killed_at(kill_at).preempted if kill_at else lambda step: False)
    with contextlib.suppress(KeyboardInterrupt):
        distill_loop(job, worker)
    torch.distributed.destroy_process_group()


@pytest.fixture
def after_every_step(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Settings with which each step ends in a checkpoint, although writing then takes most of the time."""
    monkeypatch.setattr(loop, "_LEAST_GAP", 0.0)
    return {"checkpoint_seconds": 1e-9}


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
    assert untimed(epochs_of(broken)) == untimed(epochs_of(unbroken))
    assert [record["images"] for record in epochs_of(broken)] == [25, 25]


def test_unlabelled_images_take_part_through_soft_targets_alone(make_set) -> None:
    """A third of what is drawn is labelled at least, and with more labels than that, what they are of the split."""
    for name, labelled, expected in (("few", 4, 13), ("many", 30, 30)):
        batches = read_batches(make_set(name, num_train=40, labelled=labelled).job("labels"), 0, here())
        seen = np.concatenate([next(batches).labels_V for _ in range(5)])
        assert (seen != UNLABELLED).sum() == expected
        assert (seen == UNLABELLED).sum() == 40 - expected


def test_labelled_share_is_kept(tiny_set) -> None:
    batches = read_batches(tiny_set.job("share", distill={"labelled_share": 0.5}), 0, here())
    for _ in range(10):
        assert (next(batches).labels_V != UNLABELLED).sum() == 4


def test_without_a_teacher_only_labelled_images_are_drawn_in_as_many_steps(tiny_set) -> None:
    scratch, distilled = tiny_set.job("scratch", teacher=False), tiny_set.job("distilled")
    assert scratch.total_steps == distilled.total_steps
    batch = next(read_batches(scratch, 0, here()))
    assert len(batch.labels_V) == 8
    assert (batch.labels_V != UNLABELLED).all()
    assert batch.features_VD is None
    assert "task" in distill_loop(scratch, here())


def test_few_labels_shrink_no_batch_of_an_arm_without_a_teacher(make_set) -> None:
    """It would take smaller and more steps than the others; with this an image comes twice, as two views."""
    few = make_set("few", num_train=40, labelled=5)
    settings = {"distill": {"epochs": 1, "batch_size": 20}}
    alone = few.job("alone", teacher=False, views={"per_image": "fresh"}, **settings)
    taught = few.job("taught", **settings)
    assert (alone.batch_size, alone.total_steps) == (taught.batch_size, taught.total_steps) == (20, 2)
    batch = next(read_batches(alone, 0, here()))
    assert (batch.labels_V != UNLABELLED).all()
    seen = {(row, *parameters) for row, parameters in zip(batch.rows_V, map(tuple, batch.parameters_VP), strict=True)}
    assert len(seen) == 20


@pytest.mark.parametrize(("num_train", "batch_size", "expected"), [(33, 32, 2), (5, 32, 1), (40, 16, 3), (3, 2, 2)])
def test_every_epoch_shows_every_image_in_full_batches(make_set, num_train, batch_size, expected) -> None:
    job = make_set(f"n{num_train}", num_train=num_train).job("job", distill={"epochs": 2, "batch_size": batch_size})
    assert job.steps_per_epoch == expected
    assert job.batch_size == min(batch_size, num_train)
    record = distill_loop(job, here())
    assert (record["step"], record["images"]) == (2 * expected, expected * job.batch_size)
    epoch = list(itertools.islice(read_batches(job, 0, here()), expected))
    assert set(np.concatenate([batch.rows_V for batch in epoch])) == set(range(num_train))


def test_a_non_finite_loss_stops_with_the_step_and_keeps_the_last_good_checkpoint(tiny_set) -> None:
    job = tiny_set.job("diverges", distill={"learning_rate": 1e-3})
    with pytest.raises(KeyboardInterrupt):
        distill_loop(job, killed_at(6))
    good = weights(job)
    for shard in Path(job.targets).iterdir():
        stored = load(shard.read_bytes())
        shard.write_bytes(save(stored | {"features": np.full_like(stored["features"], np.inf)}))
    with pytest.raises(DivergedError, match=r"step 5 .*epoch 1"):
        distill_loop(job, here())
    for name, value in weights(job).items():
        assert torch.equal(value, good[name])
        assert torch.isfinite(value.float()).all()


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


def test_loaded_weights_are_the_ones_that_ship(tiny_set, progress) -> None:
    job = tiny_set.job("ships", distill={"ema_decay": 0.8})
    records = []
    plan = plan_resources(job.config, 2, 0, 1)
    result = distill_student(job, StageDirectory(job.path, "distill", "{}"), plan, progress, records.append)
    assert [r["epoch"] for r in records] == [1, 2, 3, 4]
    student, classes = read_student(result.path)
    assert classes == job.samples.classes
    logits, labels = split_logits(student, tiny_set.samples, "val", torch.device("cpu"), 5)
    assert (logits.argmax(1) == labels).mean() == result.val_accuracy
    assert load_file(Path(result.path) / "student.safetensors").keys() == student.network.state_dict().keys()
    assert not Path(result.path, "checkpoints").exists()


# Within an epoch


@pytest.mark.parametrize("kept", ["best", "last"])
def test_a_long_epoch_is_gone_on_with_at_its_last_checkpoint_and_ends_as_an_unbroken_one(
    tiny_set, kept, after_every_step
) -> None:
    """However often, and with all that an epoch adds up: terms, images, and the seconds of the steps that count."""
    settings = {"epochs": 2, "batch_size": 4, "keep": kept, "ema_decay": 0.9, **after_every_step}
    unbroken, broken = (tiny_set.job(name, distill=settings, loss=CRD) for name in ("unbroken", "broken"))
    distill_loop(unbroken, here())
    seconds = [0.0]
    for step in (6, 9, 16):
        with pytest.raises(KeyboardInterrupt):
            distill_loop(broken, killed_at(step))
        sums = latest_checkpoint(broken.path)[2]["sums"]
        assert latest_step(broken.path) == step - 1
        assert sums["images"] == (step - 1) % 10 * 4
        seconds.append(sums["seconds"])
    assert 0 < seconds[1] < seconds[2]
    distill_loop(broken, here())
    assert_same(unbroken, broken)
    assert untimed(epochs_of(broken)) == untimed(epochs_of(unbroken))


def test_checkpoints_take_no_more_than_a_quarter_of_the_time(tiny_set) -> None:
    """However often they are asked for: one that takes a second comes no sooner than four seconds after the last."""
    job = tiny_set.job("job", distill={"checkpoint_seconds": 1e-9})
    reporter = loop._Reporter(job, here(), 0, {})
    assert reporter.checkpoint_due(1, False, 0.0)
    assert not reporter.checkpoint_due(2, False, 3600.0)
    assert reporter.checkpoint_due(job.total_steps, True, 3600.0)


# Which epoch ships


def scripted_val(monkeypatch: pytest.MonkeyPatch, right_of_12: list[int]) -> None:
    """The val images that are right, epoch by epoch, of what is else a real training; a resumed one is told the same
    again."""

    def logits(student, samples, split, device, size):
        epoch = round(learnt_steps(student) / 5)
        labels = np.zeros(12, int)
        right = np.arange(12) < right_of_12[epoch - 1]
        return np.stack([right, ~right], axis=1).astype(np.float32), labels

    monkeypatch.setattr(loop, "split_logits", logits)


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
        with pytest.raises(KeyboardInterrupt):
            distill_loop(job, killed_at(killed))
    plan = plan_resources(job.config, 2, 0, 1)
    result = distill_student(job, StageDirectory(job.path, "distill", "{}"), plan, progress, lambda record: None)
    student, _ = read_student(result.path)
    assert learnt_steps(student) == 5 * ships
    accuracy = right[ships - 1] / 12
    assert (result.kept_epoch, result.val_accuracy) == (ships, pytest.approx(accuracy))
    assert f"epoch {ships} of 4 ships: {accuracy:.3f} on val" in result.kept
    assert json.loads(Path(result.path, "student.json").read_text())["training"]["kept_epoch"] == ships
    if right[ships - 1] < max(right):
        why = "distill.keep=last" if keep == "last" else "12 val images do not tell that it is better"
        assert f"although epoch 2 had {right[1] / 12:.3f}" in result.kept
        assert why in result.kept
    whole = tiny_set.job("whole", distill={**settings, "keep": "last"})
    stop_after = killed_at(5 * ships + 1) if ships < 4 else here()
    with contextlib.suppress(KeyboardInterrupt):
        distill_loop(whole, stop_after)
    prefix = "ema.body.network." if ema else "model.student.body.network."
    expected = {k.removeprefix(prefix): v for k, v in weights(whole).items() if k.startswith(prefix)}
    for name, value in student.network.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_an_epoch_no_better_than_the_last_ships_seldom() -> None:
    """In a simulated training that learns nothing more, where the best of many epochs is always above the last."""
    rng = np.random.default_rng(0)
    shipped = 0
    for _ in range(400):
        image, epochs = rng.normal(size=(200, 1)), rng.normal(size=(200, 12))
        right = torch.from_numpy(image + epochs > 0)
        kept = loop.Kept(torch.nn.Identity(), 200)
        for epoch in range(12):
            kept.offer(torch.nn.Identity(), epoch + 1, right[:, epoch])
        shipped += kept.told_from(right[:, -1], 12)
    assert 0 < shipped <= 0.05 * 400 + 3 * (0.05 * 0.95 * 400) ** 0.5


def test_epochs_that_were_lost_are_not_taken_for_done(tiny_set, progress) -> None:
    """Whoever follows a training that goes on hears of each epoch when it is there."""
    job = tiny_set.job("job", distill={"checkpoint_seconds": 3600})
    with pytest.raises(KeyboardInterrupt):
        distill_loop(job, killed_at(17))
    assert len(epochs_of(job)) == 3
    steps = []
    plan = plan_resources(job.config, 2, 0, 1)
    distill_student(
        job, StageDirectory(job.path, "distill", "{}"), plan, progress,
        lambda record: steps.append((record["epoch"], len(epochs_of(job)))),
    )  # fmt: skip
    assert steps == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert progress.images_again == 15 * job.batch_size


# Terms of the loss

ALONE = {name: 0 for name in Loss.model_fields if name.endswith("_weight")}
CRD = {"crd_weight": 1.0, "crd_memory": 24, "crd_negatives": 16}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("weight", ALONE)
def test_every_term_trains_by_itself(tiny_set, weight, precision) -> None:
    job = tiny_set.job(
        weight, loss=ALONE | {weight: 1.0}, distill={"epochs": 1, "batch_size": 20, "precision": precision}
    )
    term = weight.removesuffix("_weight")
    torch.manual_seed(job.config.seed)
    start = Trainee(job).state_dict()
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
    records = [json.loads(path.read_text()) for path in sorted(Path(job.path, "epochs").iterdir())]
    assert [r["loss"] / r["kd"] for r in records] == pytest.approx([0, 1, 2], abs=1e-6)


def test_a_resumed_weight_goes_on_from_where_it_was(tiny_set) -> None:
    loss = {"kd_weight": [1.0, 0.0], "task_weight": [0.0, 1.0]}
    unbroken, broken = (tiny_set.job(name, loss=loss) for name in ("unbroken", "broken"))
    expected = distill_loop(unbroken, here())
    with pytest.raises(KeyboardInterrupt):
        distill_loop(broken, killed_at(12))
    assert distill_loop(broken, here())["loss"] == expected["loss"]
    assert_same(unbroken, broken)


def test_crd_trains_on_labelled_and_unlabelled_images(tiny_set) -> None:
    job = tiny_set.job("crd", loss=ALONE | CRD, distill={"epochs": 30})
    record = distill_loop(job, here())
    second = json.loads(Path(job.path, "epochs", "00002.json").read_text())  # by then the memory is full
    assert record["crd"] < second["crd"] - 1
    state = weights(job)
    assert state["memory.put_in"] == job.total_steps * 8
    images, labels = state["memory.image_M"], state["memory.label_M"]
    assert set(labels.tolist()) == {UNLABELLED, 0, 1, 2}
    shown = np.concatenate(job.train_split.labels())
    assert labels.tolist() == shown[images].tolist()  # each with its own
    torch.testing.assert_close(state["memory.teacher_MP"].norm(dim=1), torch.ones(24))
    assert torch.isfinite(state["memory.log_mean"]).all()


@pytest.mark.parametrize("broken_at", [8, 12])
def test_a_resumed_crd_equals_an_unbroken_one(tiny_set, broken_at) -> None:
    """The memory too, in the middle of a ring as at its end; a preemption may come within an epoch."""
    unbroken, broken = (tiny_set.job(name, loss=CRD) for name in ("unbroken", "broken"))
    expected = distill_loop(unbroken, here())

    def notice(step: int) -> bool:
        if step == broken_at + 1:
            raise KeyboardInterrupt
        return step == broken_at

    with pytest.raises(KeyboardInterrupt):
        distill_loop(broken, here(notice))
    assert latest_step(broken.path) == broken_at
    record = distill_loop(broken, here())
    assert {name for name in weights(unbroken) if name.startswith("memory.")} >= {
        "memory.student_MP",
        "memory.log_mean",
    }
    assert_same(unbroken, broken)
    assert (record["loss"], record["crd"]) == (expected["loss"], expected["crd"])


def test_crd_remembers_no_image_that_takes_no_part(tiny_set) -> None:
    job = tiny_set.job("crd", loss=ALONE | CRD, distill={"labelled_share": 1.0, "epochs": 1})
    distill_loop(job, here())
    assert UNLABELLED not in weights(job)["memory.label_M"]


# The rate of the body


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
    with pytest.raises(KeyboardInterrupt):
        distill_loop(broken, killed_at(12))
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
    for name, value in Trainee(broken).named_parameters():
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
    start = {f"model.{name}": value for name, value in Trainee(jobs[1.0]).state_dict().items()}
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


@pytest.mark.parametrize(("workers", "num_train"), [(2, 3), (1, 1)])
def test_a_worker_of_one_image_a_step_is_refused_where_batch_norm_needs_two(
    make_set, progress, workers, num_train
) -> None:
    """case C13"""
    small = make_set("few", num_train=num_train)
    job = small.job("student", distill={"num_workers": workers})
    directory = StageDirectory(job.path, "distill", "{}")
    with pytest.raises(DataError, match=rf"^{num_train} image.*batch norm"):
        distill_student(job, directory, None, progress, lambda record: None)
    assert not list(Path(job.path).iterdir())

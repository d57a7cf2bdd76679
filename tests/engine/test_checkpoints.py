"""Checkpoints: what comes back is what was saved, bit for bit, and damage costs one checkpoint, never the run (case
C24)."""

import copy
import itertools
import json
import random
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fsspec.core import url_to_fs
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raydistill.engine import checkpoints
from raydistill.engine.checkpoints import Checkpoint, CheckpointWriter, latest_checkpoint, latest_step
from raydistill.errors import CheckpointError, StageError
from tests.pickles import Malicious

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = ("weights.safetensors", "state.pt", "checkpoint.json")


class Trainer:
    """A small network under training, with all the state that a run has."""

    def __init__(self, with_ema: bool = True) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if with_ema else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        self.step = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = torch.randn(16, 6, generator=torch.Generator().manual_seed(self.step))
            loss = self.model(batch).square().mean()
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            self.step += 1

    def save(self, path: object, **others: object) -> None:
        options = {"sums": {"task": 1.5}, "record": None, **others}
        with CheckpointWriter(str(path)) as writer:
            writer.save(Checkpoint(self.step, self.modules(), self.optimizer, self.scaler, **options))

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model} | ({"ema": self.ema.module} if self.ema is not None else {})

    def resume(self, path: object) -> None:
        weights, state, meta = latest_checkpoint(str(path))
        for name, network in self.modules().items():
            network.load_state_dict(
                {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = meta["step"]

    def state(self) -> dict[str, torch.Tensor]:
        found = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.ema is not None:
            found |= {f"ema.{k}": v for k, v in self.ema.module.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{k}": v for k, v in moments.items()}
        return {k: v.clone() for k, v in found.items()} | {"scale": torch.tensor(self.scaler.get_scale())}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture
def saved(tmp_path) -> Callable[..., Trainer]:
    """Saves at the given steps; gives the trainer."""

    def save(*steps: int) -> Trainer:
        trainer = Trainer()
        for step in steps:
            trainer.run(step - trainer.step)
            trainer.save(tmp_path)
        return trainer

    return save


def folder(path: Path, step: int) -> Path:
    return path / "checkpoints" / f"step-{step:09d}"


def test_what_else_lies_among_checkpoints_stays(tmp_path, saved):
    names = ["step-000000001/notes.txt", "step-000000001/weights.safetensors.bak", "step-1/state.pt", "photos/state.pt",
             "step-00000000a/state.pt", "step-٠٠٠٠٠٠٠٠٠/state.pt"]  # fmt: skip
    others = [tmp_path / "checkpoints" / name for name in names]
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("mine")
    saved(1, 2, 3)
    assert not (folder(tmp_path, 1) / "state.pt").exists()
    assert latest_step(str(tmp_path)) == 3
    checkpoints.drop_checkpoints(str(tmp_path))
    left = {path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert left == set(others)


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/step-000000001", "checkpoints/step-000000007"])
def test_no_link_leads_what_is_written_or_dropped_elsewhere(tmp_path, saved, place):
    victim, workspace = tmp_path / "victim", tmp_path / "w"
    (victim / "step-000000001").mkdir(parents=True)
    for file in (victim / "state.pt", victim / "step-000000001/state.pt", victim / "newest.json"):
        file.write_text("[]")
    before = sorted(victim.rglob("*"))
    (workspace / place).parent.mkdir(parents=True)
    (workspace / place).symlink_to(victim, target_is_directory=True)
    trainer = Trainer()
    for act in (lambda: trainer.save(workspace), lambda: checkpoints.drop_checkpoints(str(workspace))):
        with pytest.raises(CheckpointError, match=rf"{place} is a link to .*victim"):
            act()
    assert sorted(victim.rglob("*")) == before
    assert (victim / "state.pt").read_text() == "[]"


@pytest.mark.parametrize("with_ema", [True, False])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, with_ema):
    unbroken = Trainer(with_ema)
    unbroken.run(7)
    unbroken.save(tmp_path)
    at_seven = unbroken.state()
    unbroken.run(5)
    resumed = Trainer(with_ema)
    resumed.run(2)  # whatever it held before
    resumed.resume(tmp_path)
    assert_same(resumed.state(), at_seven)
    resumed.run(5)
    assert_same(resumed.state(), unbroken.state())


def test_training_goes_on_while_the_moment_is_written(tmp_path, monkeypatch):
    trainer, may_write, write = Trainer(), threading.Event(), checkpoints.write_file
    trainer.run(3)
    at_three, sums = trainer.state(), {"task": 1.0}
    monkeypatch.setattr(checkpoints, "write_file", lambda *file: may_write.wait(10) and write(*file))
    with CheckpointWriter(str(tmp_path)) as writer:
        writer.save(Checkpoint(3, trainer.modules(), trainer.optimizer, trainer.scaler, sums, None))
        trainer.run(2)
        sums["task"] = 2.0
        may_write.set()
    resumed = Trainer()
    resumed.resume(tmp_path)
    assert_same(resumed.state(), at_three)
    assert latest_checkpoint(str(tmp_path))[2]["sums"] == {"task": 1.0}


def test_sums_and_records_come_back_as_numbers(tmp_path):
    sums, record = {"task": 1 / 3, "kd": 1e-30}, {"step": 4, "val_accuracy": 0.1, "café": 2.5}
    Trainer().save(tmp_path, sums=sums, record=record)
    _, _, meta = latest_checkpoint(str(tmp_path))
    assert (meta["step"], meta["sums"], meta["record"]) == (0, sums, record)


def test_where_there_is_none_there_is_none(tmp_path):
    assert latest_checkpoint(str(tmp_path)) is None
    assert latest_checkpoint(str(tmp_path / "nowhere")) is None
    assert latest_step(str(tmp_path)) == 0
    (tmp_path / "checkpoints").mkdir()
    assert latest_checkpoint(str(tmp_path)) is None


def test_the_newest_counts_and_the_one_before_it_stays(tmp_path, saved):
    saved(2, 5, 9, 10, 100)
    assert latest_checkpoint(str(tmp_path))[2]["step"] == 100
    assert latest_step(str(tmp_path)) == 100
    assert sorted(path.name for path in tmp_path.glob("checkpoints/step-*")) == [
        "step-000000010",
        "step-000000100",
    ]


def test_saving_a_step_again_replaces_it(tmp_path, saved):
    trainer = saved(3)
    with torch.no_grad():
        trainer.model[0].weight.fill_(5)
    trainer.save(tmp_path)
    assert (latest_checkpoint(str(tmp_path))[0]["model.0.weight"] == 5).all()


def test_a_checkpoint_does_not_change_with_the_network(tmp_path, saved):
    trainer = saved(3)
    before = trainer.state()
    trainer.run(3)
    weights, _, _ = latest_checkpoint(str(tmp_path))
    assert_same(weights, {name: value for name, value in before.items() if name.startswith(("model.", "ema."))})


def test_networks_in_any_memory_format_can_be_saved(tmp_path):
    trainer = Trainer(with_ema=False)
    trainer.model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    trainer.save(tmp_path)
    assert torch.equal(latest_checkpoint(str(tmp_path))[0]["model.weight"], trainer.model.weight)


@pytest.mark.parametrize("written", range(len(FILES)))
def test_a_run_killed_while_it_saved_goes_on_from_the_one_before(tmp_path, saved, written):
    saved(4, 8)
    for name in FILES[written:]:
        (folder(tmp_path, 8) / name).unlink()
    (folder(tmp_path, 8) / f"{FILES[written]}.0123.tmp").write_bytes(b"half")
    assert latest_checkpoint(str(tmp_path))[2]["step"] == 4
    assert latest_step(str(tmp_path)) == 4


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["empty", "cut short", "zeros", "another file"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, saved, name, how):
    saved(4, 8)
    path = folder(tmp_path, 8) / name
    data = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "cut short": data[: len(data) // 2], "zeros": bytes(len(data)), "another file": b"<html>"}[how]
    )
    assert latest_checkpoint(str(tmp_path))[2]["step"] == 4
    assert latest_step(str(tmp_path)) == 4  # what feeds the loop and the loop itself start from one step


def test_damage_of_any_kind_raises_nothing(tmp_path, saved):
    saved(4, 8)
    generator = random.Random(0)
    whole = {name: (folder(tmp_path, 8) / name).read_bytes() for name in FILES}
    for _ in range(150):
        name = generator.choice(FILES)
        data = bytearray(whole[name])
        for _ in range(generator.choice([1, 3, 30])):
            data[generator.randrange(len(data))] = generator.randrange(256)
        (folder(tmp_path, 8) / name).write_bytes(bytes(data[: generator.choice([len(data), len(data) - 1, 40])]))
        latest_checkpoint(str(tmp_path))
        (folder(tmp_path, 8) / name).write_bytes(whole[name])
    assert latest_checkpoint(str(tmp_path))[2]["step"] == 8


def test_where_all_are_damaged_there_is_none(tmp_path, saved):
    saved(4, 8)
    for step, name in itertools.product((4, 8), FILES[:1]):
        (folder(tmp_path, step) / name).write_bytes(b"")
    assert latest_checkpoint(str(tmp_path)) is None
    assert latest_step(str(tmp_path)) == 0


def test_what_killed_runs_left_does_not_push_out_the_newest(tmp_path, saved):
    """Two saves at later steps were cut off; the run goes on from step 4 and saves at 6, before both of them."""
    trainer = saved(4)
    for step in (7, 9):
        shutil.copytree(folder(tmp_path, 4), folder(tmp_path, step))
        (folder(tmp_path, step) / "checkpoint.json").unlink()
    trainer.run(2)
    trainer.save(tmp_path)
    assert latest_checkpoint(str(tmp_path))[2]["step"] == 6
    assert sorted(path.name for path in tmp_path.glob("checkpoints/step-*")) == [
        "step-000000004",
        "step-000000006",
    ]


def test_a_damaged_later_checkpoint_does_not_push_out_the_newest(tmp_path, saved):
    saved(4, 8)
    (folder(tmp_path, 8) / "state.pt").write_bytes(b"")
    resumed = Trainer()
    resumed.resume(tmp_path)
    resumed.run(1)
    resumed.save(tmp_path)
    assert latest_checkpoint(str(tmp_path))[2]["step"] == 5
    resumed.run(1)
    resumed.save(tmp_path)
    assert latest_checkpoint(str(tmp_path))[2]["step"] == 6


@pytest.mark.parametrize("failing", range(len(FILES)))
def test_a_disk_that_fills_up_while_saving_costs_that_checkpoint_alone(tmp_path, saved, monkeypatch, failing):
    trainer = saved(4, 8)
    write, calls = checkpoints.write_file, itertools.count()

    def fills_up(path: str, content: Callable) -> None:
        if next(calls) == failing:
            raise StageError("the disk is full")
        write(path, content)

    monkeypatch.setattr(checkpoints, "write_file", fills_up)
    trainer.run(2)
    with pytest.raises(StageError):
        trainer.save(tmp_path)
    assert latest_checkpoint(str(tmp_path))[2]["step"] == 8
    assert folder(tmp_path, 4).exists()


def test_a_pickle_in_the_place_of_the_state_runs_no_code(tmp_path, saved):
    saved(4, 8)
    marker = tmp_path / "marker"

    torch.save({"optimizer": Malicious(marker), "scaler": {}}, folder(tmp_path, 8) / "state.pt")
    assert latest_checkpoint(str(tmp_path))[2]["step"] == 4
    assert not marker.exists()


def as_written(path: Path, step: int, name: str, data: bytes, **facts: str) -> None:
    """Put something else into a checkpoint as if it had been written so, by other versions."""
    (folder(path, step) / name).write_bytes(data)
    meta = json.loads((folder(path, step) / "checkpoint.json").read_text())
    meta["checksums"][name] = zlib.crc32(data)
    (folder(path, step) / "checkpoint.json").write_text(json.dumps({**meta, **facts}))


@pytest.mark.parametrize("name", ["state.pt", "weights.safetensors"])
def test_a_checkpoint_of_another_version_is_refused_with_both(tmp_path, saved, name):
    """It is whole, so it is not passed over: training would begin anew without a word."""
    saved(4, 8)
    as_written(tmp_path, 8, name, b"what torch 9 writes", torch="9.0.0", raydistill="7.1")
    for read in (latest_checkpoint, latest_step):
        with pytest.raises(CheckpointError) as refused:
            read(str(tmp_path))
        (message,) = refused.value.args
        assert "raydistill 7.1 wrote the checkpoint of step 8" in message
        assert "torch 9.0.0, timm " in message
        assert "does not load with torch " + torch.__version__.partition("+")[0] in message
        assert f"{tmp_path}/checkpoints" in message
        assert "\n" not in message


def test_checkpoints_may_lie_in_an_object_store():
    trainer = Trainer()
    path = "memory://checkpoints-test"
    try:
        for _ in range(3):
            trainer.run(2)
            trainer.save(path)
        expected = copy.deepcopy(trainer.state())
        resumed = Trainer()
        resumed.resume(path)
        assert_same(resumed.state(), expected)
        assert latest_step(path) == 6
    finally:
        url_to_fs(path)[0].rm("/checkpoints-test", recursive=True)

"""What `precision: auto` stands for: measured once, pinned, and the same for all who ask."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from raydistill.config import load_config
from raydistill.data.views import Preprocessing
from raydistill.engine import loop, precision
from raydistill.engine.loop import distill_loop
from raydistill.engine.precision import Decision, described, measure, refuse_unable, set_teacher_precision
from raydistill.errors import CheckpointError, ConfigError
from raydistill.graph import find_work
from raydistill.identity import student_pin, teacher_pin
from raydistill.models.teacher import TeacherBackbone
from raydistill.preflight import check_run
from raydistill.storage.filesystems import open_filesystem
from tests.processes import together
from tests.training import assert_same, ends_at, here

CPU = torch.device("cpu")
BF16 = {"precision": "bf16", "fp32_seconds": 0.5, "bf16_seconds": 0.25, "device": "another"}


class Clock:
    """Stands for the time of steps that take so long for an image."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.now, self.counts = seconds, 0.0, list[int]()

    def perf_counter(self) -> float:
        return self.now

    def step(self, count: int, name: str) -> list[torch.Tensor]:
        self.now += count * self.seconds[name]
        self.counts.append(count)
        return [torch.ones(1)]


def measured(monkeypatch: pytest.MonkeyPatch, clock: Clock, batch_size: int = 64) -> Decision:
    monkeypatch.setattr(precision, "time", clock)
    return measure(clock.step, batch_size, CPU)


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen", "words"),
    [
        (2e-3, 1e-3, "bf16", "bf16, 2.0 times as fast as fp32"),
        (1.11e-3, 1e-3, "bf16", "bf16, 1.1 times as fast as fp32"),
        (1.05e-3, 1e-3, "fp32", "fp32: bf16 is only 1.05 times as fast"),  # not worth the digits
        (1e-3, 3e-3, "fp32", "fp32: bf16 is only 0.33 times as fast"),
    ],
)
def test_bf16_is_chosen_where_it_is_clearly_faster(monkeypatch, fp32, bf16, chosen, words) -> None:
    found = measured(monkeypatch, Clock(fp32=fp32, bf16=bf16))
    assert (found.precision, str(found)) == (chosen, words)
    assert found.fp32_seconds / found.bf16_seconds == pytest.approx(fp32 / bf16)


@pytest.mark.parametrize(("replicas", "taken"), [(0.8e-3, True), (0.95e-3, False), (5e-3, False)])
def test_threads_share_a_batch_where_that_is_clearly_faster(monkeypatch, replicas, taken) -> None:
    """In the precision that is taken: here bf16."""
    clock = Clock(fp32=2e-3, bf16=1e-3)

    def replicated(count: int, name: str) -> list[torch.Tensor]:
        assert name == "bf16"
        clock.now += count * replicas
        return [torch.ones(1)]

    monkeypatch.setattr(precision, "time", clock)
    found = measure(clock.step, 64, CPU, 2, replicated)
    assert (found.precision, found.replicas) == ("bf16", taken)
    assert clock.now < 6


@pytest.mark.parametrize("seconds", [1e-5, 1e-2, 0.5, 8.0])
def test_a_measurement_takes_a_few_seconds_or_steps(monkeypatch, seconds) -> None:
    clock = Clock(fp32=2 * seconds, bf16=seconds)
    assert measured(monkeypatch, clock).precision == "bf16"
    assert clock.now < 4 or (len(clock.counts) <= 10 and set(clock.counts) == {2})
    assert max(clock.counts) == (64 if seconds < 1e-3 else 2 if seconds > 0.1 else 8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), RuntimeError("no bf16 here"), NotImplementedError("no")])
def test_bf16_that_fails_or_is_not_finite_is_not_chosen(bad) -> None:
    def step(count: int, name: str) -> list[torch.Tensor]:
        if name == "bf16" and isinstance(bad, Exception):
            raise bad
        return [torch.ones(2), torch.tensor([1.0, bad if name == "bf16" else 1.0])]

    found = measure(step, 8, CPU)
    assert (found.precision, found.bf16_seconds) == ("fp32", None)
    assert str(found) == "fp32: bf16 gives no finite numbers"


class Tiny(nn.Module):
    """A small teacher, whose inner numbers are `scale` times as large as its features."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.scale = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), scale

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.conv2d(images, self.scale * self.first.weight).mean((2, 3))
        return nn.functional.linear(inner, self.second.weight / self.scale)


def teacher(scale: float = 1.0) -> TeacherBackbone:
    return TeacherBackbone(Tiny(scale), Preprocessing(8, (0, 0, 0), (1, 1, 1)))


def noise(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_pinned_decision_is_read_and_not_measured_again(tmp_path, monkeypatch) -> None:
    pin, backbone = tmp_path / "precision" / "a.json", teacher()
    set_teacher_precision(backbone, "auto", str(pin), 4, CPU)
    first = pin.read_text()
    assert described("auto", str(pin))[0] == json.loads(first)["precision"] == backbone.precision
    other = "bf16" if backbone.precision == "fp32" else "fp32"
    pin.write_text(json.dumps({**BF16, "precision": other}))
    monkeypatch.setattr(precision, "measure", lambda *_: pytest.fail("it is measured again"))
    set_teacher_precision(backbone, "auto", str(pin), 4, CPU)
    assert backbone.precision == other
    with torch.autocast("cpu", torch.bfloat16, enabled=other == "bf16"):
        expected = Tiny()(noise()).float()
    torch.testing.assert_close(backbone(noise()), expected, rtol=0, atol=0)
    set_teacher_precision(backbone, "fp16", str(pin), 4, CPU)  # what is asked for needs no measurement
    assert backbone.precision == "fp16"


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_of_two_who_measure_at_once_the_first_counts_for_both(place, tmp_path, bucket, monkeypatch) -> None:
    root = bucket if place == "bucket" else str(tmp_path)
    pin, one, two = f"{root}/precision/a.json", teacher(), teacher()
    decisions = {name: Decision(name, 1.0, 0.5, name) for name in ("fp32", "bf16")}

    def second(*_) -> Decision:
        monkeypatch.setattr(precision, "measure", lambda *_: decisions["bf16"])
        set_teacher_precision(two, "auto", pin, 4, CPU)  # meanwhile, and done sooner
        return decisions["fp32"]

    monkeypatch.setattr(precision, "measure", second)
    set_teacher_precision(one, "auto", pin, 4, CPU)
    assert (one.precision, two.precision) == ("bf16", "bf16")
    fs, folder = open_filesystem(f"{root}/precision")
    assert list(fs.names(folder)) == ["a.json"]


@pytest.mark.slow
def test_processes_that_measure_at_once_agree(tmp_path) -> None:
    """Each would decide otherwise by itself."""
    program = """
import sys
from tests.engine.test_precision import CPU, Decision, precision, set_teacher_precision, teacher
backbone = teacher()
precision.measure = lambda *_: Decision(sys.argv[2], 1.0, 0.5, "this")
print("ready", flush=True)
input()
set_teacher_precision(backbone, "auto", sys.argv[1], 4, CPU)
print(backbone.precision)
"""
    told = together(program, *((str(tmp_path / "precision" / "a.json"), name) for name in ("fp32", "bf16") * 2))
    assert len({out.split()[-1] for out, _ in told}) == 1, told


@pytest.mark.parametrize(
    "change",
    [
        lambda pin: pin.write_text("{"),
        lambda pin: pin.write_text("[]"),
        lambda pin: pin.write_text(json.dumps({**BF16, "precision": "fp8"})),
        lambda pin: pin.write_text(json.dumps({**BF16, "precision": "fp16"})),
        lambda pin: pin.write_text(json.dumps({**BF16, "fp32_seconds": 0})),
        lambda pin: pin.write_text(json.dumps({**BF16, "bf16_seconds": "fast"})),
        lambda pin: pin.write_text(json.dumps({**BF16, "bf16_seconds": None})),
        lambda pin: pin.write_text(json.dumps({**BF16, "fp32_seconds": 1e308})),
        lambda pin: pin.write_text(json.dumps({**BF16, "more": 1})),
        lambda pin: pin.write_text(json.dumps({k: v for k, v in BF16.items() if k != "device"})),
        lambda pin: pin.mkdir(),
        lambda pin: pin.symlink_to(pin.with_name("elsewhere")),
        lambda pin: pin.parent.rmdir() or pin.parent.symlink_to(pin.parent.parent),
    ],
    ids=range(13),
)
def test_a_decision_of_another_form_is_refused(tmp_path, change: Callable[[Path], object]) -> None:
    pin = tmp_path / "precision" / "a.json"
    pin.parent.mkdir()
    change(pin)
    for read in (
        lambda: set_teacher_precision(teacher(), "auto", str(pin), 4, CPU),
        lambda: described("auto", str(pin)),
    ):
        with pytest.raises(CheckpointError, match="delete") as error:
            read()
        assert str(pin.parent) in str(error.value)
        assert "\n" not in str(error.value)
        assert f"delete {pin.parent} " not in str(error.value), "the decisions on other networks may stay"


def test_a_teacher_that_overflows_is_computed_again_in_fp32() -> None:
    strong, weak = teacher(1e6), teacher()
    for backbone in (strong, weak):
        backbone.precision = "fp16"
        backbone(noise(4))
    with torch.autocast("cpu", torch.float16):
        assert not Tiny(1e6)(noise()).isfinite().all(), "it does overflow"
    torch.testing.assert_close(strong(noise()), Tiny(1e6)(noise()).float(), rtol=0, atol=0)
    assert weak(noise()).isfinite().all()
    assert (strong.num_overflowed, weak.num_overflowed) == (4 + 6, 0)


def test_what_is_not_finite_in_fp32_stays_so() -> None:
    backbone = teacher()
    backbone.precision = "bf16"
    assert backbone(torch.full((2, 3, 8, 8), torch.nan)).isnan().all(), "for refuse_not_finite, which names the sample"


@pytest.mark.parametrize("threads", [1, 2])
def test_auto_trains_as_what_it_stands_for(make_set, monkeypatch, threads) -> None:
    """Bit for bit: the measurement leaves no trace in the student, nor in what is drawn at random. A resumed run reads
    the decision."""
    tiny, settings = make_set("set", num_train=24, labelled=12), {"epochs": 2, "ema_decay": 0.9}
    for name, least in (("fp32", float("inf")), ("bf16", 0.0)):
        expected = tiny.job(name, distill=settings | {"precision": name})
        job = tiny.job(f"auto-{name}", distill=settings | {"precision": "auto"})
        monkeypatch.setattr(precision, "_LEAST_GAIN", least)
        monkeypatch.setattr(precision, "_MOST_ROUNDS", 1)
        monkeypatch.setattr(precision, "_STEP_SECONDS", 0.0)
        monkeypatch.setattr(loop, "replicas_of", lambda *_: None)  # whose sums round otherwise
        worker = replace(here(), threads=threads)
        with contextlib.suppress(KeyboardInterrupt):
            distill_loop(job, replace(worker, preempted=ends_at(4)))
        monkeypatch.setattr(precision, "measure", lambda *_: pytest.fail("a resumed run measures again"))
        distill_loop(job, worker)
        monkeypatch.undo()
        distill_loop(expected, worker)
        assert_same(job, expected)
        pin = student_pin(str(tiny.root), job.config)
        assert described("auto", pin)[0] == name
        os.remove(pin)


@pytest.mark.parametrize("key", ["teacher", "distill"])
def test_a_device_that_cannot_is_named_before_work_begins(key, words, tmp_path, monkeypatch) -> None:
    for name in ("auto", "fp32", "bf16"):
        refuse_unable("teacher.precision", name, CPU)

    def none(*_):
        raise RuntimeError('"slow_conv2d_cpu" not implemented\nfor Half')

    monkeypatch.setattr(precision, "functional", SimpleNamespace(conv2d=none, linear=none))
    refuse_unable("teacher.precision", "fp32", CPU)
    with pytest.raises(
        ConfigError, match=r"teacher.precision=fp16: CPU, .* cannot .*; set teacher.precision=fp32"
    ) as e:
        refuse_unable("teacher.precision", "fp16", CPU)
    assert "\n" not in str(e.value)
    config = load_config([*words, f"{key}.precision=bf16"])
    with pytest.raises(ConfigError, match=f"{key}.precision=bf16: .*; set {key}.precision=fp32"):
        check_run(config, find_work(config))
    assert not (tmp_path / "workspace").exists()


def test_a_pinned_precision_that_this_device_lacks_is_named(tmp_path, monkeypatch) -> None:
    pin = tmp_path / "precision" / "a.json"
    pin.parent.mkdir()
    pin.write_text(json.dumps(BF16))
    in_fp32 = SimpleNamespace(conv2d=nn.functional.conv2d, linear=lambda inputs, matrix: inputs.float())
    monkeypatch.setattr(precision, "functional", in_fp32)
    with pytest.raises(ConfigError, match=r"precision=bf16 \(what auto stands for since another measured it: .*a.json"):
        set_teacher_precision(teacher(), "auto", str(pin), 4, CPU)


def test_a_decision_holds_for_all_that_share_a_directory() -> None:
    """And for no others."""

    def pins(*words: str) -> tuple[str, str]:
        config = load_config(["images.path=x", *words])
        return teacher_pin("/w", config), student_pin("/w", config)

    first = pins()
    assert pins("teacher.batch_size=7", "distill.num_workers=4", "views.per_image=3", "teacher.head=native") == first
    assert all(a != b for a, b in zip(pins("teacher.size=64", "distill.batch_size=8"), first, strict=True))
    assert all(a != b for a, b in zip(pins("teacher.model=timm:resnet18", "student.size=48"), first, strict=True))

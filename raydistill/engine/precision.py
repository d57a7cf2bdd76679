"""The precision of a network's steps. What `auto` stands for is measured once and pinned in the workspace, so that a
directory never mixes two, whichever processes and machines fill it."""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch.nn import functional

from raydistill.config.section import Precision
from raydistill.engine.replicas import Replicas
from raydistill.errors import ConfigError, reason_of
from raydistill.models.autocast import autocast
from raydistill.models.student import Student
from raydistill.models.teacher import TeacherBackbone
from raydistill.storage.filesystems import create_file, open_filesystem
from raydistill.storage.local import refuse_links
from raydistill.storage.state import needed_state, read_state

_LEAST_GAIN = 1.1  # of bf16: digits are not given away for noise
# A measurement takes about `_SECONDS`, in at most so many rounds; a step of it at most `_STEP_SECONDS`.
_SECONDS, _STEP_SECONDS, _MOST_ROUNDS = 2.5, 0.25, 9

# Takes a step with so many images in a precision, and gives what has to be finite.
Step = Callable[[int, str], Iterable[torch.Tensor]]


_Seconds = Annotated[float, Field(gt=0, lt=1e6)]


@dataclass(frozen=True)
class Decision:
    """What `auto` stands for, and why: the medians of a step; None if bf16 fails or is not finite."""

    precision: Literal["fp32", "bf16"]
    fp32_seconds: _Seconds
    bf16_seconds: _Seconds | None
    device: str
    replicas: bool = False  # whether threads that share a batch are faster than threads inside each operation

    def __post_init__(self) -> None:
        if self.precision == "bf16" and self.bf16_seconds is None:
            raise ValueError("bf16 was not measured")

    def __str__(self) -> str:
        if self.bf16_seconds is None:
            return "fp32: bf16 gives no finite numbers"
        gain, how = self.fp32_seconds / self.bf16_seconds, "; threads share each batch" if self.replicas else ""
        if self.precision == "fp32":
            return f"fp32: bf16 is only {gain:.2f} times as fast{how}"
        return f"bf16, {gain:.1f} times as fast as fp32{how}"


def described(asked: Precision, pin: str) -> tuple[Precision, str]:
    """The precision of what was computed as `asked`, and in words how it was chosen. `pin` is the file of what `auto`
    stands for."""
    decision = _pinned(pin) if asked == "auto" else None
    return (asked, asked) if decision is None else (decision.precision, str(decision))


def _pinned(pin: str) -> Decision | None:
    fs, folder = open_filesystem(pin.rpartition("/")[0])
    if fs.is_local:
        refuse_links(folder)
    return read_state(pin, Decision)


def set_teacher_precision(
    backbone: TeacherBackbone, asked: str, pin: str, batch_size: int, device: torch.device
) -> None:
    """Let the teacher, which is on its device, compute as asked. Raises ConfigError: the device cannot."""

    def make_step() -> Step:
        images = _noise(batch_size, backbone.preprocessing.size, device)

        def step(count: int, precision: str) -> Iterable[torch.Tensor]:
            with torch.inference_mode(), autocast(device, precision):
                return [backbone.network(images[:count])]

        return step

    def measured() -> Decision:
        return measure(make_step(), batch_size, device)

    backbone.precision, _ = _settled("teacher.precision", asked, pin, measured, device)


def student_precision(
    student: Student,
    replicas: Replicas | None,
    asked: str,
    pin: str,
    batch_size: int,
    device: torch.device,
    layout: torch.memory_format,
) -> tuple[str, Replicas | None]:
    """The precision of training the student on a worker's share of a batch, and the replicas if they are faster; `auto`
    alone takes them, because the threads round otherwise. The student does not change. Raises ConfigError: the device
    cannot compute as asked."""

    def make_step(replicas: Replicas | None) -> Step:
        trial = copy.deepcopy(student).train()
        network = Replicas(trial, replicas.threads) if replicas else trial
        images = _noise(batch_size, student.preprocessing.size, device).contiguous(memory_format=layout)

        def step(count: int, precision: str) -> Iterable[torch.Tensor]:
            trial.zero_grad(set_to_none=True)
            torch.set_num_threads(1 if replicas else threads)
            with autocast(device, precision):
                logits_VC, _ = network(images[:count])
            logits_VC.float().logsumexp(1).mean().backward()
            torch.set_num_threads(threads)
            return [logits_VC, *(p.grad for p in trial.parameters() if p.grad is not None)]

        return step

    def measured() -> Decision:
        least = 2 * replicas.threads if replicas else 2  # images that batch norm needs
        return measure(make_step(None), batch_size, device, least, make_step(replicas) if replicas else None)

    threads = torch.get_num_threads()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # of dropout: a step's numbers stay the same
        precision, shares = _settled("distill.precision", asked, pin, measured, device)
    return precision, replicas if shares else None


def pipeline_dtype(asked: str, pin: str, step: Step, device: torch.device) -> str:
    """The numbers that a diffusion pipeline computes in; a `step` is one of its denoiser. Raises ConfigError: the
    device cannot compute as asked."""
    return _settled("generate.dtype", asked, pin, lambda: measure(step, 1, device), device)[0]


def _noise(count: int, side: int, device: torch.device) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)


def _settled(
    key: str, asked: str, pin: str, measured: Callable[[], Decision], device: torch.device
) -> tuple[str, bool]:
    """The precision, and whether threads share a batch."""
    if device.type == "cuda" and key != "generate.dtype":  # images that were made in fp32 stay as they are
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions by default
    if asked != "auto":
        refuse_unable(key, asked, device)
        return asked, False
    decision = _pinned(pin)
    if decision is None:
        decided = measured()
        fs, folder = open_filesystem(pin.rpartition("/")[0])
        fs.make_folder(folder)
        with contextlib.suppress(FileExistsError):  # another process was first, and counts
            create_file(pin, json.dumps(asdict(decided)).encode())
        decision = needed_state(pin, Decision)
    refuse_unable(
        key, decision.precision, device, f" (what auto stands for since {decision.device} measured it: {pin})"
    )
    return decision.precision, decision.replicas


def measure(
    step: Step, batch_size: int, device: torch.device, least: int = 2, replicated: Step | None = None
) -> Decision:
    """Time steps in fp32 and bf16 in turn, after warming up, for two to three seconds; in the faster one also steps in
    turn with `replicated` ones. A step has `batch_size` images, or fewer, but the `least`, if it would take long."""

    def timed(count: int, precision: str, step: Step = step) -> float:
        started = time.perf_counter()
        step(count, precision)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    began, count = time.perf_counter(), min(least, batch_size)
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    usable = _is_finite(step, count)
    precisions = list(times) if usable else ["fp32"]
    while True:
        for precision in precisions:
            timed(count, precision)  # memory is allocated, kernels are chosen
        if count == batch_size or max(timed(count, p) for p in precisions) > _STEP_SECONDS / 4:
            break
        count = min(4 * count, batch_size)
    while len(times["fp32"]) < _MOST_ROUNDS:
        for precision in precisions:
            times[precision].append(timed(count, precision))
        if time.perf_counter() - began > _SECONDS:
            break
    fp32 = median(times["fp32"])
    bf16 = median(times["bf16"]) if usable and _is_finite(step, count) else None
    wins = bf16 is not None and fp32 >= _LEAST_GAIN * bf16
    chosen: Literal["fp32", "bf16"] = "bf16" if wins else "fp32"
    shares = False
    if replicated is not None:
        timed(count, chosen, replicated)
        turns = [(timed(count, chosen), timed(count, chosen, replicated)) for _ in range(len(times["fp32"]))]
        alone, shared = (median(turn) for turn in zip(*turns, strict=True))
        shares = alone >= _LEAST_GAIN * shared
    return Decision(chosen, fp32, bf16, _name_of(device), shares)


def _is_finite(step: Step, count: int) -> bool:
    """Whether bf16 works, and gives finite numbers."""
    try:
        return all(bool(tensor.isfinite().all()) for tensor in step(count, "bf16"))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):
        return False


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def refuse_unable(key: str, precision: str, device: torch.device, why: str = "") -> None:
    """Raises ConfigError: a small convolution and matrix product in this precision, forward and backward, fail on the
    device. `why` says where the precision comes from."""
    if precision in ("auto", "fp32"):
        return
    try:
        if (
            device.type == "cuda"
            and precision == "bf16"
            and not torch.cuda.is_bf16_supported(including_emulation=False)
        ):
            raise RuntimeError("the card has no bf16")
        with autocast(device, precision):
            image = torch.ones(2, 8, 8, 8, device=device, requires_grad=True)
            kernel, matrix = torch.ones(8, 8, 3, 3, device=device), torch.ones(8, 8, device=device)
            out = functional.linear(functional.conv2d(image, kernel).mean((2, 3)), matrix)
        out.float().sum().backward()
        if out.dtype == torch.float32 or not out.isfinite().all():
            raise RuntimeError("it gives other numbers")
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"{key}={precision}{why}: {_name_of(device)} cannot compute in it ({reason_of(error)}); set {key}=fp32"
        ) from None

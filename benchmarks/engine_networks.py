"""The rows of benchmarks/engine.py about networks: the teacher, a student's step with each loss, generation.

Shapes: B images, S pixels on a side of what a network sees.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.engine_bench import CLASSES, DTYPES, EPOCH_STEPS, SHARD_STEPS, Bench, Row, Waits, apart, flops, worker
from raydistill.config import Generate
from raydistill.data.views import Preprocessing, render, stored_views
from raydistill.engine.batches import DistillJob, read_batches
from raydistill.engine.distillation_model import DistillationModel
from raydistill.engine.frozen_teacher import FrozenTeacher
from raydistill.engine.loop import distill_loop
from raydistill.engine.workers import Worker
from raydistill.losses.crd import ContrastiveMemory
from raydistill.losses.total import Outputs, distillation_loss
from raydistill.models.teacher import load_teacher

# COUNTED_STEPS end before an epoch of three shards does. AHEAD: batches that may have been prepared while a bare loop
# ran.
WARM_STEPS, COUNTED_STEPS, AHEAD, TAUGHT_VIEWS = 3, 5, 4, 2


@torch.inference_mode()
def teacher_rows(bench: Bench, teacher: FrozenTeacher) -> Iterator[Row]:
    """Features of some views of one batch of images, from pixels to float16."""
    data, meter, batch, precision = bench.data, bench.meter, bench.sizes.batch, bench.teacher_precision
    images, ids = data.images()[:batch].copy(), data.ids[:batch]
    parameters = stored_views(data.config.views, 0, ids)[:TAUGHT_VIEWS]
    assert data.config.teacher is not None
    backbone = load_teacher(data.config.teacher).backbone.to(meter.device, memory_format=torch.channels_last)
    pixels = torch.from_numpy(images).to(meter.device)
    ready = [_ready(render(pixels, torch.from_numpy(one), backbone.preprocessing), precision) for one in parameters]

    def ours() -> np.ndarray:
        return teacher.features(images, parameters)

    def bare(network: Any) -> Callable[[], torch.Tensor]:
        def path() -> torch.Tensor:
            with meter.all_threads(), torch.autocast(meter.device.type, DTYPES[precision], enabled=precision != "fp32"):
                features = [network(views).half() for views in ready]
            return torch.stack(features)

        return path

    paths = {"teacher": bare(backbone.network)}
    if bench.compiles:
        paths["teacher, compiled bare"] = bare(torch.compile(backbone.network))
    mine, *others = meter.rates(ours, *paths.values())
    share, views = flops(paths["teacher"]) * mine / bench.peaks[precision], batch * len(ready)
    # It works in threads: of them only CUDA's driver tells.
    waits = meter.waits(ours) / len(ready) if meter.device.type == "cuda" else None
    for (name, path), other in zip(paths.items(), others, strict=True):
        yield Row(name, "views", views * mine, views * other, share, waits, apart(ours(), path()))


def _ready(views: torch.Tensor, precision: str) -> torch.Tensor:
    return views.contiguous(memory_format=torch.channels_last).to(DTYPES[precision])


class BareStep:
    """The plainest step of training, with the loss of a job or with cross-entropy alone, on batches that are ready: the
    first of the job, again and again."""

    def __init__(self, job: DistillJob, bench: Bench, with_loss: bool = True, compiles: bool = False) -> None:
        self._config, self._with_loss, settings = job.config, with_loss, job.config.distill
        precision, device = bench.precision, bench.meter.device
        torch.manual_seed(job.config.seed)  # so the weights are those of the loop
        model = DistillationModel(job).to(device, memory_format=torch.channels_last).train()
        trained = model if with_loss else model.student
        self._network: Any = torch.compile(trained) if compiles else trained
        rate, decay = settings.learning_rate, settings.weight_decay
        self._optimizer = torch.optim.AdamW(trained.parameters(), rate, weight_decay=decay, fused=True)
        self._autocast = torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        loss, self._memory = job.config.loss, None
        if "crd" in loss.terms:
            self._memory = ContrastiveMemory(loss.crd_memory, loss.projection_dim).to(device)
        ready = ready_batches(job, bench, model.student.preprocessing)
        self._batches, self._steps = itertools.cycle(ready), itertools.count()

    def __call__(self) -> torch.Tensor:
        """The step's loss."""
        views, labels, features, rows = next(self._batches)
        with self._autocast:
            outputs = self._network(views, features) if self._with_loss else self._network(views)
        if self._with_loss:
            loss = self._loss(*outputs, labels, rows)
        else:
            loss = nn.functional.cross_entropy(outputs[0].float(), labels)
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss.detach()

    def _loss(self, student: Outputs, teacher: Outputs, labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        loss, seed, negatives = self._config.loss, [self._config.seed, next(self._steps)], None
        if self._memory is not None:
            self._memory.put(student.projected_BP.detach(), teacher.projected_BP.detach(), rows, labels)
            temperature = loss.contrastive_temperature
            negatives = self._memory.draw(loss.crd_negatives, rows, labels, slice(None), seed, temperature)
        return distillation_loss(loss, student, teacher, labels, 0.0, negatives)[0]


@torch.no_grad()
def ready_batches(job: DistillJob, bench: Bench, preprocessing: Preprocessing) -> list[tuple[torch.Tensor, ...]]:
    """Rendered images, labels, features and row numbers of the first steps, on the device."""
    found, device = [], bench.meter.device
    for batch in itertools.islice(read_batches(job, 0, worker(bench.meter)), SHARD_STEPS):
        images, labels, features, rows = (torch.from_numpy(array).to(device) for array in batch.arrays()[:4])
        views = render(images, torch.from_numpy(batch.parameters_VP), preprocessing)
        found.append((_ready(views, bench.precision), labels, features.float(), rows))
    return found


def student_rows(bench: Bench, loss: str) -> Iterator[Row]:
    """A step of the training loop itself, which lets the bare loops run between its steps."""
    meter, batch, short = bench.meter, bench.sizes.batch, bench.data.job(loss, 1)
    paths = {f"student, {loss}": BareStep(short, bench)}
    if bench.compiles and loss == "default":
        paths["student, compiled bare"] = BareStep(short, bench, compiles=True)
    bare, cross_entropy = paths[f"student, {loss}"], BareStep(short, bench, with_loss=False)
    with meter.all_threads():
        mean = distill_loop(short, worker(meter))["loss"]  # over the steps of an epoch
    difference = apart([mean], torch.stack([bare() for _ in range(short.total_steps)]).double().mean())
    turns, others = [], [*paths.values(), cross_entropy]
    repeats = meter.repeats if loss == "default" else -(-meter.repeats // 2)  # there are many others

    def between_steps() -> Iterator[None]:
        yield from itertools.repeat(None, WARM_STEPS)
        started = meter.now()
        yield
        count = meter.count(meter.now() - started)
        for _ in range(repeats):
            yield from itertools.repeat(None, AHEAD)
            started = meter.now()
            yield from itertools.repeat(None, count)
            mine = (meter.now() - started) / count
            with meter.all_threads():
                for other in others:
                    other()
                turns.append((mine, *(meter.timed(other, count) for other in others)))

    run_between(bench.data.job(loss, EPOCH_STEPS // SHARD_STEPS), worker(meter), between_steps())
    ours, *rates, plain = (batch / median(taken) for taken in zip(*turns, strict=True))
    share, waits = flops(bare) * ours / batch / bench.peaks[bench.precision], waits_in_a_step(bench, loss)
    for name, rate in zip(paths, rates, strict=True):
        yield Row(name, "images", ours, rate, share, waits, difference, ours / plain)


def waits_in_a_step(bench: Bench, loss: str) -> float:
    """With one thread, since on CPUs the loop divides a batch between threads, whose operations are not seen here."""
    waits = Waits(bench.meter.device)

    def between_steps() -> Iterator[None]:
        yield from itertools.repeat(None, WARM_STEPS)
        with waits:
            yield from itertools.repeat(None, COUNTED_STEPS)

    run_between(bench.data.job(loss, 3), replace(worker(bench.meter), threads=1), between_steps())
    return waits.count / COUNTED_STEPS


def run_between(job: DistillJob, worker: Worker, between_steps: Iterator[None]) -> None:
    """Run the training loop, and go on with `between_steps` after each of its steps, until that ends."""

    def after(step: int) -> bool:
        if next(between_steps, _END) is _END:
            raise _Measured
        return False

    threads = torch.get_num_threads()
    with contextlib.suppress(_Measured):
        distill_loop(job, replace(worker, preempted=after))
    torch.set_num_threads(threads)  # the loop may have set one for itself


_END = object()


class _Measured(Exception):
    """The loop has made enough steps."""


@torch.inference_mode()
def generation_row(bench: Bench) -> Row:
    """A class-conditional UNet of random weights, against the plain loop of denoising with the same batch: one image on
    CPUs, where ours makes each image alone."""
    try:
        from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
    except ImportError:
        return Row("generation", "images", note="diffusers is not installed")
    from raydistill.generation.generator import Generator, Request
    from raydistill.generation.pipelines import inspect_pipeline

    sizes, device, folder = bench.sizes, bench.meter.device, bench.data.root / "pipeline"
    precision = "bf16" if device.type == "cuda" else "fp32"
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=sizes.unet_side, block_out_channels=sizes.unet_channels, layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=CLASSES,
    )  # fmt: skip
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)
    settings = Generate(pipeline=str(folder), steps=sizes.unet_steps, guidance=1, dtype=precision)
    generator = Generator(settings, inspect_pipeline(settings), device)
    batch = settings.batch_size if device.type == "cuda" else 1
    requests = [Request(seed, "", seed % CLASSES, None, settings.steps, 1.0) for seed in range(batch)]
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet", torch_dtype=DTYPES[precision], low_cpu_mem_usage=False)
    unet.to(device)
    drawn, shape = [torch.Generator().manual_seed(seed) for seed in range(batch)], (1, 3, *[sizes.unet_side] * 2)
    noise = torch.cat([torch.randn(shape, generator=g, dtype=unet.dtype) for g in drawn]).to(device)
    labels, scheduler = torch.arange(batch, device=device) % CLASSES, DDIMScheduler()
    scheduler.set_timesteps(settings.steps)

    def ours() -> np.ndarray:
        return np.stack([np.asarray(picture.image) for picture in generator.pictures(requests)])

    def bare() -> torch.Tensor:
        x_BCSS = noise
        for t in scheduler.timesteps:
            x_BCSS = scheduler.step(unet(x_BCSS, t, class_labels=labels).sample, t, x_BCSS).prev_sample
        return ((x_BCSS.float() / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)

    rates = bench.meter.rates(ours, bare)
    share, waits = flops(bare) * rates[0] / bench.peaks[precision], bench.meter.waits(ours) / settings.steps
    return Row("generation", "images", *(batch * rate for rate in rates), share, waits, apart(ours(), bare()))

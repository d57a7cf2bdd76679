"""distill: the student learns from labels and soft targets. The loop is one function, `distill_loop`.

Shapes: V images of this worker's share of a batch, H working pixels, P parameters of a view, D features, C classes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raydistill.config import Distill, RunConfig
from raydistill.data.sample import SampleSet, Visits, batch_order
from raydistill.data.targets import UNLABELLED, Batch, InMemory, Streamed, TrainSplit, read_bytes
from raydistill.data.views import render
from raydistill.errors import DivergedError, StageError
from raydistill.infra.artifacts import StageDirectory, write_bytes
from raydistill.infra.checkpoints import Checkpoint, latest_checkpoint, latest_step, save_checkpoint
from raydistill.infra.cluster import Plan, Worker, run_workers
from raydistill.infra.progress import Progress
from raydistill.losses.total import Outputs, distillation_loss
from raydistill.models.student import ProjectionHead, Student, build_student, split_logits
from raydistill.models.teacher import LinearHead, load_head
from raydistill.stages.teach import fresh_views

_BATCHES_AHEAD = 4
# Steps whose images one Ray task gathers for the stream of fresh views.
_STEPS_IN_UNIT = 8
_SECONDS_BETWEEN_REPORTS = 1.0
_MOST_SKIPPED_STEPS = 20
# Share of the free memory that `cache: auto` lets the train split take.
_MEMORY_SHARE = 0.25


@dataclass(frozen=True)
class DistillJob:
    """All that a worker needs to know, in a form that travels between processes."""

    config: RunConfig
    samples: SampleSet
    path: str
    head: str | None  # the directory of `adapt`; None: no teacher
    targets: str | None  # the directory of `teach`; None: no teacher, or fresh views

    @property
    def batch_size(self) -> int:
        """No larger than the images that take part: a batch need not hold an image twice."""
        with_teacher = self.config.loss.needs_teacher
        usable = self.samples.num_rows("train") if with_teacher else self.samples.num_labelled["train"]
        return min(self.config.distill.batch_size, usable)

    @property
    def steps_per_epoch(self) -> int:
        """From the size of the train split alone, so all workers agree on it, and so do runs with and without a
        teacher."""
        return max(1, self.samples.num_rows("train") // self.batch_size)

    @property
    def total_steps(self) -> int:
        return self.config.distill.epochs * self.steps_per_epoch

    @property
    def train_split(self) -> TrainSplit:
        return TrainSplit(self.samples, self.targets, self.config.views, self.config.seed)

    def order(self, labels: list[np.ndarray], start_step: int) -> Iterator[Visits]:
        """The global batches from `start_step` on. Without a teacher only labelled images are drawn."""
        labelled = [np.flatnonzero(shard != UNLABELLED) for shard in labels]
        others = [np.flatnonzero(shard == UNLABELLED) for shard in labels]
        num_labelled, num_others = sum(map(len, labelled)), sum(map(len, others))
        share = self.config.distill.labelled_share
        if share is None:
            share = num_labelled / (num_labelled + num_others)
        if not self.config.loss.needs_teacher or not num_others:
            share = 1.0
        return batch_order(labelled, others, share, self.batch_size, self.config.seed, start_step)


@dataclass(frozen=True)
class StudentCheckpoint:
    """What `distill` leaves behind: `student.safetensors` (timm's keys), `student.json`, and each epoch's record."""

    path: str
    val_accuracy: float | None
    num_parameters: int
    steps: int
    batch_size: int


def distill_student(
    job: DistillJob,
    directory: StageDirectory,
    plan: Plan,
    progress: Progress,
    on_epoch: Callable[[dict[str, float]], None],
) -> StudentCheckpoint:
    """Train the student, in this process or on Ray Train workers, and write it in the form in which it ships.

    `on_epoch` gets each epoch's record as it is written. A directory that a killed run left is gone on with.
    """
    directory.begin()
    stream = FreshStream(job, plan) if job.config.views.per_image == "fresh" and job.head is not None else None
    with _following(job, directory, progress, on_epoch):
        record = run_workers(distill_loop, job, plan, f"{directory.path}/ray", job.config.distill.max_failures, stream)
    num_parameters = _write_student(job, directory)
    result = StudentCheckpoint(
        directory.path, record.get("val_accuracy"), num_parameters, job.total_steps, job.batch_size
    )
    directory.finish(asdict(result))
    for leftover in ("checkpoints", "ray"):
        if directory.fs.exists(f"{directory.path}/{leftover}"):
            directory.fs.rm(f"{directory.path}/{leftover}", recursive=True)
    return result


def _write_student(job: DistillJob, directory: StageDirectory) -> int:
    checkpoint = latest_checkpoint(job.path)
    assert checkpoint is not None, "the loop ends with a checkpoint"
    prefix = "ema.network." if job.config.distill.ema_decay else "model.student.network."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint[0].items() if k.startswith(prefix)}
    student = build_student(job.config.student.model_copy(update={"init": "random"}), len(job.samples.classes))
    student.network.load_state_dict(weights)
    directory.write("student.safetensors", save(weights))
    directory.write_json(
        "student.json",
        {
            "model": job.config.student.model,
            "classes": job.samples.classes,
            "preprocessing": asdict(student.preprocessing),
            "image": {"size": job.config.images.size, "fit": job.config.images.fit},
        },
    )
    return sum(p.numel() for p in student.parameters())


def load_student(path: str, config: RunConfig, num_classes: int) -> Student:
    """The student that a finished `distill` wrote, in eval mode."""
    student = build_student(config.student.model_copy(update={"init": "random", "weights": None}), num_classes)
    student.network.load_state_dict(load(read_bytes(f"{path}/student.safetensors")))
    return student.eval()


@contextlib.contextmanager
def _following(
    job: DistillJob, directory: StageDirectory, progress: Progress, on_epoch: Callable[[dict[str, float]], None]
) -> Iterator[None]:
    """Shows and passes on what the loop writes, from wherever it runs, until the block ends."""
    start = latest_step(job.path)
    ended = threading.Event()
    with progress.task("distill", job.total_steps, "steps", done=start) as advance:

        def follow() -> None:
            at, epoch = start, start // job.steps_per_epoch
            while True:
                last_look = ended.wait(_SECONDS_BETWEEN_REPORTS)
                while directory.fs.exists(f"{job.path}/epochs/{epoch + 1:05d}.json"):
                    epoch += 1
                    record = json.loads(directory.fs.cat_file(f"{job.path}/epochs/{epoch:05d}.json"))
                    on_epoch(record)
                    advance(max(int(record["step"]) - at, 0), _note(record))
                    at = max(int(record["step"]), at)
                if directory.fs.exists(f"{job.path}/progress.json"):
                    step = int(json.loads(directory.fs.cat_file(f"{job.path}/progress.json"))["step"])
                    advance(max(step - at, 0))
                    at = max(step, at)
                if last_look:
                    return

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _note(record: dict[str, float]) -> str:
    accuracy = f", val {record['val_accuracy']:.3f}" if "val_accuracy" in record else ""
    return f"epoch {int(record['epoch'])}, loss {record['loss']:.3f}{accuracy}"


class FreshStream:
    """Makes Ray's stream of fresh views from wherever training stands when its workers start."""

    def __init__(self, job: DistillJob, plan: Plan) -> None:
        self._job, self._plan = job, plan

    def __call__(self) -> Any:
        job = self._job
        assert job.config.teacher is not None
        units = [
            {"first": first, "steps": min(_STEPS_IN_UNIT, job.total_steps - first)}
            for first in range(latest_step(job.path), job.total_steps, _STEPS_IN_UNIT)
        ]
        # Nothing is left to stream where a run was killed after its last step; a plan needs a row all the same.
        return fresh_views(job.config.teacher, _GatherUnit(job), units or [{"first": 0, "steps": 1}], self._plan)


class _GatherUnit:
    """A Ray Data task: the images and views of some steps' global batches."""

    def __init__(self, job: DistillJob) -> None:
        self._job, self._labels = job, job.train_split.labels()

    def __call__(self, unit: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        source, order = Streamed(self._job.train_split, 1), self._job.order(self._labels, int(unit["first"][0]))
        visits = Visits.concat(list(itertools.islice(order, int(unit["steps"][0]))))
        batch = source.gather(visits)
        return {
            "image": batch.images_VHHC,
            "parameters": batch.parameters_VP,
            "label": batch.labels_V,
            "sample_id": np.array(source.ids(visits)),
        }


class Trainee(nn.Module):
    """The student with the projection heads of both sides, and the teacher's linear head, which does not learn."""

    def __init__(self, job: DistillJob) -> None:
        super().__init__()
        self.student: Student = build_student(job.config.student, len(job.samples.classes))
        head = None if job.head is None else load_head(job.head)
        self.student_projection = self.teacher_projection = None
        if head is not None:
            self._keep(head)
            if job.config.loss.needs_projection:
                dim = job.config.loss.projection_dim
                self.student_projection = ProjectionHead(self.student.num_features, dim)
                self.teacher_projection = ProjectionHead(head.weight_CD.shape[1], dim)

    def _keep(self, head: LinearHead) -> None:
        self.register_buffer("head_weight", torch.from_numpy(head.weight_CD), persistent=False)
        self.register_buffer("head_bias", torch.from_numpy(head.bias_C), persistent=False)

    def forward(self, images: torch.Tensor, features_VD: torch.Tensor | None) -> tuple[Outputs, Outputs | None]:
        logits_VC, student_features = self.student(images)
        student_projection, teacher_projection = self.student_projection, self.teacher_projection
        student = Outputs(logits_VC, student_projection and student_projection(student_features))
        if features_VD is None:
            return student, None
        with torch.autocast(images.device.type, enabled=False):
            teacher_logits = torch.nn.functional.linear(features_VD, self.head_weight, self.head_bias)
        return student, Outputs(teacher_logits, teacher_projection and teacher_projection(features_VD))


def distill_loop(job: DistillJob, worker: Worker) -> dict[str, float]:
    """Train from the last checkpoint to the last epoch, and return that epoch's record.

    Everything random is a function of the seed and the step, so a resumed run equals an unbroken one.
    """
    config, settings, device = job.config, job.config.distill, torch.device(worker.device)
    torch.set_num_threads(worker.threads)
    torch.manual_seed(config.seed)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    trainee = Trainee(job).to(device, memory_format=layout)
    ema = ModelEmaV3(trainee.student, decay=settings.ema_decay) if settings.ema_decay else None
    optimizer = _optimizer(settings, trainee)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    step, sums, record = _resume(job, trainee, ema, optimizer, scaler)
    network = DistributedDataParallel(trainee) if worker.size > 1 else trainee
    autocast = torch.autocast(device.type, _DTYPES[settings.precision], enabled=settings.precision != "fp32")
    reporter = _Reporter(job, worker)
    trainee.train()
    for batch in _batches(job, worker, step):
        torch.manual_seed(_step_seed(config.seed, step, worker.rank))  # dropout and its like
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, job.steps_per_epoch)
        images, parameters, labels, features = (_to(device, array) for array in batch.arrays())
        views = render(images, parameters, trainee.student.preprocessing).contiguous(memory_format=layout)
        with autocast:
            student, teacher = network(views, None if features is None else features.float())
        loss, terms = distillation_loss(config.loss, student, teacher, labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trainee.parameters(), settings.clip_norm or math.inf)
        reporter.refuse_not_finite(step, norm, scaler, {"loss": loss, **terms})
        scaler.step(optimizer)
        scaler.update()
        if ema is not None:
            ema.update(trainee.student)
        step += 1
        for name, value in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        ended = step % job.steps_per_epoch == 0
        if ended:
            record = reporter.end_epoch(step, sums, ema.module if ema else trainee.student, optimizer)
            sums = {}
        if (ended or worker.preempted(step)) and worker.rank == 0:
            save_checkpoint(job.path, Checkpoint(step, trainee, ema, optimizer, scaler, sums, record))
        reporter.progress(step)
    if step < job.total_steps or record is None:
        raise StageError(f"distill: the images ran out at step {step} of {job.total_steps}; run the same command again")
    return record


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _optimizer(settings: Distill, trainee: nn.Module) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(trainee.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        trainee.parameters(), settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def learning_rate(settings: Distill, step: int, steps_per_epoch: int) -> float:
    """The rate of a step: a linear rise from zero, then constant or half a cosine down to zero (arXiv 1608.03983)."""
    warmup, total = settings.warmup_epochs * steps_per_epoch, settings.epochs * steps_per_epoch
    if step < warmup:
        return settings.learning_rate * (step + 1) / math.ceil(warmup)
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - warmup) / max(total - warmup, 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def _resume(
    job: DistillJob, trainee: Trainee, ema: Any, optimizer: torch.optim.Optimizer, scaler: Any
) -> tuple[int, dict[str, float], dict[str, float] | None]:
    checkpoint = latest_checkpoint(job.path)
    if checkpoint is None:
        return 0, {}, None
    weights, state, meta = checkpoint
    trainee.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    if ema is not None:
        ema.module.load_state_dict({k.removeprefix("ema."): v for k, v in weights.items() if k.startswith("ema.")})
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return int(meta["step"]), dict(meta["sums"]), meta["record"]


def _to(device: torch.device, array: np.ndarray | None) -> Any:
    if array is None:
        return None
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())  # Ray's blocks are read-only
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class _Reporter:
    """Writes how training goes into the stage directory, where whoever waits for it looks."""

    def __init__(self, job: DistillJob, worker: Worker) -> None:
        self._job, self._worker = job, worker
        self._skipped = 0
        self._epoch_started = self._written = time.monotonic()

    def refuse_not_finite(self, step: int, norm: torch.Tensor, scaler: Any, terms: dict[str, torch.Tensor]) -> None:
        """The gradient is averaged over workers, so all of them see a bad one, and at the same step. The scaler of fp16
        skips a few such steps while it looks for its scale."""
        if bool(torch.isfinite(norm)):
            self._skipped = 0
            return
        self._skipped += 1
        if scaler.is_enabled() and self._skipped <= _MOST_SKIPPED_STEPS:
            return
        shown = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in terms.items())
        raise DivergedError(
            f"distill: the loss or its gradient is not finite at step {step} (epoch "
            f"{step // self._job.steps_per_epoch}): {shown}; lower distill.learning_rate, set distill.clip_norm=1, or "
            f"use distill.precision=fp32. The last good checkpoint stays in {self._job.path}/checkpoints"
        )

    def end_epoch(
        self, step: int, sums: dict[str, float], student: nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, float]:
        """The epoch's record: the mean of each term over all workers, and the val accuracy where it is due."""
        job, worker = self._job, self._worker
        steps, epoch = job.steps_per_epoch, step // job.steps_per_epoch
        values = torch.tensor([sums[name] for name in sorted(sums)], device=worker.device)
        if worker.size > 1:
            torch.distributed.all_reduce(values)
            values /= worker.size
        seconds = time.monotonic() - self._epoch_started
        record = {"epoch": float(epoch), "step": float(step), "images_per_second": job.batch_size * steps / seconds}
        record |= {name: float(value) / steps for name, value in zip(sorted(sums), values, strict=True)}
        record["learning_rate"] = optimizer.param_groups[0]["lr"]
        due = epoch % job.config.distill.val_every == 0 or step == job.total_steps
        if due and worker.rank == 0 and job.samples.num_rows("val"):
            device, size = torch.device(worker.device), job.config.evaluate.batch_size
            logits, labels = split_logits(student, job.samples, "val", device, size)
            record["val_accuracy"] = float((logits.argmax(1) == labels).mean())
        if worker.rank == 0:
            write_bytes(f"{job.path}/epochs/{epoch:05d}.json", json.dumps(record).encode())
        self._epoch_started = time.monotonic()  # measuring val is not training
        return record

    def progress(self, step: int) -> None:
        if self._worker.rank == 0 and time.monotonic() - self._written > _SECONDS_BETWEEN_REPORTS:
            self._written = time.monotonic()
            write_bytes(f"{self._job.path}/progress.json", json.dumps({"step": step}).encode())


def _batches(job: DistillJob, worker: Worker, step: int) -> Iterator[Batch]:
    """This worker's batches from `step` to the last, from the shards or from Ray's stream of fresh views."""
    left = job.total_steps - step
    if left <= 0:
        return iter(())
    source = read_batches(job, step, worker) if worker.stream is None else stream_batches(job, worker)
    if step == 0 and worker.rank == 0:
        source = _note_first(job, source)
    return itertools.islice(source, left)


def _note_first(job: DistillJob, source: Iterator[Batch]) -> Iterator[Batch]:
    """When training began is worth knowing: everything before it is fixed cost."""
    first = next(source)
    write_bytes(f"{job.path}/first_batch.json", json.dumps({"time": time.time()}).encode())
    yield first
    yield from source


def stream_batches(job: DistillJob, worker: Worker) -> Iterator[Batch]:
    """What the teacher pool sends: fresh views' features beside the images."""
    size = job.batch_size // worker.size
    for rows in worker.stream.iter_batches(batch_size=size, batch_format="numpy", prefetch_batches=2, drop_last=True):
        yield Batch(rows["image"], rows["parameters"], rows["label"], rows["features"])


def read_batches(job: DistillJob, first_step: int, worker: Worker) -> Iterator[Batch]:
    """This worker's share of every global batch from `first_step` on, prepared a few batches ahead in a thread."""
    split = job.train_split
    labels = split.labels()
    source = (InMemory if _fits_in_memory(job) else Streamed)(split, worker.threads)
    mine = (source.gather(visits[worker.rank :: worker.size]) for visits in job.order(labels, first_step))
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(next, mine) for _ in range(_BATCHES_AHEAD))
        try:
            while True:
                batch = ahead.popleft().result()
                ahead.append(pool.submit(next, mine))
                yield batch
        finally:  # the loop has ended: nobody will ask for these
            for future in ahead:
                future.cancel()


def _fits_in_memory(job: DistillJob) -> bool:
    cache = job.config.distill.cache
    if cache != "auto":
        return cache == "memory"
    import psutil  # comes with ray

    per_image = 0
    if job.targets is not None and job.head is not None and job.config.views.per_image != "fresh":
        per_image = 2 * job.config.views.per_image * load_head(job.head).weight_CD.shape[1]
    return job.train_split.num_bytes(per_image) < _MEMORY_SHARE * psutil.virtual_memory().available

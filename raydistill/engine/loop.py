"""The distillation loop: one function, `distill_loop`, that runs in this process or on each of Ray Train's workers.

Shapes: V images of this worker's share of a batch, D features, C classes.
"""

from __future__ import annotations

import copy
import json
import math
import time
from typing import Any

import numpy as np
import torch
from scipy.special import bdtrc
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raydistill.config import Distill
from raydistill.data.views import render
from raydistill.engine.batches import DistillJob, worker_batches
from raydistill.engine.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    bytes_to_write,
    does_not_fit,
    latest_checkpoint,
    note_lost_steps,
    write_progress,
)
from raydistill.engine.workers import Worker, keep_freed_memory
from raydistill.errors import DivergedError, StageError
from raydistill.losses.crd import ContrastiveMemory, Negatives
from raydistill.losses.total import Outputs, distillation_loss
from raydistill.models.from_transformers import TransformersClassifier
from raydistill.models.student import Adapter, ProjectionHead, Student, build_student, split_logits
from raydistill.models.teacher import load_head
from raydistill.storage.directory import refuse_small_disk
from raydistill.storage.filesystems import write_bytes

_SECONDS_BETWEEN_REPORTS = 1.0
_MOST_SKIPPED_STEPS = 20
# Of shipping another epoch than the last, though it is no better.
_LEVEL = 0.05
# Seconds between two checkpoints for each second that one takes to be written, however short `checkpoint_seconds` is.
_LEAST_GAP = 4.0


class Trainee(nn.Module):
    """The student with what only training sees: the projection heads of both sides, the adapter, and the teacher's
    linear head, which does not learn."""

    def __init__(self, job: DistillJob) -> None:
        super().__init__()
        loss = job.config.loss
        self.student: Student = build_student(job.config.student, len(job.samples.classes))
        if job.config.distill.body_rate == 0:
            self.student.freeze_body()
        head = None if job.head is None else load_head(job.head)
        self.student_projection = self.teacher_projection = self.adapter = None
        if head is not None:
            self.register_buffer("head_weight", torch.from_numpy(head.weight_CD), persistent=False)
            self.register_buffer("head_bias", torch.from_numpy(head.bias_C), persistent=False)
            width, teacher_width = self.student.num_features, head.weight_CD.shape[1]
            if loss.needs_projection:
                self.student_projection = ProjectionHead(loss.projection_head, width, loss.projection_dim)
                self.teacher_projection = ProjectionHead(loss.projection_head, teacher_width, loss.projection_dim)
            if loss.needs_adapter:
                self.adapter = Adapter(loss.adapter, width, teacher_width)

    def forward(self, images: torch.Tensor, features_VD: torch.Tensor | None) -> tuple[Outputs, Outputs | None]:
        logits_VC, student_VE = self.student(images)
        if features_VD is None:
            return Outputs(logits_VC), None
        adapted_VD = None if self.adapter is None else self.adapter(student_VE)
        with torch.autocast(images.device.type, enabled=False):
            teacher_logits_VC = self._head(features_VD)
            adapted_logits_VC = None if adapted_VD is None else self._head(adapted_VD.float())
        student_projected = self.student_projection and self.student_projection(student_VE)
        teacher_projected = self.teacher_projection and self.teacher_projection(features_VD)
        student = Outputs(logits_VC, student_VE, student_projected, adapted_VD, adapted_logits_VC)
        return student, Outputs(teacher_logits_VC, features_VD, teacher_projected)

    def _head(self, features_VD: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(features_VD, self.head_weight, self.head_bias)


class Kept(nn.Module):
    """The student of the best epoch on val so far. It is a part of each checkpoint, so it is always of the same moment
    as what training goes on with. `right` is which of the V labelled val images it knows."""

    def __init__(self, student: nn.Module, num_val: int) -> None:
        super().__init__()
        self.student = copy.deepcopy(student).requires_grad_(False)
        self.register_buffer("epoch", torch.tensor(0))
        self.register_buffer("right", torch.zeros(num_val, dtype=torch.bool))

    def offer(self, student: nn.Module, epoch: int, right_V: torch.Tensor) -> None:
        """Keep it if it is the best so far. Of equals the latest is kept: it has learnt longest, at the lowest rate."""
        if right_V.sum() >= self.right.sum():
            self.take(student, epoch, right_V)

    def take(self, student: nn.Module, epoch: int, right_V: torch.Tensor) -> None:
        self.student.load_state_dict(student.state_dict())
        self.epoch.fill_(epoch)
        self.right.copy_(right_V)

    def told_from(self, right_V: torch.Tensor, looks: int) -> bool:
        """Whether the images tell that it is better than what is right on `right_V`, though it is the best of so many:
        McNemar's exact test of one side, by Bonferroni."""
        only_kept, only_other = int((self.right & ~right_V).sum()), int((right_V & ~self.right).sum())
        # The binomial distribution's tail, without scipy.stats, which takes a worker a second to load.
        return bool(bdtrc(only_kept - 1, only_kept + only_other, 0.5) <= _LEVEL / looks)


def distill_loop(job: DistillJob, worker: Worker) -> dict[str, float]:
    """Train from the last checkpoint to the last epoch, and return that epoch's record.

    A record's `kept_epoch` is the epoch that would ship if training ended with it, once one was measured.

    Everything random is a function of the seed and the step, so a resumed run equals an unbroken one.
    """
    config, settings, device = job.config, job.config.distill, torch.device(worker.device)
    torch.set_num_threads(worker.threads)
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    trainee = Trainee(job).to(device, memory_format=layout)
    ema = ModelEmaV3(trainee.student, decay=settings.ema_decay) if settings.ema_decay else None
    remembers = "crd" in config.loss.terms
    memory = ContrastiveMemory(config.loss.crd_memory, config.loss.projection_dim).to(device) if remembers else None
    student_now = trainee.student if ema is None else ema.module
    # Rank 0 alone measures val.
    kept = Kept(student_now, job.samples.num_rows("val")) if job.looks_at_val and worker.rank == 0 else None
    modules = _present(model=trainee, ema=None if ema is None else ema.module, memory=memory, kept=kept)
    optimizer = _optimizer(settings, trainee)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    step, partial, record = _resume(job, modules, optimizer, scaler)
    # Models of transformers may hold a token for masked pictures, which never gets a gradient.
    idle = isinstance(trainee.student.body, TransformersClassifier)
    network = DistributedDataParallel(trainee, find_unused_parameters=idle) if worker.size > 1 else trainee
    autocast = torch.autocast(device.type, _DTYPES[settings.precision], enabled=settings.precision != "fp32")
    if worker.rank == 0:
        need = bytes_to_write(job.path, modules, optimizer)
        refuse_small_disk(config, "distill: its checkpoints", need, "choose another workspace")
    reporter = _Reporter(job, worker, step, partial)
    trainee.train()
    with CheckpointWriter(job.path) as checkpoints:
        for batch in worker_batches(job, worker, step):
            torch.manual_seed(_step_seed(config.seed, step, worker.rank))  # dropout and its like
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * learning_rate(settings, step, job.steps_per_epoch)
            images, parameters, labels, features, rows, weights = (_to(device, array) for array in batch.arrays())
            views = render(images, parameters, trainee.student.preprocessing).contiguous(memory_format=layout)
            with autocast:
                student, teacher = network(views, None if features is None else features.float())
            negatives = memory and _negatives(memory, job, worker, step, student, teacher, rows, labels)
            done = step / job.total_steps
            loss, terms = distillation_loss(config.loss, student, teacher, labels, done, negatives, weights)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = _clip(trainee, settings.clip_norm)
            reporter.refuse_not_finite(step, norm, scaler, {"loss": loss, **terms})
            scaler.step(optimizer)
            scaler.update()
            if ema is not None:
                ema.update(trainee.student)
            step += 1
            reporter.saw(len(labels), {"loss": loss, **terms})
            ended, preempted = step % job.steps_per_epoch == 0, worker.preempted(step)
            if ended:
                record = reporter.end_epoch(step, student_now, kept, optimizer)
            if worker.rank == 0 and (preempted or reporter.checkpoint_due(step, ended, checkpoints.seconds)):
                checkpoints.save(Checkpoint(step, modules, optimizer, scaler, reporter.partial_epoch(), record))
                if preempted:
                    checkpoints.wait()  # the node may be gone a moment later
            if ended and record is not None:
                worker.on_epoch(record)
            reporter.progress(step)
    if step < job.total_steps or record is None:
        raise StageError(f"distill: the images ran out at step {step} of {job.total_steps}; run the same command again")
    return record


def _present(**modules: nn.Module | None) -> dict[str, nn.Module]:
    return {name: module for name, module in modules.items() if module is not None}


def _clip(trainee: Trainee, most: float | None) -> torch.Tensor:
    """The norm of the gradient, which is then made no longer than `most`; where nothing is clipped it is left alone."""
    norm = nn.utils.get_total_norm([p.grad for p in trainee.parameters() if p.grad is not None])
    if most is not None:
        nn.utils.clip_grads_with_norm_(trainee.parameters(), most, norm)
    return norm


def _negatives(
    memory: ContrastiveMemory, job: DistillJob, worker: Worker, step: int,
    student: Outputs, teacher: Outputs, rows: torch.Tensor, labels: torch.Tensor,
) -> Negatives:  # fmt: skip
    """Put the global batch, whose share is given, into the memory, and draw what this share is told apart from."""
    loss = job.config.loss
    mine = (student.projected_BP, teacher.projected_BP, rows, labels)
    everyone = mine if worker.size == 1 else tuple(_gather(tensor, worker) for tensor in mine)
    memory.put(*(tensor.detach() for tensor in everyone))
    share = slice(worker.rank, None, worker.size)
    seed = [job.config.seed, step]
    return memory.draw(loss.crd_negatives, everyone[2], everyone[3], share, seed, loss.contrastive_temperature)


def _gather(mine: torch.Tensor, worker: Worker) -> torch.Tensor:
    """The global batch from the shares of all workers, in the order of one: row i of worker r is row i * size + r.

    Shares differ by one row at most, so the shorter ones are filled up and the filling is left out again.
    """
    count = torch.tensor([len(mine)], device=mine.device)
    counts = [torch.empty_like(count) for _ in range(worker.size)]
    torch.distributed.all_gather(counts, count)
    longest = max(int(c) for c in counts)
    filled = torch.cat([mine.detach(), mine.new_zeros(longest - len(mine), *mine.shape[1:])]).contiguous()
    shares = [torch.empty_like(filled) for _ in range(worker.size)]
    torch.distributed.all_gather(shares, filled)
    taken = torch.arange(longest, device=mine.device)[:, None] < torch.cat(counts)
    return torch.stack(shares, dim=1)[taken]


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _optimizer(settings: Distill, trainee: Trainee) -> torch.optim.Optimizer:
    """Each group keeps its rate relative to the schedule's under `rate`."""
    body = trainee.student.body_parameters()
    of_body = {id(parameter) for parameter in body}
    others = [parameter for parameter in trainee.parameters() if id(parameter) not in of_body]
    groups = [{"params": others, "rate": 1.0}]
    if settings.body_rate > 0:
        groups.append({"params": body, "rate": settings.body_rate})
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, rate, weight_decay=decay)
    return torch.optim.SGD(groups, rate, momentum=settings.momentum, weight_decay=decay)


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
    job: DistillJob, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, scaler: Any
) -> tuple[int, dict[str, float], dict[str, float] | None]:
    checkpoint = latest_checkpoint(job.path)
    if checkpoint is None:
        return 0, {}, None
    weights, state, meta = checkpoint
    try:
        for name, module in modules.items():
            own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
            module.load_state_dict(own)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:  # of other names, shapes and groups
        raise does_not_fit(job.path, meta, error) from None
    return int(meta["step"]), dict(meta["sums"]), meta["record"]


def _to(device: torch.device, array: np.ndarray | None) -> Any:
    if array is None:
        return None
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())  # Ray's blocks are read-only
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class _Reporter:
    """Writes how training goes into the stage directory, where whoever waits for it looks."""

    def __init__(self, job: DistillJob, worker: Worker, first_step: int, partial: dict[str, float]) -> None:
        self._job, self._worker = job, worker
        self._skipped = 0
        self._written = self._saved = time.monotonic()
        self._begin_epoch(partial)
        if worker.rank == 0:
            self._lost_steps = note_lost_steps(job.path, first_step)

    def _begin_epoch(self, partial: dict[str, float]) -> None:
        """`partial` is of the epoch's steps before the checkpoint that is gone on from."""
        self._sums = dict(partial)
        self._started = time.monotonic() - self._sums.pop("seconds", 0.0)

    def partial_epoch(self) -> dict[str, float]:
        """Sums over the steps of the epoch so far, and over all workers: `images`, `seconds`, the terms' means."""
        return self._sums and {**self._sums, "seconds": time.monotonic() - self._started}

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

    def saw(self, images: int, terms: dict[str, torch.Tensor]) -> None:
        """A step of this worker. The sums are those of all workers at once, so that a checkpoint may come at any."""
        values = torch.tensor([float(value.detach()) for value in terms.values()] + [images], dtype=torch.float64)
        if self._worker.size > 1:
            on_device = values.to(self._worker.device)
            torch.distributed.all_reduce(on_device)
            values = on_device.cpu()
            values[:-1] /= self._worker.size
        for name, value in zip([*terms, "images"], values.tolist(), strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + value

    def end_epoch(
        self, step: int, student: nn.Module, kept: Kept | None, optimizer: torch.optim.Optimizer
    ) -> dict[str, float]:
        """The epoch's record: the images that all workers saw, the mean of each term over them, and the val accuracy
        where it is due."""
        job, worker, sums = self._job, self._worker, self.partial_epoch()
        epoch, images, seconds = step // job.steps_per_epoch, sums.pop("images"), sums.pop("seconds")
        record = {"epoch": float(epoch), "step": float(step), "images_per_second": images / max(seconds, 1e-9)}
        record["images"] = images
        record |= {name: sums[name] / job.steps_per_epoch for name in sorted(sums)}
        record["learning_rate"] = optimizer.param_groups[0]["lr"]
        due = epoch % job.config.distill.val_every == 0 or step == job.total_steps
        if due and worker.rank == 0 and job.samples.num_rows("val"):
            device, size = torch.device(worker.device), job.config.evaluate.batch_size
            logits, labels = split_logits(student, job.samples, "val", device, size)
            right = torch.from_numpy(logits.argmax(1) == labels)
            record["val_accuracy"] = float(right.double().mean())
            if kept is not None:
                kept.offer(student, epoch, right)
                looks = -(-epoch // job.config.distill.val_every)
                is_told = job.config.distill.keep == "best" or kept.told_from(right, looks)
                if not is_told and step == job.total_steps:
                    kept.take(student, epoch, right)
                record["kept_epoch"] = float(kept.epoch if is_told else epoch)
        if worker.rank == 0:
            write_bytes(f"{job.path}/epochs/{epoch:05d}.json", json.dumps(record).encode())
            write_progress(job.path, step, self._lost_steps)
        self._begin_epoch({})  # measuring val is not training
        return record

    def checkpoint_due(self, step: int, ended: bool, took: float) -> bool:
        """After the last step, and by time; `took` are the seconds in which the last one was written, which may not
        take most of the time."""
        now, job = time.monotonic(), self._job
        seconds = job.config.distill.checkpoint_seconds
        due = ended if seconds == 0 else now - self._saved >= max(seconds, _LEAST_GAP * took)
        due = due or step == job.total_steps
        self._saved = now if due else self._saved
        return due

    def progress(self, step: int) -> None:
        if self._worker.rank == 0 and time.monotonic() - self._written > _SECONDS_BETWEEN_REPORTS:
            self._written = time.monotonic()
            write_progress(self._job.path, step, self._lost_steps)

"""The distillation loop: one function, `distill_loop`, that runs in this process or on each Ray Train worker.

Shapes: V images of this worker's share of a batch, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raydistill.config import Distill
from raydistill.data.device import to_device
from raydistill.engine.batches import DistillJob, worker_batches
from raydistill.engine.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    bytes_to_write,
    does_not_fit,
    latest_checkpoint,
)
from raydistill.engine.distillation_model import DistillationModel
from raydistill.engine.optimizer import new_optimizer
from raydistill.engine.precision import student_precision
from raydistill.engine.replicas import replicas_of
from raydistill.engine.reporter import Reporter
from raydistill.engine.val import ValLooks
from raydistill.engine.workarounds import keep_freed_memory
from raydistill.engine.workers import Worker
from raydistill.errors import StageError
from raydistill.identity import student_pin
from raydistill.losses.crd import ContrastiveMemory, Negatives
from raydistill.losses.task import ClassWeights, label_weight
from raydistill.losses.total import distillation_loss
from raydistill.models.autocast import autocast
from raydistill.models.from_transformers import TransformersClassifier
from raydistill.storage.directory import refuse_small_disk


def distill_loop(job: DistillJob, worker: Worker) -> dict[str, float]:
    """Train from the last checkpoint to the last epoch, and return that epoch's record.

    A record's `kept_epoch` is the epoch that would ship if training ended there, once val is measured; that of the
    epoch at which `distill.patience` ends training has `not_risen_since`. The seed and the step decide all random
    numbers, so a resumed run equals an unbroken one. Raises StageError (the images run out), DivergedError,
    CheckpointError, and ConfigError (the disk is too small).
    """
    config, settings, device = job.config, job.config.distill, torch.device(worker.device)
    torch.manual_seed(config.seed)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    model = DistillationModel(job).to(device, memory_format=layout)
    precision = _threads_and_precision(job, worker, model, layout)
    ema = _averaged(settings, model)
    remembers = "crd" in config.loss.terms
    memory = ContrastiveMemory(config.loss.crd_memory, config.loss.projection_dim).to(device) if remembers else None
    val = ValLooks(job, worker, model.student, None if ema is None else ema.module)
    parts = {"model": model, "ema": None if ema is None else ema.module, "memory": memory, "kept": val.best}
    modules = {name: module for name, module in parts.items() if module is not None}
    optimizer = new_optimizer(settings, model)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    step, partial, record = _resume(job, modules, optimizer, scaler)
    val.resume(step)
    assert config.loss.weighs_classes == (job.class_weights is not None), "distill_student counts the labels"
    weights_C = None if job.class_weights is None else torch.tensor(job.class_weights, device=device)
    if weights_C is None and worker.size > 1 and "task" in config.loss.terms:
        # Workers' shares have other counts of labels.
        weights_C = torch.ones(len(job.samples.classes), device=device)
    # transformers models may have a mask token, which never gets a gradient.
    idle = isinstance(model.student.body, TransformersClassifier)
    network = DistributedDataParallel(model, find_unused_parameters=idle) if worker.size > 1 else model
    if worker.rank == 0:
        need = bytes_to_write(job.path, modules, optimizer)
        refuse_small_disk(config, "distill: its checkpoints", need, "choose another workspace")
    reporter = Reporter(job, worker, step, partial, scaler.is_enabled())
    reporter.is_over = step == job.total_steps or (record is not None and "not_risen_since" in record)
    model.train()
    with CheckpointWriter(job.path) as checkpoints:
        for batch in () if reporter.is_over else reporter.timed(worker_batches(job, worker, step)):
            torch.manual_seed(_step_seed(config.seed, step, worker.rank))  # for dropout and the like
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * learning_rate(settings, step, job.steps_per_epoch)
            images, labels, features, rows, weights = (_to(device, array) for array in batch.arrays())
            parameters = torch.from_numpy(np.array(batch.parameters_VP))
            views = model.render(images, parameters).contiguous(memory_format=layout)
            with autocast(device, precision):
                student, teacher = network(views, None if features is None else features.float())
            negatives = memory and _negatives(
                memory, job, worker, step, (student.projected_BP, teacher.projected_BP, rows, labels), batch.places_V
            )
            # The gradient is the mean over workers, whose shares of a batch may differ.
            share = 1.0 if batch.places_V is None else len(labels) * worker.size / job.batch_size
            classes, done = _class_weights(weights_C, labels, worker, share), step / job.total_steps
            loss, terms = distillation_loss(config.loss, student, teacher, labels, done, negatives, weights, classes)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss * share).backward()
            scaler.unscale_(optimizer)
            norm = _clip(model, settings.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            step += 1
            if ema is not None:
                ema.update(model.student, step)
            reporter.count(step, len(labels), norm, {"loss": loss, **terms})
            ended, preempted = step % job.steps_per_epoch == 0, worker.preempted(step)
            if ended:
                record = reporter.end_epoch(step, val, optimizer)
            due = worker.rank == 0 and (preempted or reporter.checkpoint_due(step, ended, checkpoints.seconds))
            if due and reporter.is_finite():
                checkpoints.save(Checkpoint(step, modules, optimizer, scaler, reporter.partial_epoch(), record))
                if preempted:
                    checkpoints.wait()  # the node may be lost at any moment
            if ended and record is not None:
                worker.on_epoch(record)
            reporter.progress(step)
            if reporter.is_over:
                break
    if not reporter.is_over or record is None:
        raise StageError(f"distill: the images ran out at step {step} of {job.total_steps}; run the same command again")
    return record


def _threads_and_precision(
    job: DistillJob, worker: Worker, model: DistillationModel, layout: torch.memory_format
) -> str:
    """Set how many threads compute a step, and return its precision."""
    device, share = torch.device(worker.device), max(job.batch_size // worker.size, 1)
    torch.set_num_threads(worker.threads)
    if device.type == "cpu":
        keep_freed_memory()
    can_share = device.type == "cpu" and 1 < worker.threads <= share // 2
    replicas = replicas_of(model.student, worker.threads) if can_share else None
    asked, pin = job.config.distill.precision, student_pin(job.path.rpartition("/")[0], job.config)
    precision, model.replicas = student_precision(model.student, replicas, asked, pin, share, device, layout)
    torch.set_num_threads(1 if model.replicas else worker.threads)
    return precision


def _averaged(settings: Distill, model: DistillationModel) -> ModelEmaV3 | None:
    """The moving average of the student. timm's warm-up with this gamma and power lets the decay be (1 + n) / (10 + n)
    at most, n + 2 steps after the start (TensorFlow's ExponentialMovingAverage); the first step replaces the start."""
    if settings.ema_decay is None:
        return None
    return ModelEmaV3(model.student, decay=settings.ema_decay, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)


def _clip(model: DistillationModel, most: float | None) -> torch.Tensor:
    """Clip the gradient to the norm `most`, if given. Returns the norm before."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if most is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), most, norm)
    return norm


def _negatives(
    memory: ContrastiveMemory,
    job: DistillJob,
    worker: Worker,
    step: int,
    mine: Sequence[torch.Tensor],
    places_V: np.ndarray | None,
) -> Negatives:
    """Put the global batch into the memory, and draw negatives for this worker's share of it: `mine` holds the share's
    student and teacher projections, rows and labels, `places_V` where it is in the batch."""
    loss = job.config.loss
    if places_V is None:  # Ray's stream
        places_V = np.arange(worker.rank, len(mine[0]) * worker.size, worker.size)
    places = _to(mine[0].device, places_V)
    everyone = mine if worker.size == 1 else _gather(mine, places, worker)
    memory.put(*(tensor.detach() for tensor in everyone))
    seed = [job.config.seed, step]
    return memory.draw(loss.crd_negatives, everyone[2], everyone[3], places, seed, loss.contrastive_temperature)


def _gather(mine: Sequence[torch.Tensor], places: torch.Tensor, worker: Worker) -> list[torch.Tensor]:
    """The tensors of the global batch, from the shares of all workers and their places in it."""
    counts = _all_gather(torch.tensor([len(places)], device=places.device), worker)
    longest = max(int(count) for count in counts)

    def joined(share: torch.Tensor) -> torch.Tensor:
        """Shares differ in length, so it pads the shorter ones and drops the padding again."""
        padded = torch.cat([share.detach(), share.new_zeros(longest - len(share), *share.shape[1:])]).contiguous()
        parts = zip(_all_gather(padded, worker), counts, strict=True)
        return torch.cat([part[: int(count)] for part, count in parts])

    order = joined(places).argsort()
    return [joined(share)[order] for share in mine]


def _all_gather(tensor: torch.Tensor, worker: Worker) -> list[torch.Tensor]:
    everyone = [torch.empty_like(tensor) for _ in range(worker.size)]
    torch.distributed.all_gather(everyone, tensor)
    return everyone


def _class_weights(
    weights_C: torch.Tensor | None, labels_V: torch.Tensor, worker: Worker, share: float
) -> ClassWeights | None:
    """For this worker's share of a batch, `share` times as large as the mean share: divided by the weight of the whole
    batch, so that the mean over workers is that of one process."""
    if weights_C is None:
        return None
    divisor = label_weight(labels_V, weights_C)
    if worker.size > 1:
        torch.distributed.all_reduce(divisor)
        divisor = divisor * (share / worker.size)
    return ClassWeights(weights_C, divisor)


def learning_rate(settings: Distill, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step: linear warm-up from zero, then constant or half a cosine to 0 (arXiv 1608.03983)."""
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
        for group in optimizer.param_groups:
            group["fused"] = optimizer.defaults["fused"]  # whatever the checkpoint's was
        for parameter, moments in optimizer.state.items():
            for name, moment in moments.items():
                if moment is not None and moment.shape == parameter.shape:
                    # Fused steps need moments that lie in memory as their parameter does.
                    moments[name] = torch.empty_like(parameter).copy_(moment)
        scaler.load_state_dict(state["scaler"])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:  # from other names, shapes and groups
        raise does_not_fit(job.path, meta, error) from None
    return int(meta["step"]), dict(meta["sums"]), meta["record"]


def _to(device: torch.device, array: np.ndarray | torch.Tensor | None) -> Any:
    if array is None or isinstance(array, torch.Tensor):  # these are there
        return array
    return to_device(torch.from_numpy(array if array.flags.writeable else array.copy()), device)  # Ray's: read-only

"""Training reports: sums over the steps of an epoch, the record of an epoch, and when a checkpoint is due."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from raydistill.data.train_split import Batch
from raydistill.engine.batches import DistillJob
from raydistill.engine.records import note_lost_steps, seconds_between_looks, write_epoch, write_progress
from raydistill.engine.val import ValLooks
from raydistill.engine.workers import Worker
from raydistill.errors import DivergedError
from raydistill.runtime import metrics

_MOST_SKIPPED_STEPS = 20
_STEPS_BETWEEN_READS = 50  # of what stays on the device
# Least seconds between two checkpoints for each second of writing one, even with a shorter `checkpoint_seconds`.
_LEAST_GAP = 4.0


class Reporter:
    """Writes the progress of training to the stage directory, for other processes to read."""

    def __init__(
        self, job: DistillJob, worker: Worker, first_step: int, partial: dict[str, float], skips: bool = False
    ) -> None:
        """`skips`: the scaler of fp16 leaves out some steps that are not finite, while it adapts its scale."""
        self._job, self._worker = job, worker
        self._most_skipped = _MOST_SKIPPED_STEPS if skips else 0
        self._written = self._saved = time.monotonic()
        self._names: list[str] = []
        self._state: torch.Tensor | None = None
        self.is_over = False
        self._begin_epoch(partial)
        if worker.rank == 0:
            self._lost_steps = note_lost_steps(job.path, first_step)

    def _begin_epoch(self, partial: dict[str, float]) -> None:
        """`partial` holds the sums of the epoch's steps before the checkpoint that training resumes from."""
        self._partial = dict(partial)
        self._resumed, self._waited = time.monotonic(), 0.0
        self._started = self._resumed - self._partial.pop("seconds", 0.0)
        if self._state is not None:
            self._state[0].zero_()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches. The time until each comes is a time in which training waits for data."""
        for asked in iter(time.monotonic, None):
            batch = next(batches, None)
            self._waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def count(self, step: int, images: int, norm: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        """Add the step that ends now, on the device: nothing waits for it but every `_STEPS_BETWEEN_READS` steps, and
        at the end of an epoch. The sums always cover all workers, so a checkpoint can follow any step.

        Raises DivergedError where the gradient of a step since the last look was not finite. It is the mean over
        workers, so all see it, and look, at the same step.
        """
        now = torch.stack([*(value.detach().double() for value in terms.values()), norm.detach().double()])
        sums = torch.cat([now[:-1] * images, now.new_full((1,), images)])
        if self._worker.size > 1:
            torch.distributed.all_reduce(sums)
        sums[:-1] /= sums[-1].clone()
        if self._state is None:
            self._names = [*terms, "images"]
            before = [self._partial.get(name, 0.0) for name in self._names]
            # Rows: the sums; the terms of the step that diverged; that step, steps skipped in a row.
            self._state = torch.zeros(3, len(before), dtype=torch.float64, device=now.device)
            self._state[0] = torch.tensor(before, dtype=torch.float64)
        total, diverged, at = self._state
        total += sums
        skipped = torch.where(torch.isfinite(now[-1]), 0.0, at[1] + 1)
        diverges = (skipped > self._most_skipped) & (at[0] == 0)
        diverged.copy_(torch.where(diverges, sums, diverged))
        at[0], at[1] = torch.where(diverges, step, at[0]), skipped
        if step % _STEPS_BETWEEN_READS == 0 or step % self._job.steps_per_epoch == 0:
            self._refuse_diverged()

    def is_finite(self) -> bool:
        """Whether no step has diverged; a checkpoint of one that has is worth nothing."""
        return self._state is None or float(self._state[2, 0]) == 0

    def _refuse_diverged(self) -> None:
        assert self._state is not None
        if self.is_finite():
            return
        step = int(self._state[2, 0]) - 1
        terms = zip(self._names[:-1], self._state[1].tolist(), strict=False)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in terms)
        raise DivergedError(
            f"distill: the loss or its gradient is not finite at step {step} (epoch "
            f"{step // self._job.steps_per_epoch}): {shown}; lower distill.learning_rate, set distill.clip_norm=1, or "
            f"use distill.precision=fp32. The last good checkpoint stays in {self._job.path}/checkpoints"
        )

    def partial_epoch(self) -> dict[str, float]:
        """Sums over the steps of the epoch so far, and over all workers: `images`, `seconds`, the terms' means."""
        sums = self._partial if self._state is None else dict(zip(self._names, self._state[0].tolist(), strict=True))
        return sums and {**sums, "seconds": time.monotonic() - self._started}

    def end_epoch(self, step: int, val: ValLooks, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """The epoch's record: the number of images of all workers, the share of time in which this worker waited for
        data, the mean of each term, and what val shows if it is due. From now on `is_over` says whether training ends
        here."""
        job, worker, sums = self._job, self._worker, self.partial_epoch()
        epoch, images, seconds = step // job.steps_per_epoch, sums.pop("images"), sums.pop("seconds")
        record = {"epoch": float(epoch), "step": float(step), "images_per_second": images / max(seconds, 1e-9)}
        record |= {"images": images, "waits_for_data": self._waited / max(time.monotonic() - self._resumed, 1e-9)}
        record |= {name: sums[name] / job.steps_per_epoch for name in sorted(sums)}
        record["learning_rate"] = optimizer.param_groups[0]["lr"]
        self.is_over = val.end_epoch(step, record)
        metrics.count("raydistill_seconds_waited_for_data", self._waited, "distill")
        if worker.rank == 0:
            write_epoch(job.path, record)
            write_progress(job.path, step, self._lost_steps)
        self._begin_epoch({})  # do not count the time that val took
        return record

    def checkpoint_due(self, step: int, ended: bool, took: float) -> bool:
        """After the last step, and by time. The last one `took` this many seconds; writing must not take most of the
        time."""
        now, seconds = time.monotonic(), self._job.config.distill.checkpoint_seconds
        due = ended if seconds == 0 else now - self._saved >= max(seconds, _LEAST_GAP * took)
        if due or self.is_over or step == self._job.total_steps:
            self._saved = now
            return True
        return False

    def progress(self, step: int) -> None:
        if self._worker.rank == 0 and time.monotonic() - self._written > seconds_between_looks(self._job.path):
            self._written = time.monotonic()
            write_progress(self._job.path, step, self._lost_steps)

"""Looks at val during training: which weights are measured, which ship, and when training stops.

Shapes: V labelled val images.
"""

from __future__ import annotations

import torch
from torch import nn

from raydistill.engine.batches import DistillJob
from raydistill.engine.distillation_model import BestStudent, is_better
from raydistill.engine.records import read_epochs
from raydistill.engine.workers import Worker
from raydistill.models.student import split_logits


class ValLooks:
    """Measures the student on val at the end of epochs, in the process of rank 0, and keeps the one that would ship."""

    def __init__(self, job: DistillJob, worker: Worker, student: nn.Module, averaged: nn.Module | None) -> None:
        self._job, self._worker, self._latest, self._averaged = job, worker, student, averaged
        ships = student if averaged is None else averaged
        keeps = job.looks_at_val and worker.rank == 0
        self.best = BestStudent(ships, job.samples.num_rows("val")) if keeps else None
        self._rose_at, self._highest = 0, -1.0

    def resume(self, step: int) -> None:
        """Read what the epochs up to this step measured."""
        if self._job.config.distill.patience is not None and self._worker.rank == 0 and step > 0:
            for record in read_epochs(self._job.path, step // self._job.steps_per_epoch):
                self._note(record)

    def end_epoch(self, step: int, record: dict[str, float]) -> bool:
        """Measure val if it is due, and add that to the epoch's record. Returns whether training stops, in all workers
        alike."""
        job, settings = self._job, self._job.config.distill
        epoch, is_last = step // job.steps_per_epoch, step == job.total_steps
        if not job.samples.num_rows("val") or not (epoch % settings.val_every == 0 or is_last):
            return is_last
        stops = False
        if self._worker.rank == 0:
            student, right = self._measure(epoch, record)
            self._note(record)
            stops = settings.patience is not None and epoch - self._rose_at >= settings.patience
            if stops and not is_last:
                record["not_risen_since"] = float(self._rose_at)
            if self.best is not None:
                self.best.offer(student, epoch, right)
                best_ships = settings.keep == "best" or self.best.is_better_than(right, self._looks(epoch))
                if not best_ships and (stops or is_last):
                    self.best.take(student, epoch, right)
                record["kept_epoch"] = float(self.best.epoch if best_ships else epoch)
        return is_last or (settings.patience is not None and self._heard_by_all(stops))

    def _measure(self, epoch: int, record: dict[str, float]) -> tuple[nn.Module, torch.Tensor]:
        """The student of this epoch, and which val images it has right: the averaged weights, or the latest ones where
        these are better by the rule of `distill.keep`."""
        student, right = self._latest, self._right(self._latest)
        if self._averaged is not None:
            averaged = self._right(self._averaged)
            record["val_accuracy_latest"], record["val_accuracy_averaged"] = _share(right), _share(averaged)
            match self._job.config.distill.keep:
                case "auto":
                    latest_ships = is_better(right, averaged, self._looks(epoch))
                case "best":
                    latest_ships = bool(right.sum() > averaged.sum())
                case "last":
                    latest_ships = False
            if not latest_ships:
                student, right = self._averaged, averaged
            record["is_averaged"] = float(not latest_ships)
        record["val_accuracy"] = _share(right)
        return student, right

    def _looks(self, epoch: int) -> int:
        """How often val was looked at up to this epoch: once for all weights that are measured."""
        measured = -(-epoch // self._job.config.distill.val_every)
        return measured if self._averaged is None else 2 * measured

    def _right(self, student: nn.Module) -> torch.Tensor:
        device, size = torch.device(self._worker.device), self._job.config.evaluate.batch_size
        own = torch.get_num_threads()
        torch.set_num_threads(self._worker.threads)  # in training, replicas of the student may have one each
        logits, labels = split_logits(student, self._job.samples, "val", device, size)
        torch.set_num_threads(own)
        return torch.from_numpy(logits.argmax(1) == labels)

    def _note(self, record: dict[str, float]) -> None:
        if record.get("val_accuracy", -1.0) > self._highest:
            self._rose_at, self._highest = int(record["epoch"]), record["val_accuracy"]

    def _heard_by_all(self, stops: bool) -> bool:
        if self._worker.size == 1:
            return stops
        told = torch.tensor(float(stops), device=self._worker.device)
        torch.distributed.broadcast(told, 0)
        return bool(told)


def _share(right_V: torch.Tensor) -> float:
    return float(right_V.double().mean())

"""Trainings of the tiny set in this process: whole ones, and those that end with the machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch

from raydistill.cluster.plan import plan_resources
from raydistill.engine import reporter
from raydistill.engine.batches import DistillJob
from raydistill.engine.checkpoints import latest_checkpoint
from raydistill.engine.loop import distill_loop
from raydistill.engine.workers import Worker
from raydistill.results import StudentCheckpoint
from raydistill.runtime.progress import Progress
from raydistill.stages.distill import distill_student
from raydistill.storage.directory import StageDirectory


def here(preempted: Callable[[int], bool] = lambda step: False) -> Worker:
    return Worker(0, 1, "cpu", 1, preempted)


def ends_at(last: int, announced: int | None = None) -> Callable[[int], bool]:
    """The machine's end as the loop sees it: nothing after this step happens. Ray may announce it at a step."""

    def preempted(step: int) -> bool:
        if step == last:
            raise KeyboardInterrupt
        return step == announced

    return preempted


def interrupt(job: DistillJob, last: int, announced: int | None = None) -> None:
    with pytest.raises(KeyboardInterrupt):
        distill_loop(job, here(ends_at(last, announced)))


def in_two_processes(job: DistillJob, kill_at: int | None = None) -> None:
    """The loop as Ray Train runs it: two workers that average their gradients. The machine may end after a step."""
    torch.multiprocessing.spawn(_as_rank, (job, kill_at, f"{job.path}/rendezvous-{kill_at}"), 2)


def _as_rank(rank: int, job: DistillJob, kill_at: int | None, rendezvous: str) -> None:
    reporter._LEAST_GAP = 0.0  # here too each step may end in a checkpoint
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    worker = Worker(rank, 2, "cpu", 1, ends_at(kill_at) if kill_at else lambda step: False)
    with contextlib.suppress(KeyboardInterrupt):
        distill_loop(job, worker)
    torch.distributed.destroy_process_group()


def distil(
    job: DistillJob, progress: Progress, on_epoch: Callable[[dict[str, float]], None] = lambda record: None
) -> StudentCheckpoint:
    plan = plan_resources(job.config, 2, 0, 1)
    return distill_student(job, StageDirectory(job.path, "distill", "{}"), plan, progress, on_epoch)


def weights(job: DistillJob) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(job.path)
    assert checkpoint is not None
    return checkpoint[0]


def assert_same(first: DistillJob, second: DistillJob) -> None:
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def untimed(record: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in record.items() if k not in ("images_per_second", "waits_for_data")}

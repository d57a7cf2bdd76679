"""Run a training loop in this process or on Ray Train workers."""

from __future__ import annotations

import contextlib
import os
import pickle
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raydistill.cluster.plan import Plan
from raydistill.cluster.session import configure_ray_data
from raydistill.engine.workarounds import trainer_without_signal_handler
from raydistill.errors import DivergedError, RaydistillError, StageError


@dataclass(frozen=True)
class Worker:
    """One process of a training loop: this process or a Ray Train worker."""

    rank: int
    size: int
    device: str
    threads: int
    preempted: Callable[[int], bool]  # is a node about to be lost? All workers ask at the same steps
    stream: Any = None  # a Ray Data iterator, if the data comes through Ray
    on_epoch: Callable[[dict[str, float]], None] = lambda record: None  # in this process; an error ends the loop
    workers_on_node: int = 1  # workers that share its memory, of this and other trainings, with this one


# A training loop takes the job and the worker, and returns the last record.
Loop = Callable[[Any, Worker], dict[str, float]]
_STEPS_BETWEEN_PREEMPTION_CHECKS = 10


def run_workers(
    loop: Loop,
    job: Any,
    plan: Plan,
    stream: Callable[[], Any] | None = None,
    on_epoch: Callable[[dict[str, float]], None] = lambda record: None,
) -> dict[str, float]:
    """Run a loop in this process or on Ray Train workers. Returns rank 0's result.

    `on_epoch` gets each epoch's record if the loop runs in this process. `stream()` makes the Dataset that feeds the
    workers, each time they start. Ray Train replaces lost workers; the loop resumes from its own checkpoints.
    Raises StageError.
    """
    if plan.train_workers == 0:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        shard = None if stream is None else stream().iterator()
        return loop(job, Worker(0, 1, device, plan.train_threads, lambda step: False, shard, on_epoch, plan.trainings))
    from ray.data import ExecutionOptions
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig

    # Workers stay in the command's directory, so that relative paths of the job work.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    resources = {"CPU": plan.train_cpus} | ({"GPU": plan.train_gpus} if plan.train_gpus else {})
    trainer = trainer_without_signal_handler()(
        _worker_loop,
        train_loop_config={
            # As bytes, so that Ray Train's controller does not load the models' libraries.
            "work": pickle.dumps((loop, job)),
            "threads": plan.train_threads,
            "folder": os.getcwd(),
            "streams": stream is not None,
            "trainings": plan.trainings,
        },
        scaling_config=ScalingConfig(
            num_workers=plan.train_workers, use_gpu=plan.train_gpus > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            # The loop has its own checkpoints, so no Ray Train run is restored: each gets a new name.
            name=uuid.uuid4().hex,
            **_storage(f"{job.path}/ray"),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=job.config.distill.max_failures, controller_failure_limit=3),
        ),
        datasets={} if stream is None else {"train": _StreamInController(stream)},
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
    )
    try:
        result: dict[str, Any] = trainer.fit().return_value
    except Exception as error:  # Ray wraps a worker's failure in its own classes
        raise StageError(f"distill: {_worker_failure(error)}") from error
    if "error" in result:
        raise StageError(result["error"])
    return dict(result)


def _storage(path: str) -> dict[str, Any]:
    """The directory of Ray Train's own files. Remote ones use our file system."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    from raydistill.storage.filesystems import open_filesystem

    fs, folder = open_filesystem(path)
    if fs.is_local:
        return {"storage_path": folder}
    return {"storage_path": folder, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


class _StreamInController:
    """Ray Train calls this in its controller, a separate process, whenever it starts workers."""

    def __init__(self, stream: Callable[[], Any]) -> None:
        self._stream = stream

    def __call__(self) -> Any:
        configure_ray_data()
        return self._stream()


def _worker_loop(config: dict[str, Any]) -> dict[str, Any]:
    """The function of each Ray Train worker. It returns a failure that a retry cannot fix, and raises others."""
    import ray.train
    import torch

    context, preempted_before = ray.train.get_context(), set[str]()

    def preempted(step: int) -> bool:
        if step % _STEPS_BETWEEN_PREEMPTION_CHECKS:
            return False
        notice = ray.train.get_preemption_info()  # a barrier
        nodes = set() if notice is None else set(notice.preempted_node_to_ranks)
        new = nodes - preempted_before
        preempted_before.update(nodes)
        return bool(new)

    worker = Worker(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=str(ray.train.torch.get_device()),
        threads=config["threads"],
        preempted=preempted,
        stream=ray.train.get_dataset_shard("train") if config["streams"] else None,
        workers_on_node=context.get_local_world_size() * config["trainings"],
    )
    torch.set_num_threads(config["threads"])
    with contextlib.suppress(OSError):  # another node may not have it
        os.chdir(config["folder"])
    loop, job = pickle.loads(config["work"])  # noqa: TID251 - what this command sent
    try:
        return dict(loop(job, worker))
    except RaydistillError as error:
        if worker.size > 1 and not isinstance(error, DivergedError):
            raise  # the other workers wait for this one, so Ray has to end all
        return {"error": str(error)}


def _worker_failure(error: Exception) -> str:
    """The last line of the first worker's traceback, with its rank."""
    failures = getattr(error, "worker_failures", None) or getattr(error.__cause__, "worker_failures", None)
    if not failures:
        return f"Ray Train failed: {_last_line(error)}"
    rank, cause = next(iter(failures.items()))
    return f"worker {rank} failed: {_last_line(cause)}"


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]

"""Ray: joining or starting a cluster, and the plan of who gets which share of it.

The plan is made before anything starts and proved to fit. On few CPUs Ray waits for ever when train workers, teacher
actors and the tasks that feed them together ask for more than there is; so they are given shares that add up.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import signal
import stat
import sys
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.config import RunConfig
from raydistill.errors import ConfigError, DivergedError, RaydistillError, StageError

# Below this share of a CPU a worker is starved rather than scheduled.
LEAST_SHARE = 0.25
# Keeps a laptop's memory for the networks: blocks in flight are a few megabytes.
OBJECT_STORE_BYTES = 512 * 1024**2


@dataclass(frozen=True)
class Plan:
    """Logical CPUs and GPUs of each actor, worker and task, and the threads torch may use in each."""

    cpus: float
    gpus: float
    decode_cpus: float
    load_cpus: float
    teacher_actors: tuple[int, int]
    teacher_cpus: float
    teacher_gpus: float
    teacher_threads: int
    generator_actors: tuple[int, int]  # (0, 0): nothing is generated
    generator_cpus: float
    generator_gpus: float
    train_workers: int | tuple[int, int]  # 0: in this process
    train_cpus: float
    train_gpus: float
    train_threads: int

    def describe(self) -> list[str]:
        """The plan in words, a line for each stage that uses Ray."""
        fewest, most = self.teacher_actors
        actors = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        share = f"{self.teacher_cpus:g} CPU" + (f" + {self.teacher_gpus:g} GPU" if self.teacher_gpus else "")
        lines = [
            f"machine: {self.cpus:g} CPUs, {self.gpus:g} GPUs",
            f"prepare: decoding tasks of {self.decode_cpus:g} CPU",
        ]
        if self.generator_actors[1]:
            few, many = self.generator_actors
            count = f"{few}" if few == many else f"{few} to {many}"
            gpu = f" + {self.generator_gpus:g} GPU" if self.generator_gpus else ""
            lines.append(f"generate: {count} generator actor(s) of {self.generator_cpus:g} CPU{gpu}")
        if most:
            lines.append(f"teach:   {actors} teacher actor(s) of {share}, fed by tasks of {self.load_cpus:g} CPU")
        if self.train_workers == 0:
            return [*lines, f"distill: in this process, {self.train_threads} thread(s)"]
        gpu = f" + {self.train_gpus:g} GPU" if self.train_gpus else ""
        workers = self.train_workers
        count = f"{workers[0]} to {workers[1]}" if isinstance(workers, tuple) else f"{workers}"
        return [
            *lines,
            f"distill: {count} worker(s) of {self.train_cpus:g} CPU{gpu}, {self.train_threads} thread(s) each",
        ]


def plan_resources(config: RunConfig, cpus: float, gpus: float, cores: int) -> Plan:
    """Shares for `cpus` logical CPUs and `gpus` GPUs; `cores` real ones decide about threads.

    What runs at once: teacher actors and a loading task in `teach`; with fresh views the train workers as well. Raises
    ConfigError with the sum where even the smallest shares do not fit.
    """
    workers = config.distill.num_workers
    fewest_workers = workers[0] if isinstance(workers, tuple) else workers
    fewest, most = config.cluster.teacher_actors if config.loss.needs_teacher else (0, 0)
    together = config.views.per_image == "fresh" and config.loss.needs_teacher
    # In `teach` the train workers do not exist yet, so they take no share.
    beside = fewest_workers if together else 0
    share = _share(cpus, fewest + beside + 1, f"{fewest} teacher actor(s), {beside} train worker(s) and a loading task")
    train_cpus = share if together else _share(cpus, max(fewest_workers, 1), f"{fewest_workers} train worker(s)")
    uses_gpus = gpus > 0
    gpu_share = 1.0
    if uses_gpus:
        needed = fewest + beside if together else max(fewest, fewest_workers)
        if together and needed == 2 and gpus == 1:
            gpu_share = 0.5  # one trainer and one teacher get along on one GPU; two trainers would not (NCCL)
        elif gpus < needed:
            raise ConfigError(
                f"needs {needed} GPUs for {fewest} teacher actor(s) and {fewest_workers} train worker(s), has "
                f"{gpus:g}; lower cluster.teacher_actors or distill.num_workers"
            )
    fit = math.floor((cpus - share * (beside + 1)) / share + 1e-9)
    if uses_gpus:
        fit = min(fit, math.floor(gpus / gpu_share) - beside)
    most = max(fewest, min(most, fit))
    generators, generator_cpus, generator_gpus = _plan_generators(config, cpus, gpus, cores)
    return Plan(
        cpus=cpus,
        gpus=gpus,
        decode_cpus=min(1.0, cpus),
        load_cpus=share,
        teacher_actors=(fewest, most),
        teacher_cpus=share,
        teacher_gpus=gpu_share * uses_gpus,
        teacher_threads=max(1, cores // max(most + beside, 1)),
        generator_actors=generators,
        generator_cpus=generator_cpus,
        generator_gpus=generator_gpus,
        train_workers=workers,
        train_cpus=train_cpus,
        train_gpus=gpu_share * (uses_gpus and fewest_workers > 0),
        train_threads=max(1, cores // (max(fewest_workers, 1) + (fewest if together and not uses_gpus else 0))),
    )


def _plan_generators(config: RunConfig, cpus: float, gpus: float, cores: int) -> tuple[tuple[int, int], float, float]:
    """Fewest and most generator actors and the CPUs and GPUs of each. On CPUs an actor uses one thread, so there are as
    many as cores; the task that feeds them, and the teacher that may judge what they make, need little."""
    if config.generate is None:
        return (0, 0), 0.0, 0.0
    fewest, most = config.cluster.generator_actors
    fewest = max(fewest, 1)  # where there is work: Ray has no pool that begins with none
    judged = config.generate.filter.needs_teacher
    left = cpus - LEAST_SHARE * (1 + judged)
    # Of a cluster that grows, more may come than are there: the pool takes what there is.
    if gpus > 0:
        share = 0.5 if judged and gpus < 2 else 1.0
        if gpus - (share if judged else 0) < fewest * share:
            raise ConfigError(
                f"needs {fewest + judged} GPUs for {fewest} generator actor(s){' and a teacher' if judged else ''}, "
                f"has {gpus:g}; lower cluster.generator_actors"
            )
        counted, gpu_share = fewest, share
    else:
        counted, gpu_share = max(fewest, min(most, max(cores, int(cpus)))), 0.0
        most = counted
    cpu_share = min(1.0, math.floor(100 * left / counted) / 100)
    if cpu_share < LEAST_SHARE:
        raise ConfigError(
            f"needs at least {counted * LEAST_SHARE + cpus - left:g} CPUs for {counted} generator actor(s), has "
            f"{cpus:g}; lower cluster.generator_actors"
        )
    return (fewest, most), cpu_share, gpu_share


def _share(cpus: float, parts: int, what: str) -> float:
    share = min(1.0, math.floor(100 * cpus / parts) / 100)
    if share < LEAST_SHARE:
        raise ConfigError(
            f"needs at least {parts * LEAST_SHARE:g} CPUs for {what}, has {cpus:g}; lower distill.num_workers or "
            "cluster.teacher_actors, or join a larger cluster with cluster.address"
        )
    return share


def local_plan(config: RunConfig) -> Plan:
    """The plan for a cluster of this machine alone, made without starting Ray."""
    return plan_resources(config, float(_cores()), float(_local_gpus()), _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _local_gpus() -> int:
    import torch  # the driver of a run loads it anyway; `--help` and `show` never come here

    return torch.cuda.device_count()


@contextlib.contextmanager
def ray_cluster(config: RunConfig, reserved: float = 0.0, dashboard: bool = False) -> Iterator[Plan]:
    """Ray for the time of a `with` block, and the plan that fits it, less the `reserved` CPUs.

    A cluster of several nodes is looked at first. Raises ConfigError where it is not fit, or the plan does not fit.
    """
    import ray

    with joined_cluster(config, dashboard):
        if config.cluster.address is not None and sum(node["Alive"] for node in ray.nodes()) > 1:
            from raydistill.infra.preflight import refuse_unfit

            refuse_unfit(config)
        yield live_plan(config, reserved)


@contextlib.contextmanager
def joined_cluster(config: RunConfig, dashboard: bool = False) -> Iterator[None]:
    """The cluster of `cluster.address`, or one of this machine, for the time of a `with` block.

    A local one listens on the loopback interface only, and asks for a token. Without the `dashboard` Ray cannot free
    what an ended Tune trial's train workers held.
    """
    import ray

    if ray.is_initialized():  # a cluster of the caller's, which stays
        yield
        return
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    with warnings.catch_warnings(), _quiet_native_log(), _own_handler_kept():
        warnings.simplefilter("ignore", FutureWarning)
        if config.cluster.address is None:
            ray.init(
                address="local",
                num_cpus=_cores(),
                dashboard_host="127.0.0.1",
                include_dashboard=dashboard,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
        else:
            try:
                ray.init(address=config.cluster.address, **quiet)
            except (ConnectionError, TimeoutError) as error:
                reason = (str(error).strip().splitlines() or ["no answer"])[0]
                raise ConfigError(
                    f"cluster.address={config.cluster.address}: no Ray cluster can be joined there ({reason}); start "
                    "one (`ray start --head`, `ray up cluster.yaml`), and give its token where it asks for one"
                ) from None
    _protect_token()
    configure_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _quiet_native_log() -> Iterator[None]:
    """Ray's C++ layer writes to the terminal of what its Python layer raises or retries anyway. It is told not to; the
    line in which it says that it was told is left out of what is written to the terminal meanwhile."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            written.seek(0)
            os.write(2, b"".join(line for line in written if b"RAY_BACKEND_LOG_LEVEL" not in line))


@contextlib.contextmanager
def _own_handler_kept() -> Iterator[None]:
    """Where Ray starts, it puts a handler of SIGTERM of its own in Python's place, which exits with code 15, and a
    native one, which would end the process on the spot; this puts back what was there. Only the main thread can."""
    own = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own or signal.SIG_DFL)


class RayStart:
    """Ray, started in a thread of its own while the main one loads torch and the models, or not at all.

    The thread lives as long as Ray does: the system ends Ray's processes with the thread that started them.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._stack = contextlib.ExitStack()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._starting: Future[Plan] | None = None

    def begin(self) -> None:
        if self._starting is None:
            self._starting = self._thread.submit(self._stack.enter_context, ray_cluster(self._config))

    def plan(self) -> Plan:
        """The plan that fits the cluster, once it is there."""
        self.begin()
        assert self._starting is not None
        with _own_handler_kept():  # its thread has touched the native one alone
            return self._starting.result()

    def __enter__(self) -> RayStart:
        return self

    def __exit__(self, *error: object) -> None:
        if self._starting is not None:
            wait([self._starting])
        self._stack.close()
        self._thread.shutdown()


def live_plan(config: RunConfig, reserved: float = 0.0) -> Plan:
    """The plan for what is there, or for `cluster.grows_to`: a pool that asks for more makes a cluster grow."""
    import ray

    there, later = ray.cluster_resources(), config.cluster.grows_to or {}
    cpus, gpus = (max(there.get(name, 0.0), later.get(name, 0.0)) for name in ("CPU", "GPU"))
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    cores = _cores() if len(nodes) == 1 and not later else max(1, int(max(nodes, default=1)))
    try:
        return plan_resources(config, cpus - reserved, gpus, cores)
    except ConfigError as error:
        if config.cluster.address is None or later:
            raise
        raise ConfigError(
            f"{error}; a cluster that starts nodes on demand is planned for what it may grow to: "
            "cluster.grows_to={CPU: 48, GPU: 6}"
        ) from None


def _protect_token() -> None:
    """Ray writes the token that lets code run on this machine readable by all its users."""
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        token.parent.chmod(stat.S_IRWXU)
        token.chmod(stat.S_IRUSR | stat.S_IWUSR)


def configure_ray_data() -> None:
    """Rows in order, one block a shard, and no bars beside ours. For each process that makes a Dataset."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # Ray would end an execution in which no block moves for half an hour. A block of ours may take longer, as a file of
    # images that a slow pipeline makes on one CPU does, and so may a spot node that is waited for.
    context.execution_no_progress_timeout_s = -1
    context.target_max_block_size = 1024**3  # a shard's rows stay in one block, so that one actor call sees them all
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Worker:
    """One process of a training loop: this one, or one of Ray Train's."""

    rank: int
    size: int
    device: str
    threads: int
    preempted: Callable[[int], bool]  # is a node about to be taken? All workers ask at the same steps
    stream: Any = None  # a Ray Data iterator, where the data comes through Ray
    on_epoch: Callable[[dict[str, float]], None] = lambda record: None  # in this process: what it raises ends the loop


# A training loop: the job and the worker in, the last record out.
Loop = Callable[[Any, Worker], dict[str, float]]
_STEPS_BETWEEN_PREEMPTION_CHECKS = 10


def run_workers(
    loop: Loop,
    job: Any,
    plan: Plan,
    storage: str,
    max_failures: int,
    stream: Callable[[], Any] | None = None,
    on_epoch: Callable[[dict[str, float]], None] = lambda record: None,
) -> dict[str, float]:
    """Run a loop in this process or on Ray Train workers, and give rank 0's result.

    `on_epoch` gets each epoch's record, in this process alone. `stream()` makes the Dataset that feeds the workers; it
    is called anew whenever workers start. Ray Train replaces lost workers; the loop resumes from its own checkpoints.
    Raises StageError.
    """
    if plan.train_workers == 0:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        shard = None if stream is None else stream().iterator()
        return loop(job, Worker(0, 1, device, plan.train_threads, lambda step: False, shard, on_epoch))
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    # Workers stay where the command was given, or a relative path in the job would name nothing there.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    resources = {"CPU": plan.train_cpus} | ({"GPU": plan.train_gpus} if plan.train_gpus else {})
    datasets: dict[str, Any] = {} if stream is None else {"train": _StreamInController(stream)}
    trainer = TorchTrainer(
        _worker_loop,
        train_loop_config={
            # As bytes, so that Ray Train's controller need not load the models' libraries to pass it on.
            "work": pickle.dumps((loop, job)),
            "threads": plan.train_threads,
            "folder": os.getcwd(),
            "streams": stream is not None,
        },
        scaling_config=ScalingConfig(
            num_workers=plan.train_workers, use_gpu=plan.train_gpus > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            # Checkpoints are the loop's own, so no run of Ray Train's is ever restored: a new name each time.
            name=uuid.uuid4().hex,
            **_storage(storage),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=3),
        ),
        datasets=datasets,
        dataset_config=DataConfig(execution_options=_in_order()),
    )
    try:
        result: dict[str, Any] = trainer.fit().return_value
    except Exception as error:  # Ray wraps a worker's failure in classes of its own
        raise StageError(f"distill: {_worker_failure(error)}") from error
    if "error" in result:
        raise StageError(result["error"])
    return dict(result)


def _storage(path: str) -> dict[str, Any]:
    """Where Ray Train keeps what it notes of a run. Of places that are not local it knows a few by itself; it is given
    the file system that all else goes through."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, folder = url_to_fs(path)
    if isinstance(fs, LocalFileSystem):
        return {"storage_path": folder}
    return {"storage_path": folder, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


class _StreamInController:
    """Ray Train calls this in its controller, a process of its own, whenever it starts workers."""

    def __init__(self, stream: Callable[[], Any]) -> None:
        self._stream = stream

    def __call__(self) -> Any:
        configure_ray_data()
        return self._stream()


def _in_order() -> Any:
    from ray.data import ExecutionOptions

    return ExecutionOptions(preserve_order=True)


def _worker_loop(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs in each worker. A failure that a retry cannot mend is returned, not raised."""
    import ray.train
    import torch

    context = ray.train.get_context()
    preempted_before: set[str] = set()

    def preempted(step: int) -> bool:
        if step % _STEPS_BETWEEN_PREEMPTION_CHECKS:
            return False
        notice = ray.train.get_preemption_info()  # a barrier
        nodes = set() if notice is None else set(notice.preempted_node_to_ranks)
        new = nodes - preempted_before
        preempted_before.update(nodes)
        return bool(new)

    device = str(ray.train.torch.get_device())
    shard = ray.train.get_dataset_shard("train") if config["streams"] else None
    size = context.get_world_size()
    worker = Worker(context.get_world_rank(), size, device, config["threads"], preempted, shard)
    torch.set_num_threads(config["threads"])
    with contextlib.suppress(OSError):  # another node may not have it, and sees no relative path in any case
        os.chdir(config["folder"])
    loop, job = pickle.loads(config["work"])
    try:
        return dict(loop(job, worker))
    except DivergedError as error:
        return {"error": str(error)}
    except RaydistillError as error:
        if size > 1:  # the others wait for this one, so Ray has to end them all
            raise
        return {"error": str(error)}


def _worker_failure(error: Exception) -> str:
    """The last line of the first worker's traceback, with its rank."""
    failures = getattr(error, "worker_failures", None) or getattr(error.__cause__, "worker_failures", None)
    if not failures:
        return f"Ray Train failed: {(str(error).strip().splitlines() or [type(error).__name__])[-1]}"
    rank, cause = next(iter(failures.items()))
    return f"worker {rank} failed: {(str(cause).strip().splitlines() or [type(cause).__name__])[-1]}"

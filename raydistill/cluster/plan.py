"""The plan of how a cluster's CPUs and GPUs are shared. It is made before anything starts, and checked to fit.

On few CPUs Ray waits forever if train workers, teacher actors and the tasks that feed them together ask for more than
the cluster has. So each gets a share, and the shares add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raydistill.config import RunConfig
from raydistill.errors import ConfigError
from raydistill.escaping import counted
from raydistill.runtime.cgroups import num_cores, num_threads

# Below this share of a CPU a worker is starved rather than scheduled.
LEAST_SHARE = 0.25


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
    trainings: int = 1  # that may run at once, like the trials of a search

    def describe(self) -> list[str]:
        """The plan in words, a line for each stage that uses Ray."""
        lines = [
            f"machine: {self.cpus:g} CPUs, {self.gpus:g} GPUs",
            f"prepare: decoding tasks of {self.decode_cpus:g} CPU",
        ]
        if self.generator_actors[1]:
            share = _share_words(self.generator_cpus, self.generator_gpus)
            lines.append(f"generate: {_count_words(self.generator_actors, 'generator actors')} of {share}")
        if self.teacher_actors[1]:
            actors = f"{_count_words(self.teacher_actors, 'teacher actors')}"
            share = _share_words(self.teacher_cpus, self.teacher_gpus)
            lines.append(f"teach:   {actors} of {share}, fed by tasks of {self.load_cpus:g} CPU")
        if self.train_workers == 0:
            return [*lines, f"distill: in this process, {counted(self.train_threads, 'threads')}"]
        workers = f"{_count_words(self.train_workers, 'workers')}"
        share = _share_words(self.train_cpus, self.train_gpus)
        return [*lines, f"distill: {workers} of {share}, {counted(self.train_threads, 'threads')} each"]


def _count_words(count: int | tuple[int, int], plural: str) -> str:
    fewest, most = count if isinstance(count, tuple) else (count, count)
    return counted(most, plural) if fewest == most else f"{fewest} to {counted(most, plural)}"


def _share_words(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU" + (f" + {gpus:g} GPU" if gpus else "")


def plan_resources(config: RunConfig, cpus: float, gpus: float, cores: int) -> Plan:
    """Shares of `cpus` logical CPUs and `gpus` GPUs; the number of real `cores` sets the threads. In `teach`, the
    teacher actors and a loading task run at once; with fresh views the train workers too.

    Raises ConfigError with the sum if even the smallest shares do not fit.
    """
    workers = config.train_workers
    fewest_workers = workers[0] if isinstance(workers, tuple) else workers
    has_network = config.loss.needs_teacher and config.teacher is not None and config.teacher.stored is None
    fewest, most = config.cluster.teacher_actors if has_network else (0, 0)
    together = config.views.per_image == "fresh" and config.loss.needs_teacher
    # In `teach` the train workers do not exist yet, so they take no share.
    beside = fewest_workers if together else 0
    teachers = counted(fewest, "teacher actors")
    share = _share(cpus, fewest + beside + 1, f"{teachers}, {counted(beside, 'train workers')} and a loading task")
    train_cpus = share if together else _share(cpus, max(fewest_workers, 1), counted(fewest_workers, "train workers"))
    uses_gpus = gpus > 0
    gpu_share = 1.0
    if uses_gpus:
        needed = fewest + beside if together else max(fewest, fewest_workers)
        if together and needed == 2 and gpus == 1:
            gpu_share = 0.5  # one trainer and one teacher can share a GPU; two trainers cannot (NCCL)
        elif gpus < needed:
            raise ConfigError(
                f"needs {needed} GPUs for {teachers} and {counted(fewest_workers, 'train workers')}, has "
                f"{gpus:g}; lower cluster.teacher_actors or distill.num_workers"
            )
    fit = math.floor((cpus - share * (beside + 1)) / share + 1e-9)
    if uses_gpus:
        fit = min(fit, math.floor(gpus / gpu_share) - beside)
    most = max(fewest, min(most, fit))
    generators, generator_cpus, generator_gpus = _plan_generators(config, cpus, gpus, cores)
    threads = min(config.cluster.threads or 0, cores)  # a thousand would wait for each other; 0: not set
    return Plan(
        cpus=cpus,
        gpus=gpus,
        decode_cpus=min(1.0, cpus),
        load_cpus=share,
        teacher_actors=(fewest, most),
        teacher_cpus=share,
        teacher_gpus=gpu_share * uses_gpus,
        teacher_threads=threads or max(1, cores // max(most + beside, 1)),
        generator_actors=generators,
        generator_cpus=generator_cpus,
        generator_gpus=generator_gpus,
        train_workers=workers,
        train_cpus=train_cpus,
        train_gpus=gpu_share * (uses_gpus and fewest_workers > 0),
        train_threads=threads
        or max(1, cores // (max(fewest_workers, 1) + (fewest if together and not uses_gpus else 0))),
    )


def _plan_generators(config: RunConfig, cpus: float, gpus: float, cores: int) -> tuple[tuple[int, int], float, float]:
    """The fewest and most generator actors, and the CPUs and GPUs of each. On CPUs an actor uses one thread, so there
    are as many actors as cores; the task that feeds them, and the teacher that may judge their images, need little."""
    if config.generate is None:
        return (0, 0), 0.0, 0.0
    fewest, most = config.cluster.generator_actors
    fewest = max(fewest, 1)  # if there is work: Ray has no pool that starts with no actor
    judged = config.shows_generated
    left = cpus - LEAST_SHARE * (1 + judged)
    # In a cluster that grows, nodes may be added: the pool takes what is there.
    if gpus > 0:
        share = 0.5 if judged and gpus < 2 else 1.0
        if gpus - (share if judged else 0) < fewest * share:
            raise ConfigError(
                f"needs {fewest + judged} GPUs for {counted(fewest, 'generator actors')}"
                f"{' and a teacher' if judged else ''}, has {gpus:g}; lower cluster.generator_actors"
            )
        num_actors, gpu_share = fewest, share
    else:
        num_actors, gpu_share = max(fewest, min(most, max(cores, int(cpus)))), 0.0
        most = num_actors
    cpu_share = min(1.0, math.floor(100 * left / num_actors) / 100)
    if cpu_share < LEAST_SHARE:
        raise ConfigError(
            f"needs at least {num_actors * LEAST_SHARE + cpus - left:g} CPUs for "
            f"{counted(num_actors, 'generator actors')}, has {cpus:g}; lower cluster.generator_actors"
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
    """The plan for only this machine, made without starting Ray."""
    import torch  # the driver of a run loads it anyway; `--help` and `show` never call this

    return plan_resources(config, float(num_cores()), float(torch.cuda.device_count()), _own_threads(config))


def _own_threads(config: RunConfig) -> int:
    """The most threads of a process on this machine. `cluster.threads` is asked before OMP_NUM_THREADS."""
    return num_cores() if config.cluster.threads else num_threads()


def live_plan(config: RunConfig, reserved: float = 0.0) -> Plan:
    """The plan for the nodes that exist, or for `cluster.grows_to`: a pool that asks for more makes a cluster grow."""
    import ray

    there, later = ray.cluster_resources(), config.cluster.grows_to or {}
    cpus, gpus = (max(there.get(name, 0.0), later.get(name, 0.0)) for name in ("CPU", "GPU"))
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    cores = max(1, int(max(nodes, default=1)))
    if len(nodes) == 1 and not later:  # Ray sets OMP_NUM_THREADS for the commands that it starts
        cores = _own_threads(config) if config.cluster.address is None else num_cores()
    try:
        return plan_resources(config, cpus - reserved, gpus, cores)
    except ConfigError as error:
        if config.cluster.address is None or later:
            raise
        raise ConfigError(
            f"{error}; for a cluster that starts nodes on demand, say how far it may grow: "
            "cluster.grows_to={CPU: 48, GPU: 6}"
        ) from None

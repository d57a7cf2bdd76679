"""How the trials of a search share the machines."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from raydistill.cluster.plan import Plan
from raydistill.config import RunConfig
from raydistill.errors import ConfigError

# CPUs of the process that supervises a trial while Ray Train's workers train it, and the CPUs to keep for those.
_BESIDE_WORKERS, RESERVED = 0.01, 0.1
_MOST_CPUS = 4.0  # of a trial in one process; more hardly speed up a small student
_LEAST_SHARE = 0.1  # of a CPU or a GPU


@dataclass(frozen=True)
class TrialResources:
    """The number of trials at once, the CPUs and GPUs of the process that runs one, and its plan."""

    together: int
    share: dict[str, float]
    plan: Plan


def plan_trials(config: RunConfig, plan: Plan) -> TrialResources:
    """Trials at once: the number in the job, or one for each GPU, or one for each 4 CPUs. One train worker, or none,
    trains in the trial's own process, with its share of a node's threads; Ray Train runs several workers.

    Raises ConfigError: that many trials do not fit.
    """
    asked = config.tune.concurrent
    if config.distill.most_workers > 1:
        workers = plan.train_workers[0] if isinstance(plan.train_workers, tuple) else plan.train_workers
        cpus, gpus = workers * plan.train_cpus, workers * plan.train_gpus
        fits = int(min(plan.cpus / cpus, plan.gpus / gpus if gpus else math.inf) + 1e-9)
        if asked is not None and asked > fits:
            raise ConfigError(
                f"tune.concurrent={asked} trials at once, with {workers} workers each, need {asked * cpus:g} CPUs"
                f"{f' and {asked * gpus:g} GPUs' if gpus else ''}, and there are {plan.cpus:g} CPUs and "
                f"{plan.gpus:g} GPUs; lower it or distill.num_workers"
            )
        together = asked or max(1, fits)
        return TrialResources(together, {"CPU": _BESIDE_WORKERS}, dataclasses.replace(plan, trainings=together))
    cores = plan.train_threads  # of the largest node
    together = asked or max(1, int(plan.gpus or plan.cpus // min(_MOST_CPUS, cores)))
    share = int(100 * plan.cpus / together) / 100
    if share < _LEAST_SHARE or (plan.gpus and plan.gpus / together < _LEAST_SHARE):
        raise ConfigError(
            f"tune.concurrent={together} trials at once get {share:g} each of {plan.cpus:g} CPUs and "
            f"{plan.gpus:g} GPUs, which is too little; lower it"
        )
    shares = {"CPU": min(share, _MOST_CPUS, float(cores))}
    if plan.gpus:
        shares["GPU"] = min(1.0, int(100 * plan.gpus / together) / 100)
    threads = max(1, min(cores, int(plan.cpus / together)))
    return TrialResources(
        together, shares, dataclasses.replace(plan, train_workers=0, train_threads=threads, trainings=together)
    )

"""The engine of `tune`: Ray Tune runs the trials, Optuna proposes and remembers them.

Optuna's study, in a database, is the one record of a search. What is proposed for a trial is a function of the seed,
the trial's number and the trials before it, and a trial that was running when the search was killed is gone on with: so
a search that was killed ends where an unbroken one ends. Tune's own snapshots are not needed, and none is ever
restored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import pickle
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import optuna
import torch
from optuna.trial import TrialState
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console

from raydistill.cluster.plan import Plan
from raydistill.config import Loss, RunConfig
from raydistill.engine.batches import DistillJob
from raydistill.engine.checkpoints import latest_step
from raydistill.engine.loop import distill_loop
from raydistill.engine.records import read_epochs
from raydistill.engine.workers import Worker
from raydistill.errors import ConfigError, RaydistillError
from raydistill.models.student import read_student, split_logits
from raydistill.results import StudentCheckpoint
from raydistill.runtime.progress import Progress
from raydistill.search.space import Choice, Space
from raydistill.search.study import Trial, make_sampler, num_trials, read_trial
from raydistill.stages.distill import distill_student
from raydistill.storage.directory import StageDirectory, read_seconds
from raydistill.storage.lease import held
from raydistill.storage.state import EpochRecord, needed_state, result_of

_MEASURED_STEPS, _WARM_UP_STEPS, _MOST_SECONDS = 8, 2, 20.0
_RETRIES = 1  # of a trial whose process is lost: once may be a spot node, twice is the trial
# CPUs of the process that looks after a trial while Ray Train's workers train it, and what is kept back for those.
_BESIDE_WORKERS, RESERVED = 0.01, 0.1
_MOST_CPUS = 4.0  # of a trial in one process; more make a small student little faster
_LEAST_SHARE = 0.1  # of a CPU or a GPU


class Watcher(Protocol):
    """Whoever follows a search: the terminal and MLflow."""

    def started(self, number: int, choices: dict[str, Choice], own: bool) -> None: ...

    def measured(self, number: int, record: dict[str, float]) -> None: ...

    def ended(self, trial: Trial) -> None: ...


@dataclass(frozen=True)
class _Work:
    """What travels to the process that trains a trial."""

    job: DistillJob
    directory: StageDirectory
    plan: Plan
    objectives: tuple[str, ...]


# A trial's choices in, or None for the job's own values; out comes what it trains on. Raises ConfigError where they do
# not fit together.
MakeJob = Callable[[dict[str, Choice] | None], tuple[DistillJob, StageDirectory]]


@dataclass(frozen=True)
class Layout:
    """How trials share the machines: so many at once, the CPUs and GPUs of the process that runs one, and its plan."""

    together: int
    share: dict[str, float]
    plan: Plan


def run_trials(
    config: RunConfig, space: Space, study: optuna.Study, make_job: MakeJob, layout: Layout, watcher: Watcher
) -> None:
    """Run trials until there are `num_trials`, those that a killed search left running first."""
    search = _Search(config, space, study, make_job, layout.plan, watcher)
    environment = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interruption is ours to explain
        "TUNE_MAX_PENDING_TRIALS_PG": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a job may name weights and folders from where the command was given
    }
    os.environ.update({key: os.environ.get(key, value) for key, value in environment.items()})
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="raydistill-tune-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = tune.Tuner(
            tune.with_resources(_run_trial, layout.share),
            tune_config=tune.TuneConfig(
                search_alg=search,
                num_samples=-1,  # the search says when it is over
                max_concurrent_trials=layout.together,
                # A trial then costs no start of a process, and no import of torch.
                reuse_actors=layout.plan.train_workers == 0,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                stop=_Stopper(search),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=_RETRIES),
            ),
        )
        try:
            tuner.fit()
        except SystemExit:  # what Ray makes of an interruption while it waits
            raise KeyboardInterrupt from None


def lay_out(config: RunConfig, plan: Plan) -> Layout:
    """Trials at once: what the job says, or a GPU each, or 4 CPUs each. One train worker, or none, trains in the
    trial's own process, with its share of a node's threads; several are Ray Train's.

    Raises ConfigError where so many trials do not fit.
    """
    asked = config.tune.concurrent
    if config.distill.most_workers > 1:
        workers = plan.train_workers[0] if isinstance(plan.train_workers, tuple) else plan.train_workers
        cpus, gpus = workers * plan.train_cpus, workers * plan.train_gpus
        fits = int(min(plan.cpus / cpus, plan.gpus / gpus if gpus else math.inf) + 1e-9)
        if asked is not None and asked > fits:
            raise ConfigError(
                f"tune.concurrent={asked} trials at once, of {workers} workers each, need {asked * cpus:g} CPUs"
                f"{f' and {asked * gpus:g} GPUs' if gpus else ''}, and there are {plan.cpus:g} and {plan.gpus:g}; "
                "lower it or distill.num_workers"
            )
        together = asked or max(1, fits)
        return Layout(together, {"CPU": _BESIDE_WORKERS}, dataclasses.replace(plan, trainings=together))
    cores = plan.train_threads  # of the largest node
    together = asked or max(1, int(plan.gpus or plan.cpus // min(_MOST_CPUS, cores)))
    share = int(100 * plan.cpus / together) / 100
    if share < _LEAST_SHARE or (plan.gpus and plan.gpus / together < _LEAST_SHARE):
        raise ConfigError(
            f"tune.concurrent={together} trials at once leave each {share:g} of {plan.cpus:g} CPUs and "
            f"{plan.gpus:g} GPUs; lower it"
        )
    shares = {"CPU": min(share, _MOST_CPUS, float(cores))}
    if plan.gpus:
        shares["GPU"] = min(1.0, int(100 * plan.gpus / together) / 100)
    threads = max(1, min(cores, int(plan.cpus / together)))
    return Layout(
        together, shares, dataclasses.replace(plan, train_workers=0, train_threads=threads, trainings=together)
    )


def seconds_per_step(job: DistillJob, threads: int) -> float | None:
    """Median seconds of a training step, from a few of them in this process, which leave nothing behind; None where
    they cannot be taken."""
    ticks: list[float] = []
    started = time.monotonic()

    def count(step: int) -> bool:
        ticks.append(time.monotonic())
        if len(ticks) > _WARM_UP_STEPS + _MEASURED_STEPS or (len(ticks) > 1 and ticks[-1] - started > _MOST_SECONDS):
            raise _EnoughError
        return False

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Whatever goes wrong, as when memory runs out, the trial of these settings will say, and others may do better.
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Exception):
        distill_loop(dataclasses.replace(job, path=folder), Worker(0, 1, device, threads, count))
    if device == "cuda":
        torch.cuda.empty_cache()  # the trials need it
    gaps = np.diff(ticks)
    return float(np.median(gaps[min(_WARM_UP_STEPS, len(gaps) - 1) :])) if len(gaps) else None


class _EnoughError(Exception):
    pass


def _run_trial(config: dict[str, Any]) -> None:
    """Tune's trainable: train one student, in this process or on Ray Train workers, and report as it goes.

    What cannot work is reported, not raised: Tune tries again only where the process was lost.
    """
    # Tune gives the trial before, which it has ended, so long to leave this process, whose checkpoint may still be on
    # its way. After the 2 s of its own it fails the next trial, and waits for that one's end for ever.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "600"
    started, stopped = time.monotonic(), False

    def report(record: dict[str, Any]) -> None:
        nonlocal stopped
        try:
            tune.report({"seconds": time.monotonic() - started, **record})
        except SystemExit:
            stopped = True
            raise

    try:
        result = _train(pickle.loads(config["work"]), report)  # noqa: TID251 - what this command sent
    except Exception as error:
        result = {"failed": _reason(error)}
    if stopped:  # Tune listens no more; what went wrong on the way out took the place of its SystemExit
        sys.exit(0)
    report(result)


def _reason(error: Exception) -> str:
    if isinstance(error, RaydistillError):
        return str(error)
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def _train(work: _Work, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train a trial's student, or find it trained, and tell of its epochs; the last one's record and all objectives.

    With each record come the objectives of the epoch that would ship if training ended there: `shipped`. What was done
    before is told again, since the search may have been killed before it heard of it.
    """
    job, directory, last = work.job, work.directory, work.job.config.distill.epochs
    records: dict[int, dict[str, float]] = {}

    def shipped(record: dict[str, float]) -> dict[str, float]:
        records[int(record["epoch"])] = record
        ships = records[int(record.get("kept_epoch", record["epoch"]))]
        return {name: ships[name] for name in work.objectives if name in record}

    def on_epoch(record: dict[str, float]) -> None:
        of_shipped = shipped(record)
        if record["epoch"] < last:  # that of the last is the result's
            report({**record, "shipped": of_shipped})

    quiet = Progress(Console(quiet=True))
    with held(directory, quiet.line) as is_to_do:  # a run of the same settings may train it too
        if is_to_do:
            for record in read_epochs(directory.path, latest_step(directory.path) // job.steps_per_epoch):
                on_epoch(record)
            started = time.monotonic()
            student = distill_student(job, directory, work.plan, quiet, on_epoch)
            directory.write_bill({"seconds": time.monotonic() - started})
    if not is_to_do:
        student = result_of(directory.done() or {}, directory.path, StudentCheckpoint)
        for record in read_epochs(directory.path, last):
            on_epoch({**record, "trained_before": True})
    record = needed_state(f"{directory.path}/epochs/{last:05d}.json", EpochRecord, any_float=True)
    of_shipped = shipped(record) | _measures(work, student, record)
    result = {**record, "shipped": of_shipped, "finished": True}
    return result if is_to_do else {**result, "seconds": read_seconds(directory.path)}


def _measures(work: _Work, student: StudentCheckpoint, record: dict[str, float]) -> dict[str, float]:
    """The objectives that training does not measure, all of them on val."""
    wanted = set(work.objectives) - set(record)
    found = {"parameters": float(student.num_parameters)}
    if wanted <= set(found):
        return found
    from raydistill.engine.speed import images_per_second
    from raydistill.stages.evaluate import measures

    config, samples = work.job.config, work.job.samples
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = read_student(student.path)[0].to(device)
    if "milliseconds_per_image" in wanted:
        found["milliseconds_per_image"] = 1000 / images_per_second(network, network.preprocessing.size, device)
    if any(name.startswith("val_") for name in wanted):
        logits_NC, labels_N = split_logits(network, samples, "val", device, config.evaluate.batch_size)
        all_measures = measures(logits_NC, labels_N, samples.classes, config.evaluate.calibration_bins)
        found |= {f"val_{name}": float(all_measures[name]) for name in ("balanced_accuracy", "top5", "ece")}
    return found


class _Search(OptunaSearch):
    """Tune's search algorithm: it proposes what the study does, and writes into the study what becomes of it."""

    def __init__(
        self, config: RunConfig, space: Space, study: optuna.Study, make_job: MakeJob, plan: Plan, watcher: Watcher
    ) -> None:
        objectives = config.tune.objectives
        super().__init__(space=space.draw, metric=objectives[0], mode="max")
        self._config, self._space, self._ot_study = config, space, study
        self._make_job, self._plan, self._watcher = make_job, plan, watcher
        self._most = num_trials(config, space)
        # A search that was killed left these; nothing else is running in this study.
        self._left = list(study.get_trials(states=(TrialState.RUNNING,)))
        self._places: dict[str, str] = {}  # where Tune's trials train
        self._held: tuple[optuna.Trial, DistillJob, StageDirectory] | None = None

    def suggest(self, trial_id: str) -> Any:
        proposal = self._held or self._propose()
        self._held = None
        if proposal is None:
            return Searcher.FINISHED
        trial, job, directory = proposal
        if directory.path in self._places.values():  # two trials of equal settings: the second finds what the first did
            self._held = proposal
            return None
        self._places[trial_id], self._ot_trials[trial_id] = directory.path, trial
        return {"number": trial.number, "work": pickle.dumps(_Work(job, directory, self._plan, self._objectives))}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The stopper, which Tune asks first, has dealt with it."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial, result = self._ot_trials.pop(trial_id), result or {}
        del self._places[trial_id]
        seconds = float(result.get("seconds", 0.0))
        if error or "failed" in result:
            lost = "its process was lost, as when the machine runs out of memory"
            self._end(trial, TrialState.FAIL, seconds=seconds, reason=result.get("failed", lost))
        elif "finished" in result:
            values = [float(_of_shipped(result, name)) for name in self._objectives]
            if np.isfinite(values).all():
                self._end(trial, TrialState.COMPLETE, values, seconds, int(result["epoch"]))
            else:
                self._end(trial, TrialState.FAIL, seconds=seconds, reason=f"its result is not finite: {values}")
        else:
            self._end(trial, TrialState.PRUNED, seconds=seconds, epochs=int(result.get("epoch", 0)))

    def falls_behind(self, trial_id: str, record: dict[str, Any]) -> bool:
        """Note what a trial has reached; should it end here?"""
        trial = self._ot_trials[trial_id]
        if "failed" in record:
            return False
        self._watcher.measured(trial.number, logged(record))
        value = _of_shipped(record, self._objectives[0])
        if "finished" in record or value is None or self._config.tune.pruner == "none":
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna keeps what it was told of an epoch first, and says so
            trial.report(float(value), int(record["epoch"]))
        # What costs nothing more may end; the others are compared with it all the same.
        return bool(trial.should_prune()) and "trained_before" not in record

    @property
    def _objectives(self) -> tuple[str, ...]:
        return self._config.tune.objectives

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a copy of all it was given, to restore it; that is what the study is for."""
        return {}

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """The study is in its database, so Tune need not keep a copy."""

    def _propose(self) -> tuple[optuna.Trial, DistillJob, StageDirectory] | None:
        """The next trial whose settings make a job; None where there are no more."""
        while (trial := self._next()) is not None:
            own = bool(trial.user_attrs.get("own"))
            choices = self._draw(trial, own)
            self._watcher.started(trial.number, choices, own)
            try:
                job, directory = self._make_job(None if own else choices)
            except RaydistillError as error:  # each value may be good and the whole not
                self._end(trial, TrialState.FAIL, reason=str(error))
                continue
            trial.set_user_attr("directory", directory.path)
            return trial, job, directory
        return None

    def _next(self) -> optuna.Trial | None:
        study = self._ot_study
        if self._left:
            return self._taken_up(self._left.pop(0))
        number = sum(t.state is not TrialState.WAITING for t in study.trials)
        if number >= self._most:
            return None
        study.sampler = make_sampler(self._config, self._space, number)
        return study.ask()

    def _taken_up(self, frozen: optuna.trial.FrozenTrial) -> optuna.Trial:
        """A trial that a killed search left, perhaps before all of it was drawn."""
        sampler = self._ot_study.sampler = make_sampler(self._config, self._space, frozen.number)
        trial = optuna.Trial(self._ot_study, frozen._trial_id)
        if "directory" not in frozen.user_attrs and "own" not in frozen.user_attrs:
            # What it had drawn key by key is drawn once more, in vain, so that the rest is what it would have been.
            for key in self._space.entries:
                if key in frozen.params and key not in trial.relative_params:
                    sampler.sample_independent(self._ot_study, frozen, key, frozen.distributions[key])
        return trial

    def _draw(self, trial: optuna.Trial, own: bool) -> dict[str, Choice]:
        """A trial that was begun before has its choices already, and they are given again."""
        if not own:
            return self._space.draw(trial)
        held = self._space.own(self._config)
        return Space({key: self._space.entries[key] for key in held}).draw(trial)

    def _end(
        self, trial: optuna.Trial, state: TrialState, values: list[float] | None = None,
        seconds: float = 0.0, epochs: int = 0, reason: str = "",
    ) -> None:  # fmt: skip
        for key, value in {"seconds": seconds, "epochs": epochs, "reason": reason}.items():
            trial.set_user_attr(key, value)
        # A grid's sampler ends a study that it has walked through, which only `optimize` may; ours ends by itself.
        self._ot_study.sampler = optuna.samplers.RandomSampler()
        self._watcher.ended(read_trial(self._ot_study.tell(trial, values, state)))


def _of_shipped(record: dict[str, Any], objective: str) -> Any:
    """An objective of the epoch that ships, which may be one before the record's; None where it was not measured."""
    return record.get("shipped", record).get(objective)


_TERMS = [key.removesuffix("_weight") for key in Loss.model_fields if key.endswith("_weight")]
_LOGGED = ("epoch", "step", "loss", "val_accuracy", "images_per_second", "learning_rate", *_TERMS)


def logged(record: dict[str, Any]) -> dict[str, float]:
    """What of an epoch's record is worth following."""
    return {key: float(record[key]) for key in _LOGGED if key in record}


class _Stopper(tune.Stopper):
    """Tune asks it of each result, before anything else."""

    def __init__(self, search: _Search) -> None:
        self._search = search

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._search.falls_behind(trial_id, result)

    def stop_all(self) -> bool:
        return False

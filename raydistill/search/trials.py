"""The engine of `tune`: Ray Tune runs the trials, Optuna proposes and remembers them.

Optuna's study, in a database, is the one record of a search. What is proposed for a trial is a function of the seed,
the trial's number and the trials before it, and a trial that was running when the search was killed is gone on with: so
a search that was killed ends where an unbroken one ends. Tune's own snapshots are not needed, and none is ever
restored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import optuna
import torch
from fsspec.core import url_to_fs
from optuna.trial import TrialState
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console

from raydistill.config import RunConfig
from raydistill.errors import ConfigError, DivergedError, RaydistillError
from raydistill.infra.artifacts import StageDirectory
from raydistill.infra.cluster import Plan, Worker
from raydistill.infra.progress import Progress
from raydistill.models.student import read_student, split_logits
from raydistill.search.space import Choice, Space
from raydistill.stages.batches import DistillJob
from raydistill.stages.distill import StudentCheckpoint, distill_student
from raydistill.stages.loop import distill_loop

MAXIMISED = ("val_accuracy", "val_balanced_accuracy", "val_top5")
_MEASURED_STEPS, _WARM_UP_STEPS, _MOST_SECONDS = 8, 2, 20.0
_RETRIES = 1  # of a trial whose process is lost: once may be a spot node, twice is the trial


@dataclass(frozen=True)
class Trial:
    """One trial as the study holds it. `state`: running, complete, pruned or failed."""

    number: int
    state: str
    choices: dict[str, Choice]
    values: list[float] | None
    own: bool
    epochs: int
    seconds: float
    directory: str
    reason: str


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


# A trial's choices in, what it trains on out; raises ConfigError where they make no config.
MakeJob = Callable[[dict[str, Choice]], tuple[DistillJob, StageDirectory]]


def open_study(config: RunConfig, directory: StageDirectory, own: dict[str, Choice]) -> optuna.Study:
    """The search's study, begun with the job's own values where it is new."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = config.tune.storage or f"sqlite:///{directory.path}/study.db"
    if config.tune.storage is None and "://" in directory.path:
        raise ConfigError(
            f"workspace={config.workspace}: a study's SQLite file needs a local one; set tune.storage to a database"
        )
    try:
        study = optuna.create_study(
            storage=optuna.storages.RDBStorage(url),
            study_name=directory.name,
            load_if_exists=True,
            directions=["maximize" if name in MAXIMISED else "minimize" for name in config.tune.objectives],
            pruner=_pruner(config),
        )
    except Exception as error:  # sqlalchemy's and the database's own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"tune.storage={url}: cannot be opened ({first})") from None
    if not study.trials:
        study.enqueue_trial(own, user_attrs={"own": True})
    return study


def read_trials(study: optuna.Study) -> list[Trial]:
    """All trials that were begun, in order."""
    return [_trial(frozen) for frozen in study.trials if frozen.state is not TrialState.WAITING]


def run_trials(
    config: RunConfig, space: Space, study: optuna.Study, make_job: MakeJob, plan: Plan, watcher: Watcher
) -> None:
    """Run trials until there are `tune.trials`, those that a killed search left running first."""
    search = _Search(config, space, study, make_job, plan, watcher)
    in_process, share = plan.train_workers == 0, trial_share(config, plan)
    environment = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interruption is ours to explain
        "TUNE_MAX_PENDING_TRIALS_PG": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    os.environ.update({key: os.environ.get(key, value) for key, value in environment.items()})
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="raydistill-tune-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = tune.Tuner(
            tune.with_resources(_run_trial, share),
            tune_config=tune.TuneConfig(
                search_alg=search,
                num_samples=-1,  # the search says when it is over
                max_concurrent_trials=concurrent_trials(config, plan),
                reuse_actors=in_process,  # a trial then costs no start of a process, and no import of torch
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


def concurrent_trials(config: RunConfig, plan: Plan) -> int:
    """Trials at once: what the job says, or a GPU each, or 4 CPUs each; one that uses Ray Train counts its workers."""
    if config.tune.concurrent is not None:
        return config.tune.concurrent
    if plan.train_workers:
        workers = plan.train_workers[0] if isinstance(plan.train_workers, tuple) else plan.train_workers
        return max(1, int((plan.gpus / workers) if plan.gpus else plan.cpus / (workers * plan.train_cpus)))
    return max(1, int(plan.gpus or plan.cpus // 4))


def trial_share(config: RunConfig, plan: Plan) -> dict[str, float]:
    """CPUs and GPUs of the process that runs a trial. Where Ray Train trains, its workers take theirs beside it.

    Raises ConfigError where so many trials do not fit.
    """
    if plan.train_workers:
        return {"CPU": 0.01}
    count = concurrent_trials(config, plan)
    share = int(100 * plan.cpus / count) / 100
    if share < 0.1 or (plan.gpus and plan.gpus / count < 0.1):
        raise ConfigError(
            f"tune.concurrent={count} trials at once leave each {share:g} of {plan.cpus:g} CPUs and "
            f"{plan.gpus:g} GPUs; lower it"
        )
    return {"CPU": min(share, 4.0) if plan.cpus > 4 else share} | (
        {"GPU": min(1.0, int(100 * plan.gpus / count) / 100)} if plan.gpus else {}
    )


def seconds_per_step(job: DistillJob, threads: int) -> float:
    """Median seconds of a training step, from a few of them in this process, which leave nothing behind; 0 where they
    cannot be taken."""
    ticks: list[float] = []
    started = time.monotonic()

    def count(step: int) -> bool:
        ticks.append(time.monotonic())
        if len(ticks) > _WARM_UP_STEPS + _MEASURED_STEPS or (len(ticks) > 1 and ticks[-1] - started > _MOST_SECONDS):
            raise _EnoughError
        return False

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_EnoughError, DivergedError):
        distill_loop(dataclasses.replace(job, path=folder), Worker(0, 1, device, threads, count))
    gaps = np.diff(ticks)
    return float(np.median(gaps[min(_WARM_UP_STEPS, len(gaps) - 1) :])) if len(gaps) else 0.0


class _EnoughError(Exception):
    pass


def _run_trial(config: dict[str, Any]) -> None:
    """Tune's trainable: train one student, in this process or on Ray Train workers, and report as it goes.

    What cannot work is reported, not raised: Tune tries again only where the process was lost.
    """
    work: _Work = pickle.loads(config["work"])
    started = time.monotonic()
    last = work.job.config.distill.epochs

    def report(record: dict[str, float]) -> None:
        if record["epoch"] < last and (work.objectives[0] in record):
            tune.report(dict(record))

    try:
        done = work.directory.done()
        if done is None:
            student = distill_student(work.job, work.directory, work.plan, Progress(Console(quiet=True)), report)
            work.directory.write_json("seconds.json", {"seconds": time.monotonic() - started})
        else:
            student = StudentCheckpoint(**done)
        fs = work.directory.fs
        record = json.loads(fs.cat_file(f"{work.directory.path}/epochs/{last:05d}.json"))
        result = {**record, **_measures(work, student, record), "finished": True}
    except RaydistillError as error:
        result = {"failed": str(error)}
    except (RuntimeError, MemoryError) as error:  # torch's, out of memory among them
        lines = str(error).strip().splitlines() or [""]
        result = {"failed": f"{type(error).__name__}: {lines[0]}"}
    tune.report({**result, "seconds": time.monotonic() - started})


def _measures(work: _Work, student: StudentCheckpoint, record: dict[str, float]) -> dict[str, float]:
    """The objectives that training does not measure, all of them on val."""
    wanted = set(work.objectives) - set(record)
    found = {"parameters": float(student.num_parameters)}
    if wanted <= set(found):
        return found
    from raydistill.stages.evaluate import images_per_second, measures

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
        # A search that was killed left these; nothing else is running in this study.
        self._left = list(study.get_trials(states=(TrialState.RUNNING,)))

    def suggest(self, trial_id: str) -> Any:
        while True:
            trial = self._next()
            if trial is None:
                return Searcher.FINISHED
            own = bool(trial.user_attrs.get("own"))
            choices = self._draw(trial, own)
            self._watcher.started(trial.number, choices, own)
            try:
                job, directory = self._make_job({} if own else choices)
            except RaydistillError as error:  # each value may be good and the whole not
                self._end(trial, TrialState.FAIL, reason=str(error))
                continue
            trial.set_user_attr("directory", directory.path)
            self._ot_trials[trial_id] = trial
            work = _Work(job, directory, self._plan, self._config.tune.objectives)
            return {"number": trial.number, "work": pickle.dumps(work)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The stopper, which Tune asks first, has dealt with it."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial, result = self._ot_trials.pop(trial_id), result or {}
        seconds = float(result.get("seconds", result.get("time_total_s", 0.0)))
        if error or "failed" in result:
            lost = "its process was lost, as when the machine runs out of memory"
            self._end(trial, TrialState.FAIL, seconds=seconds, reason=result.get("failed", lost))
        elif "finished" in result:
            values = [float(result[name]) for name in self._config.tune.objectives]
            if np.isfinite(values).all():
                self._end(trial, TrialState.COMPLETE, values, seconds, int(result["epoch"]))
            else:
                self._end(trial, TrialState.FAIL, seconds=seconds, reason=f"its result is not finite: {values}")
        else:
            self._end(trial, TrialState.PRUNED, seconds=seconds, epochs=int(result.get("epoch", 0)))

    def falls_behind(self, trial_id: str, record: dict[str, float]) -> bool:
        """Note what a trial has reached; should it end here?"""
        trial = self._ot_trials[trial_id]
        if "finished" in record or "failed" in record:
            return False
        epoch = int(record["epoch"])
        numbers = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        self._watcher.measured(trial.number, {k: v for k, v in numbers.items() if k in _LOGGED or "_" not in k})
        if self._config.tune.pruner == "none":
            return False
        value = float(record[self._config.tune.objectives[0]])
        trial.report(value, epoch)
        return bool(trial.should_prune())

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a copy of all it was given, to restore it; that is what the study is for."""
        return {}

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """The study is in its database, so Tune need not keep a copy."""

    def _next(self) -> optuna.Trial | None:
        study, settings = self._ot_study, self._config.tune
        if self._left:
            return optuna.Trial(study, self._left.pop(0)._trial_id)
        number = sum(t.state is not TrialState.WAITING for t in study.trials)
        if number >= settings.trials:
            return None
        study.sampler = _sampler(self._config, self._space, number)
        if isinstance(study.sampler, optuna.samplers.GridSampler) and number and study.sampler.is_exhausted(study):
            return None
        return study.ask()

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
        ended = _trial(self._ot_study.tell(trial, values, state))
        if state is TrialState.PRUNED:  # it will not be gone on with, and its checkpoints are large
            _remove(f"{ended.directory}/checkpoints")
        self._watcher.ended(ended)


def _remove(path: str) -> None:
    fs, folder = url_to_fs(path)
    if fs.exists(folder):
        fs.rm(folder, recursive=True)


_LOGGED = ("val_accuracy", "images_per_second", "learning_rate")


class _Stopper(tune.Stopper):
    """Tune asks it of each result, before anything else."""

    def __init__(self, search: _Search) -> None:
        self._search = search

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._search.falls_behind(trial_id, result)

    def stop_all(self) -> bool:
        return False


def _trial(frozen: optuna.trial.FrozenTrial) -> Trial:
    state = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    attributes = frozen.user_attrs
    return Trial(
        number=frozen.number,
        state=state.get(frozen.state, "running"),
        choices=dict(frozen.params),
        values=list(frozen.values) if frozen.state is TrialState.COMPLETE else None,
        own=bool(attributes.get("own")),
        epochs=int(attributes.get("epochs", 0)),
        seconds=float(attributes.get("seconds", 0.0)),
        directory=str(attributes.get("directory", "")),
        reason=str(attributes.get("reason", "")),
    )


def _pruner(config: RunConfig) -> optuna.pruners.BasePruner:
    settings = config.tune
    grace = settings.grace_epochs or max(1, config.distill.epochs // 5)
    if settings.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=grace, reduction_factor=3)
    if settings.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=grace)
    return optuna.pruners.NopPruner()


def _sampler(config: RunConfig, space: Space, number: int) -> optuna.samplers.BaseSampler:
    """A fresh one for each trial, so that what it draws does not depend on when the search was begun."""
    seed = config.seed + number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        kinds: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
            "gp": lambda: optuna.samplers.GPSampler(seed=seed),
            "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=seed),
            # These two walk through one sequence, and the study holds how far.
            "qmc": lambda: optuna.samplers.QMCSampler(seed=config.seed, scramble=True),
            "grid": lambda: optuna.samplers.GridSampler(space.grid(), seed=config.seed),
            "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        }
        return kinds[config.tune.sampler]()

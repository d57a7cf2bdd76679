"""Ray Tune runs the trials of a search; Optuna proposes and stores them.

Optuna's study, in a database, is the only record of a search. The seed, the trial's number and the earlier trials
decide a proposal. A trial that ran when the search was killed resumes. So a killed search ends like an unbroken one.
Tune's own snapshots are not needed and never restored.
"""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
from ray import tune
from ray.tune.search import Searcher

from raydistill.cluster.plan import Plan
from raydistill.config import RunConfig
from raydistill.engine.batches import DistillJob
from raydistill.errors import RaydistillError
from raydistill.search.display import SearchDisplay
from raydistill.search.optuna_private import running_trial
from raydistill.search.space import Choice, Space
from raydistill.search.study import logged, make_sampler, num_trials, read_trial
from raydistill.search.trainable import TrialWork, run_trial
from raydistill.search.trial_resources import TrialResources
from raydistill.storage.directory import StageDirectory

_RETRIES = 1  # of a trial whose process is lost: one loss may be a spot node, two are the trial's fault

# Makes a trial's job from its choices (None: the job's own values). Raises ConfigError if they do not fit together.
MakeJob = Callable[[dict[str, Choice] | None], tuple[DistillJob, StageDirectory]]


def run_trials(
    config: RunConfig,
    space: Space,
    study: optuna.Study,
    make_job: MakeJob,
    layout: TrialResources,
    display: SearchDisplay,
) -> None:
    """Run trials until there are `num_trials`, first those that a killed search left."""
    search = StudySearch(config, space, study, make_job, layout.plan, display)
    environment = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `interrupts` explains an interruption
        "TUNE_MAX_PENDING_TRIALS_PG": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of a job are relative to the command's directory
    }
    os.environ.update({key: os.environ.get(key, value) for key, value in environment.items()})
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="raydistill-tune-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = tune.Tuner(
            tune.with_resources(run_trial, layout.share),
            tune_config=tune.TuneConfig(
                search_alg=search,
                num_samples=-1,  # StudySearch ends the search
                max_concurrent_trials=layout.together,
                # A trial then needs no new process and no import of torch.
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
        except SystemExit:  # Ray raises it for an interruption
            raise KeyboardInterrupt from None


class StudySearch(Searcher):
    """Tune's search algorithm: it passes on the study's proposals, and writes the end of each trial to the study."""

    def __init__(
        self,
        config: RunConfig,
        space: Space,
        study: optuna.Study,
        make_job: MakeJob,
        plan: Plan,
        display: SearchDisplay,
    ) -> None:
        super().__init__()
        self._config, self._space, self._study = config, space, study
        self._make_job, self._plan, self._display = make_job, plan, display
        self._objectives, self._num_trials = config.tune.objectives, num_trials(config, space)
        # A killed search left these; no other command runs trials of this study.
        self._left = list(study.get_trials(states=(TrialState.RUNNING,)))
        self._running: dict[str, tuple[optuna.Trial, str]] = {}  # by Tune's name, with the directory
        self._held: tuple[optuna.Trial, DistillJob, StageDirectory] | None = None

    def suggest(self, trial_id: str) -> Any:
        proposal = self._held or self._propose()
        self._held = None
        if proposal is None:
            return Searcher.FINISHED
        trial, job, directory = proposal
        # Of two trials with equal settings the second waits and reuses the first's student.
        if any(directory.path == path for _, path in self._running.values()):
            self._held = proposal
            return None
        self._running[trial_id] = trial, directory.path
        work = TrialWork(job, directory, self._plan, self._objectives)
        return {"number": trial.number, "work": pickle.dumps(work)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        (trial, _), result = self._running.pop(trial_id), result or {}
        seconds = float(result.get("seconds", 0.0))
        if error or "failed" in result:
            lost = "its process was lost; the machine may have run out of memory"
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
        """Store a trial's epoch in the study. Should the trial end here?"""
        trial, _ = self._running[trial_id]
        if "failed" in record:
            return False
        self._display.measured(trial.number, logged(record))
        value = _of_shipped(record, self._objectives[0])
        if "finished" in record or value is None or self._config.tune.pruner == "none":
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna warns if an epoch is reported again, and keeps the first report
            trial.report(float(value), int(record["epoch"]))
        # A trial that was trained before costs nothing, so it does not end early; it still counts for the others.
        return bool(trial.should_prune()) and "trained_before" not in record

    def save(self, checkpoint_path: str) -> None:
        """The study is in its database, so Tune need not keep a copy."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune's snapshot of this object is never restored, so it is empty."""
        return {}

    def _propose(self) -> tuple[optuna.Trial, DistillJob, StageDirectory] | None:
        """The next trial whose settings make a job; None if there are no more."""
        while (trial := self._next()) is not None:
            own = bool(trial.user_attrs.get("own"))
            choices = self._draw(trial, own)
            self._display.started(trial.number, choices, own)
            try:
                job, directory = self._make_job(None if own else choices)
            except RaydistillError as error:  # valid values may not fit together
                self._end(trial, TrialState.FAIL, reason=str(error))
                continue
            trial.set_user_attr("directory", directory.path)
            return trial, job, directory
        return None

    def _next(self) -> optuna.Trial | None:
        if self._left:
            return self._resumed(self._left.pop(0))
        number = sum(t.state is not TrialState.WAITING for t in self._study.trials)
        if number >= self._num_trials:
            return None
        self._study.sampler = make_sampler(self._config, self._space, number)
        return self._study.ask()

    def _resumed(self, frozen: optuna.trial.FrozenTrial) -> optuna.Trial:
        """A trial that a killed search left, perhaps before it had drawn all keys."""
        sampler = self._study.sampler = make_sampler(self._config, self._space, frozen.number)
        trial = running_trial(self._study, frozen)
        if "directory" not in frozen.user_attrs and "own" not in frozen.user_attrs:
            # Draw its known keys again and drop them, so that the sampler gives the rest as in an unbroken search.
            for key in self._space.entries:
                if key in frozen.params and key not in trial.relative_params:
                    sampler.sample_independent(self._study, frozen, key, frozen.distributions[key])
        return trial

    def _draw(self, trial: optuna.Trial, own: bool) -> dict[str, Choice]:
        """The choices of a trial; one that was begun before gets its earlier choices again."""
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
        # A grid's sampler stops a study at the grid's end, which only `optimize` may call; ours ends by itself.
        self._study.sampler = optuna.samplers.RandomSampler()
        self._display.ended(read_trial(self._study.tell(trial, values, state)))


def _of_shipped(record: dict[str, Any], objective: str) -> Any:
    """An objective of the epoch that would ship, which may be before the record's; None if it was not measured."""
    return record.get("shipped", record).get(objective)


class _Stopper(tune.Stopper):
    """Tune calls it first with each result."""

    def __init__(self, search: StudySearch) -> None:
        self._search = search

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._search.falls_behind(trial_id, result)

    def stop_all(self) -> bool:
        return False

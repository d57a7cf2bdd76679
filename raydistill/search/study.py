"""The study of a search: Optuna's record of its trials, in a database, and the sampler."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState

from raydistill.config import Loss, RunConfig
from raydistill.engine.checkpoints import drop_checkpoints
from raydistill.errors import CheckpointError, ConfigError
from raydistill.escaping import one_line
from raydistill.search.optuna_private import CmaEsSampler
from raydistill.search.space import Choice, Space
from raydistill.storage.directory import StageDirectory
from raydistill.tracking.stores import UnusableError, database_lock, reason
from raydistill.tracking.workspace_store import refuse_programs

SECONDS_OF = "seconds of command "
_STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
MAXIMISED = ("val_accuracy", "val_balanced_accuracy", "val_top5")


@dataclass(frozen=True)
class Trial:
    """One trial of the study. `state`: running, complete, pruned or failed."""

    number: int
    state: str
    choices: dict[str, Choice]
    values: list[float] | None
    own: bool
    epochs: int
    seconds: float
    directory: str
    reason: str


def open_study(config: RunConfig, directory: StageDirectory, own: dict[str, Choice]) -> optuna.Study:
    """The study of a search. A new one starts with the job's own values."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = config.tune.storage or f"sqlite:///{directory.path}/study.db"
    if config.tune.storage is None and "://" in directory.path:
        raise ConfigError(
            f"workspace={config.workspace}: SQLite needs a local workspace; set tune.storage to a database server"
        )
    try:
        if config.tune.storage is None:
            refuse_programs(url)
        with database_lock(url):  # another command may create the same database
            study = optuna.create_study(
                storage=optuna.storages.RDBStorage(url),
                study_name=directory.name,
                load_if_exists=True,
                directions=["maximize" if name in MAXIMISED else "minimize" for name in config.tune.objectives],
                pruner=_pruner(config),
            )
            if len(study.directions) != len(config.tune.objectives):
                raise UnusableError(f"has a study of {len(study.directions)} objectives: name another database")
            if not study.trials:
                study.enqueue_trial(own, user_attrs={"own": True})
    except UnusableError as error:
        raise ConfigError(f"tune.storage={url} {error}") from None
    except Exception as error:  # sqlalchemy's and the database's own
        raise ConfigError(f"tune.storage={url}: cannot be opened ({reason(error)})") from None
    return study


def read_trials(study: optuna.Study) -> list[Trial]:
    """All trials, in the order of their numbers."""
    return [read_trial(frozen) for frozen in study.trials if frozen.state is not TrialState.WAITING]


def ranked(trials: Iterable[Trial], objectives: Sequence[str]) -> list[Trial]:
    """The complete trials, the best by the first objective first; of equal ones the earlier."""
    sign = 1 if objectives[0] in MAXIMISED else -1
    return sorted((t for t in trials if t.values), key=lambda t: -sign * (t.values or [0.0])[0])


_TERMS = [key.removesuffix("_weight") for key in Loss.model_fields if key.endswith("_weight")]
_LOGGED = ("epoch", "step", "loss", "val_accuracy", "images_per_second", "waits_for_data", "learning_rate", *_TERMS)


def logged(record: dict[str, Any]) -> dict[str, float]:
    """The values of an epoch's record that trackers log."""
    return {key: float(record[key]) for key in _LOGGED if key in record}


def drop_pruned(trials: list[Trial], root: str) -> None:
    """Delete the large checkpoints of trials that ended early: no command continues them. Call it after all trial
    processes have ended, since a trial may write a checkpoint while the pruner ends it."""
    for trial in trials:
        if trial.state == "pruned" and (directory := directory_of(trial, root)):
            with contextlib.suppress(OSError):  # a process on a joined cluster may still write; try again next time
                drop_checkpoints(directory)


def directory_of(trial: Trial, root: str) -> str | None:
    """The directory of a trial in the workspace at `root`, if it exists. Only the name of the directory in the study
    counts, because the study may come from others or have moved."""
    name = trial.directory.rpartition("/")[2]
    return f"{root}/{name}" if re.fullmatch(r"distill-[0-9a-f]{12}", name) else None


def num_trials(config: RunConfig, space: Space) -> int:
    """The number of trials. A grid runs once, after the job's own values."""
    if config.tune.sampler != "grid":
        return config.tune.trials
    return min(config.tune.trials, 1 + math.prod(len(values) for values in space.grid().values()))


def drawn_at_random(config: RunConfig, space: Space) -> list[str]:
    """Keys that the sampler does not model. Gaussian processes and CMA-ES model the keys that all trials have, a
    quasi-random sequence those of the first trial. The first trial has a key only if the space holds the job's value.

    Raises ConfigError: no key is left to model.
    """
    sampler, own = config.tune.sampler, space.own(config)
    if sampler not in ("gp", "cmaes", "qmc"):
        return []
    searched = {key: entry for key, entry in space.entries.items() if not entry.is_fixed}
    found = [
        key
        for key, entry in searched.items()
        if key not in own or (entry.when and sampler != "qmc") or (entry.categorical is not None and sampler == "cmaes")
    ]
    if len(found) == len(searched):
        raise ConfigError(
            f"tune.sampler={sampler} would draw every key of this space at random: it models only keys that all trials "
            "have, and the first trial has the job's own values"
            f"{'; and only numbers' if sampler == 'cmaes' else ''}; add those values to the space, or set "
            "tune.sampler=tpe"
        )
    return found


def read_trial(frozen: optuna.trial.FrozenTrial) -> Trial:
    """Raises CheckpointError: raydistill does not write such a trial."""
    attributes = frozen.user_attrs
    try:
        trial = Trial(
            number=frozen.number,
            state=_STATES.get(frozen.state, "running"),
            choices=dict(frozen.params),
            values=list(frozen.values) if frozen.state is TrialState.COMPLETE else None,
            own=bool(attributes.get("own")),
            epochs=int(attributes.get("epochs", 0)),
            seconds=float(attributes.get("seconds", 0.0)),
            directory=str(attributes.get("directory", "")),
            reason=str(attributes.get("reason", "")),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise _of_others(f"trial {frozen.number}", str(error)) from None
    if not (0 <= trial.seconds < math.inf and trial.epochs >= 0):
        raise _of_others(f"trial {frozen.number}", "its seconds or epochs are not counts")
    return trial


def seconds_noted(study: optuna.Study) -> float:
    """The seconds by the clock of all commands on the study. Raises CheckpointError."""
    noted = {key: seconds for key, seconds in study.user_attrs.items() if key.startswith(SECONDS_OF)}
    for key, seconds in noted.items():
        if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise _of_others(f"note {key!r:.80}", f"{seconds!r:.40} is not a number of seconds")
    return float(sum(noted.values()))


def refuse_others(trials: Sequence[Trial], space: Space) -> None:
    """Raises CheckpointError: a trial has a value that the space does not hold."""
    for trial in trials:
        try:
            if not trial.own:
                space.settings(trial.choices)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise _of_others(f"trial {trial.number}", f"the space does not hold {error!s:.80}") from None


def _of_others(what: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the study's {what} is not what raydistill writes ({one_line(reason)}); start another search in another "
        "workspace or tune.storage"
    )


def _pruner(config: RunConfig) -> optuna.pruners.BasePruner:
    settings = config.tune
    grace = settings.grace_epochs or max(1, config.distill.epochs // 5)
    if settings.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=grace, reduction_factor=3)
    if settings.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=grace)
    return optuna.pruners.NopPruner()


def make_sampler(config: RunConfig, space: Space, number: int) -> optuna.samplers.BaseSampler:
    """A new sampler for each trial, so that a resumed search draws the same values."""
    seed = config.seed + number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        kinds: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
            # group: with conditional keys, each set of keys that occur together has its own model.
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True),
            "gp": lambda: optuna.samplers.GPSampler(seed=seed),
            "cmaes": lambda: CmaEsSampler(seed=seed),
            # These two follow one sequence, and the study stores the position.
            "qmc": lambda: optuna.samplers.QMCSampler(seed=config.seed, scramble=True),
            "grid": lambda: optuna.samplers.GridSampler(space.grid(), seed=config.seed),
            "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        }
        return kinds[config.tune.sampler]()

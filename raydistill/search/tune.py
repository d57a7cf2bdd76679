"""tune: search a space of settings with one student a trial and no pass of the teacher, and say what it gained.

Every trial is an ordinary run of the job under an overlay, so `raydistill run JOB best.yaml` finds its student trained.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import optuna
from omegaconf import OmegaConf
from rich.console import Console
from rich.live import Live
from rich.table import Table

from raydistill.config import RunConfig, overlay
from raydistill.data.images import list_images
from raydistill.errors import ConfigError, StageError
from raydistill.infra import artifacts
from raydistill.infra.artifacts import StageDirectory, find_work, stage_directory
from raydistill.infra.cluster import Plan, ray_cluster
from raydistill.infra.progress import Progress
from raydistill.infra.tracking import ChildRun, Tracker
from raydistill.models.student import build_student
from raydistill.search.space import Choice, Space, read_space, shared_part
from raydistill.search.study_page import search_page
from raydistill.search.trials import (
    MAXIMISED,
    Trial,
    concurrent_trials,
    open_study,
    read_trials,
    run_trials,
    seconds_per_step,
    trial_share,
)
from raydistill.search.verdict import mean_interval, paired_p_value
from raydistill.stages.batches import DistillJob
from raydistill.stages.run import Outcome, check_run, distill_job, run_stages


@dataclass(frozen=True)
class Gain:
    """The best settings against the job's own over new seeds, paired: means, and the gain with its 95 % interval."""

    split: str
    own: float
    best: float
    gain: float
    low: float | None
    high: float | None
    p_value: float | None


@dataclass(frozen=True)
class Search:
    """What a search came to. `best` is the overlay of its best trial."""

    path: str
    trials: list[Trial]
    best_number: int
    best: dict[str, Any]
    front: list[int]  # of several objectives: the trials that no other beats in all
    confirmed: list[Gain]
    seconds: float  # of all trials and retrainings, whichever command ran them
    cost: float | None
    verdict: str


def tune_job(config: RunConfig, progress: Progress) -> Search:
    """Search, confirm the best with new seeds, and write `best.yaml`, `search.json` and `search.html`.

    Raises ConfigError before anything starts where the space or the job cannot work; StageError where no trial ended.
    """
    if config.tune.space is None:
        raise ConfigError("which settings to search? Give --space FILE; those that come with raydistill: tune_spaces/")
    space = read_space(config.tune.space, config)
    groups = _groups(config, space)
    _check(config, space, groups)
    artifacts.check_writable(config)
    directory = _directory(config, space, progress)
    directory.begin()
    study = open_study(config, directory, space.own(config))
    watcher = _Watcher(config, progress, read_trials(study))
    with Tracker(config, job=f"{directory.name}/{config.name}") as tracker:
        tracker.end_orphans()
        if watcher.left:
            many = config.distill.most_workers > 1
            with ray_cluster(config, reserved=0.1 if many else 0.0, dashboard=many) as plan:
                prepared = _prepare(groups, space, progress)
                plan = _trial_plan(config, plan)
                _forecast(config, prepared, plan, watcher, progress)

                def make_job(choices: dict[str, Choice]) -> tuple[DistillJob, StageDirectory]:
                    trial = _quiet(overlay(config, space.settings(choices)))
                    outcome = prepared[_key(shared_part(choices)) if choices else _OWN]
                    later = artifacts.tuned(trial, _samples(outcome))
                    assert later is not None, "a fine-tuned teacher is ready before the first trial"
                    return distill_job(later, outcome)

                with watcher.shown(tracker):
                    run_trials(config, space, study, make_job, plan, watcher)
        trials = read_trials(study)
        best, front = _best(config, study, trials)
        settings = {} if best.own else space.settings(best.choices)
        gains, retrained = _confirm(config, settings, progress, tracker)
        seconds = sum(trial.seconds for trial in trials) + retrained
        search = Search(
            directory.path, trials, best.number, settings, front, gains, seconds, _cost(config, seconds),
            _verdict(config, best, trials, gains),
        )  # fmt: skip
        _write(search, study, directory, config)
        shown = {f"best_{name}": value for name, value in zip(config.tune.objectives, best.values or (), strict=True)}
        tracker.log_job(
            shown | {f"gain_{gain.split}": gain.gain for gain in gains},
            [f"{directory.path}/{name}" for name in ("search.html", "search.json", "best.yaml")],
        )
    return search


_OWN = "own"


def _key(shared: dict[str, Choice]) -> str:
    return json.dumps(shared)


def _quiet(config: RunConfig) -> RunConfig:
    return overlay(config, {"tracking": {"enabled": False}})


def _samples(outcome: Outcome) -> Any:
    assert outcome.samples is not None
    return outcome.samples


def _groups(config: RunConfig, space: Space) -> dict[str, RunConfig]:
    """The job as the stages before `distill` see it: its own, and each that the space asks for."""
    shared = space.shared()
    if len(shared) > max(config.tune.trials, 1):
        raise ConfigError(
            f"the space has {len(shared)} combinations of keys that stages before training depend on, each of which "
            f"they run for, and there are {config.tune.trials} trials; take some away, or raise --trials"
        )
    groups = {_OWN: _quiet(config)}
    for chosen in shared:
        groups[_key(chosen)] = _quiet(overlay(config, space.settings(chosen)))
    return groups


def _prepare(groups: dict[str, RunConfig], space: Space, progress: Progress) -> dict[str, Outcome]:
    """Run the stages before `distill`, once for equal groups."""
    prepared: dict[str, Outcome] = {}
    for key, group in groups.items():
        if twin := next((other for other in prepared if groups[other] == group), None):
            prepared[key] = prepared[twin]
            continue
        # Where the space may turn a term on that needs the teacher, the teacher has to be ready.
        may_need = group.teacher is not None and any(name.partition(".")[0] == "loss" for name in space.entries)
        ready = overlay(group, {"loss": {"kd_weight": 1}}) if may_need else group
        prepared[key] = run_stages(ready, progress, "teach")
    return prepared


def _check(config: RunConfig, space: Space, groups: dict[str, RunConfig]) -> None:
    for group in groups.values():
        if group.views.per_image == "fresh" and group.loss.needs_teacher:
            raise ConfigError(
                "views.per_image=fresh would run the teacher again in every trial; give a number of stored views"
            )
        check_run(group, find_work(group, "distill"))
    if config.tune.sampler == "grid":
        space.grid()
    num_classes = len(list_images(config.images).classes)
    for key, entry in space.entries.items():
        if key in ("student", "student.model"):
            for label in entry.choices or [None]:
                build_student(overlay(config, space.settings({key: label})).student, num_classes)


def _directory(config: RunConfig, space: Space, progress: Progress) -> StageDirectory:
    """Another space, sampler or objective is another search; trials that both have are trained once all the same."""
    left_out = {"workspace", "cluster", "tracking", "name", "compare", "tune"}
    settings = config.tune.model_dump(include={"sampler", "pruner", "grace_epochs", "objectives"})
    identity = {
        "config": config.model_dump(mode="json", exclude=left_out),
        "files": list_images(config.images).fingerprint,
        "space": {key: entry.model_dump(by_alias=True, exclude_unset=True) for key, entry in space.entries.items()},
        "tune": settings,
    }
    directory = stage_directory(config, "tune", identity)
    if not directory.started():
        for line in _differences(config, directory):
            progress.line(line)
    return directory


def _differences(config: RunConfig, directory: StageDirectory) -> list[str]:
    """What a new search of a job differs in from the latest one before it."""
    fs, mine = directory.fs, json.loads(directory.identity)
    root = artifacts.workspace_root(config)
    earlier = sorted(fs.glob(f"{root}/tune-*/identity.json"), key=fs.modified, reverse=True) if fs.exists(root) else []
    for path in earlier:
        other = json.loads(fs.cat_file(path))
        if (other["config"], other["files"]) == (mine["config"], mine["files"]):
            before, after = (json.dumps({k: t[k] for k in ("space", "tune")}, indent=1).splitlines()
                             for t in (other, mine))  # fmt: skip
            changes = list(difflib.unified_diff(before, after, n=0, lineterm=""))[3:]
            shown = [line for line in changes if not line.startswith("@@")]
            return [f"tune: a new search, since this changed from the one in {path.rpartition('/')[0]}:",
                    *(f"  {line}" for line in shown)]  # fmt: skip
    return []


def _trial_plan(config: RunConfig, plan: Plan) -> Plan:
    """One worker, or none, trains in the trial's own process, with its share of the threads."""
    if config.distill.most_workers > 1:
        return plan
    alone = dataclasses.replace(plan, train_workers=0)
    cores = plan.train_threads * max(1, config.distill.most_workers)
    threads = max(1, cores // concurrent_trials(config, alone))
    return dataclasses.replace(alone, train_threads=threads)


def _forecast(
    config: RunConfig, prepared: dict[str, Outcome], plan: Plan, watcher: _Watcher, progress: Progress
) -> None:
    """What the search will take: a few steps of the job's own student, times all of them."""
    outcome = prepared[_OWN]
    later = artifacts.tuned(_quiet(config), _samples(outcome))
    assert later is not None
    job, _ = distill_job(later, outcome)
    each = job.total_steps * seconds_per_step(job, plan.train_threads)
    workers = config.distill.most_workers
    together = concurrent_trials(config, plan)
    trial_share(config, plan)
    total = watcher.left * each / workers / together
    cost = _cost(config, total)
    progress.line(
        f"tune: {watcher.left} trials of about {each / workers:.0f} s each, {together} at a time: about "
        f"{_minutes(total)}{'' if cost is None else f', {cost:.2f} at {config.cluster.price_per_hour:g} an hour'}"
        f"{'' if config.tune.pruner == 'none' else '; less where trials fall behind and end early'}"
        f"{f'; then {2 * config.tune.confirm_seeds} more to confirm' if config.tune.confirm_seeds else ''}"
    )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _cost(config: RunConfig, seconds: float) -> float | None:
    """Of all machines for so long; trials that run at once share the time."""
    return None if config.cluster.price_per_hour is None else config.cluster.price_per_hour * seconds / 3600


def _best(config: RunConfig, study: optuna.Study, trials: list[Trial]) -> tuple[Trial, list[int]]:
    """The trial that is first in the first objective, the earlier of equal ones; and the Pareto front."""
    complete = [trial for trial in trials if trial.state == "complete"]
    if not complete:
        # Reasons that differ in their numbers alone, as in the step at which a loss was no number, are one.
        reasons = [trial.reason or trial.state for trial in trials]
        counts = Counter(re.sub(r"[\d.]+", "#", reason) for reason in reasons)
        first = {re.sub(r"[\d.]+", "#", reason): reason for reason in reversed(reasons)}
        counted = "\n".join(f"  {count} x {first[kind]}" for kind, count in counts.most_common())
        raise StageError(f"tune: none of the {len(trials)} trials came to an end:\n{counted}")
    sign = 1 if config.tune.objectives[0] in MAXIMISED else -1

    def rank(trial: Trial) -> float:
        assert trial.values is not None
        return sign * trial.values[0]

    front = [t.number for t in study.best_trials] if len(config.tune.objectives) > 1 else []
    candidates = [trial for trial in complete if not front or trial.number in front]
    return max(candidates, key=rank), front


def _confirm(
    config: RunConfig, settings: dict[str, Any], progress: Progress, tracker: Tracker
) -> tuple[list[Gain], float]:
    """Train the best and the job's own settings with new seeds, which no trial has seen; val and, here alone, test."""
    if not settings or not config.tune.confirm_seeds:
        return [], 0.0
    scores: dict[str, dict[str, list[float]]] = {"val": {"own": [], "best": []}, "test": {"own": [], "best": []}}
    seconds = 0.0
    for number in range(1, config.tune.confirm_seeds + 1):
        for who, tree in (("own", {}), ("best", settings)):
            again = _quiet(overlay(config, {**tree, "seed": config.seed + number}))
            progress.line(f"tune: confirming, {who} settings with seed {again.seed}")
            with tracker.child(f"confirm {who}, seed {again.seed}") as record:
                outcome = run_stages(again, progress)
                report = outcome.report
                assert report is not None
                for split, of_split in scores.items():
                    if split in report.student:
                        of_split[who].append(float(report.student[split]["accuracy"]))
                        record.log({f"{split}_accuracy": of_split[who][-1]})
            seconds += sum(artifacts.read_seconds(path) for path in outcome.directories.values())
    gains = []
    for split, of_split in scores.items():
        if of_split["own"]:
            differences = [b - a for a, b in zip(of_split["own"], of_split["best"], strict=True)]
            low, high = mean_interval(differences)
            own, best = (float(np.mean(of_split[who])) for who in ("own", "best"))
            gains.append(Gain(split, own, best, float(np.mean(differences)), low, high, paired_p_value(differences)))
    return gains, seconds


def _verdict(config: RunConfig, best: Trial, trials: list[Trial], gains: list[Gain]) -> str:
    name = config.tune.objectives[0]
    assert best.values is not None
    own = next((t.values[0] for t in trials if t.own and t.values), None)
    words = f"Trial {best.number} of {len(trials)} is best: {name} {best.values[0]:.4g}"
    if best.own:
        return f"{words}, with the job's own values. Keep them; no trial of this space was better."
    words += "" if own is None else f" against {own:.4g} with the job's own values"
    test = next((gain for gain in gains if gain.split == "test"), gains[0] if gains else None)
    if test is None:
        return f"{words}. A search flatters what it finds: confirm it with tune.confirm_seeds=3."
    bounds = "" if test.low is None else f" ({100 * test.low:+.1f} to {100 * (test.high or 0):+.1f})"
    seeds = config.tune.confirm_seeds
    gain = f"With {seeds} new seed(s) it gains {100 * test.gain:+.1f} points on {test.split}{bounds}"
    if test.p_value is None:
        return f"{words}. {gain}; one seed says nothing of how sure that is."
    if test.gain <= 0:
        return f"{words}. {gain}, so keep the job's own values: the search found what suits one val split."
    if test.p_value < 0.05:
        return f"{words}. {gain}, p = {test.p_value:.3f}: run the job with best.yaml."
    return f"{words}. {gain}, p = {test.p_value:.2f}: this may be chance; more seeds would tell."


def _write(search: Search, study: optuna.Study, directory: StageDirectory, config: RunConfig) -> None:
    directory.write("best.yaml", OmegaConf.to_yaml(OmegaConf.create(search.best)).encode())
    directory.write_json("search.json", {**asdict(search), "objectives": config.tune.objectives})
    directory.write("search.html", search_page(study, search.verdict, config.tune.objectives))
    directory.finish({"path": directory.path, "verdict": search.verdict, "trials": len(search.trials)})


class _Watcher:
    """Follows the search: a live table on a terminal, a line for each trial elsewhere, and a run of MLflow's each."""

    def __init__(self, config: RunConfig, progress: Progress, trials: list[Trial]) -> None:
        self._config, self._progress = config, progress
        self._ended = {t.number: t for t in trials if t.state != "running"}
        self._running: dict[int, tuple[dict[str, Choice], dict[str, float]]] = {}
        self._runs: dict[int, ChildRun] = {}
        self._tracker: Tracker | None = None
        self._live: Live | None = None
        self._began, self._ended_before = time.monotonic(), len(self._ended)

    @property
    def left(self) -> int:
        return max(self._config.tune.trials - len(self._ended), 0)

    def shown(self, tracker: Tracker) -> _Shown:
        self._tracker, self._began = tracker, time.monotonic()
        return _Shown(self, self._progress.console)

    def started(self, number: int, choices: dict[str, Choice], own: bool) -> None:
        self._running[number] = (choices, {})
        if self._tracker is not None:
            run = self._runs[number] = ChildRun(self._tracker, f"trial {number:05d}")
            run.params({**choices, "own values": own})
        self._refresh()

    def measured(self, number: int, record: dict[str, float]) -> None:
        self._running[number] = (self._running[number][0], record)
        if number in self._runs:
            self._runs[number].log(record, int(record.get("step", 0)))
        self._refresh()

    def ended(self, trial: Trial) -> None:
        self._running.pop(trial.number, None)
        self._ended[trial.number] = trial
        if run := self._runs.pop(trial.number, None):
            names = self._config.tune.objectives
            run.log({"seconds": trial.seconds} | dict(zip(names, trial.values or (), strict=False)))
            run.note({"state": trial.state, "reason": trial.reason})
            run.end("FAILED" if trial.state == "failed" else "FINISHED")
        if self._live is None:
            self._progress.line(f"tune  {self._line(trial)}; {self._summary()}")
        self._refresh()

    def interrupted(self) -> None:
        for run in self._runs.values():
            run.end("KILLED")

    def _line(self, trial: Trial) -> str:
        what = trial.state if trial.values is None else " ".join(f"{value:.4g}" for value in trial.values)
        if trial.state == "pruned":
            what += f" after epoch {trial.epochs}"
        own = ", the job's own values" if trial.own else ""
        return f"trial {trial.number}{own}: {what}, {trial.seconds:.0f} s{f' ({trial.reason})' if trial.reason else ''}"

    def _summary(self) -> str:
        counts = Counter(trial.state for trial in self._ended.values())
        best = self._best()
        words = [] if best is None else [f"best {best.values[0]:.4g} (trial {best.number})"]  # type: ignore[index]
        words += [f"{len(self._ended)} of {self._config.tune.trials} ended"]
        words += [f"{counts[state]} {state}" for state in ("pruned", "failed") if counts[state]]
        now = len(self._ended) - self._ended_before
        if now and self.left:
            words.append(f"about {_minutes((time.monotonic() - self._began) / now * self.left)} left")
        return ", ".join(words)

    def _best(self) -> Trial | None:
        sign = 1 if self._config.tune.objectives[0] in MAXIMISED else -1
        complete = [trial for trial in self._ended.values() if trial.values]
        return max(complete, key=lambda t: sign * (t.values or [0.0])[0], default=None)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        table = Table(title=f"tune: {self._summary()}", box=None, pad_edge=False, title_justify="left")
        for title in ("trial", "state", self._config.tune.objectives[0], "seconds", "settings"):
            table.add_column(title)
        sign = 1 if self._config.tune.objectives[0] in MAXIMISED else -1
        best = sorted((t for t in self._ended.values() if t.values), key=lambda t: -sign * (t.values or [0.0])[0])[:5]
        for number, (choices, record) in self._running.items():
            at = f"epoch {record['epoch']:.0f}" if record else "begins"
            value = record.get(self._config.tune.objectives[0])
            table.add_row(str(number), at, "" if value is None else f"{value:.4g}", "", _short(choices))
        for trial in best:
            assert trial.values is not None
            words = "the job's own values" if trial.own else _short(trial.choices)
            table.add_row(str(trial.number), trial.state, f"{trial.values[0]:.4g}", f"{trial.seconds:.0f}", words)
        return table


def _short(choices: dict[str, Choice]) -> str:
    return " ".join(f"{k.rpartition('.')[2]}={v:.3g}" if isinstance(v, float) else f"{k.rpartition('.')[2]}={v}"
                    for k, v in choices.items())  # fmt: skip


class _Shown:
    """The live table, for as long as trials run, where there is a terminal to show it on."""

    def __init__(self, watcher: _Watcher, console: Console) -> None:
        self._watcher, self._console = watcher, console

    def __enter__(self) -> None:
        if self._console.is_terminal:
            self._watcher._live = Live(self._watcher._table(), console=self._console, auto_refresh=False)
            self._watcher._live.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if self._watcher._live is not None:
            self._watcher._live.__exit__(kind, *error)
            self._watcher._live = None
        if kind is not None:
            self._watcher.interrupted()

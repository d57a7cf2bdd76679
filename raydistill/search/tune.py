"""tune: search a space of settings. Each trial trains one student on the stored soft targets.

Every trial is an ordinary run of the job with an overlay, so `raydistill run JOB best.yaml` finds its student trained.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import optuna

from raydistill.cluster.plan import local_plan, plan_resources
from raydistill.cluster.session import ray_cluster
from raydistill.config import RunConfig, overlay
from raydistill.config.shipped import shipped_spaces
from raydistill.data.sources.listing import list_images
from raydistill.engine.batches import DistillJob
from raydistill.errors import ConfigError, StageError
from raydistill.graph import find_work
from raydistill.identity import tuned
from raydistill.models.student import build_student
from raydistill.pages.study import search_page
from raydistill.pages.templates import Table
from raydistill.preflight import check_measurable, check_run
from raydistill.results import Outcome
from raydistill.run import run_stages
from raydistill.runtime.progress import Progress
from raydistill.search.confirmation import Gain, confirm, search_verdict
from raydistill.search.directory import tune_directory
from raydistill.search.display import Clock, SearchDisplay, minutes, settings_words
from raydistill.search.forecast import forecast_lines, search_cost, seconds_per_step
from raydistill.search.space import Choice, Space, read_space, shared_part
from raydistill.search.study import (
    Trial,
    drawn_at_random,
    drop_pruned,
    num_trials,
    open_study,
    ranked,
    read_trials,
    refuse_others,
    seconds_noted,
)
from raydistill.search.trial_resources import RESERVED, TrialResources, plan_trials
from raydistill.search.trials import MakeJob, run_trials
from raydistill.stages.distill import distill_job
from raydistill.storage.directory import StageDirectory, check_writable, read_seconds, workspace_root
from raydistill.storage.jobs import JobRecord, job_name
from raydistill.storage.lease import held
from raydistill.tracking.tracker import Tracker
from raydistill.yaml_files import as_yaml


@dataclass(frozen=True)
class Search:
    """The result of a search. `best` is the overlay of its best trial."""

    path: str
    trials: list[Trial]
    best_number: int
    best: dict[str, Any]
    front: list[int]  # with several objectives: the Pareto front
    confirmed: list[Gain]
    seconds: float  # by the clock, of all commands that worked on it
    training_seconds: float  # the sum over all trials and retrainings
    cost: float | None
    verdict: str


def tune_job(config: RunConfig, progress: Progress) -> Search:
    """Search, confirm the best with new seeds, and write `best.yaml`, `search.json` and `search.html`.

    Raises ConfigError before it starts: the space or the job cannot work; StageError: no trial is complete.
    """
    if config.tune.space is None:
        raise ConfigError(f"tune needs a search space: give --space FILE, or one of {shipped_spaces()}")
    space = read_space(config.tune.space, config)
    groups = _groups(config, space)
    _check(config, space, groups)
    check_writable(config)
    directory = tune_directory(config, space, progress)
    directory.begin()
    study = open_study(config, directory, space.own(config))
    refuse_others(read_trials(study), space)
    seconds_noted(study)
    if at_random := drawn_at_random(config, space):
        names = ", ".join(at_random)
        progress.line(f"tune: tune.sampler={config.tune.sampler} cannot model these keys, and draws at random: {names}")
    # Running trials of another command would look like those of a killed command.
    with (
        held(directory, progress.line),
        Clock(study) as clock,
        Tracker(config, directory.name, "tune") as tracker,
        JobRecord(config, directory.name, "tune") as record,
    ):
        record.uses({"tune": directory.path})
        display = SearchDisplay(config, progress, read_trials(study), num_trials(config, space), clock)
        tracker.end_orphans()
        display.record_ended(tracker)
        if display.left:
            many = config.distill.most_workers > 1
            with ray_cluster(config, reserved=RESERVED if many else 0.0, dashboard=many) as plan:
                layout = plan_trials(config, plan)
                prepared = _prepare(groups, space, progress)
                make_job = _job_maker(config, space, prepared, record)
                for line in _forecast(config, prepared[_OWN], layout, display.left, make_job(None)[0]):
                    progress.line(line)
                with display.shown(tracker):
                    run_trials(config, space, study, make_job, layout, display)
        trials = read_trials(study)
        drop_pruned(trials, workspace_root(config))
        best, front = _best(config, study, trials)
        settings = {} if best.own else space.settings(best.choices)
        gains, retrained = confirm(config, settings, progress, tracker)
        training = sum(trial.seconds for trial in trials) + retrained
        seconds = clock.seconds
        progress.line(f"tune: {minutes(seconds)} by the clock, all commands; the trainings sum to {minutes(training)}")
        cost, verdict = search_cost(config, seconds), search_verdict(config, best, trials, gains)
        search = Search(directory.path, trials, best.number, settings, front, gains, seconds, training, cost, verdict)
        _write(search, study, directory, config)
        record.results({}, f"{directory.path}/search.html")
        shown = {f"best_{name}": value for name, value in zip(config.tune.objectives, best.values or (), strict=True)}
        tracker.parent.log(shown | {f"gain_{gain.split}": gain.gain for gain in gains})
        tracker.parent.note({"verdict": search.verdict})
        tracker.parent.files([f"{directory.path}/{name}" for name in ("search.html", "search.json", "best.yaml")])
    return search


_OWN, _MOST_SHOWN = "own", 10
_OF_FINE_TUNING = ("distill.precision", "distill.channels_last")


def _without_tracking(config: RunConfig) -> RunConfig:
    return overlay(config, {"tracking": {"enabled": False}})


def _job_maker(config: RunConfig, space: Space, prepared: dict[str, Outcome], record: JobRecord) -> MakeJob:
    def make_job(choices: dict[str, Choice] | None) -> tuple[DistillJob, StageDirectory]:
        # The job's own trial is the job itself, without the space's fixed values.
        trial = config if choices is None else overlay(config, space.settings(choices))
        outcome = prepared[_OWN if choices is None else json.dumps(shared_part(choices))]
        assert outcome.samples is not None
        later = tuned(_without_tracking(trial), outcome.samples)
        assert later is not None, "a fine-tuned teacher is ready before the first trial"
        job, directory = distill_job(later, outcome)
        record.uses({f"trial_{directory.name.rpartition('-')[2]}": directory.path})
        return job, directory

    return make_job


def _may_need_teacher(group: RunConfig, space: Space) -> bool:
    """Whether the job, or a value of the space, has a loss term that needs the teacher."""
    searched = any(key.partition(".")[0] == "loss" for key in space.entries)
    return group.loss.needs_teacher or (group.teacher is not None and searched)


def _groups(config: RunConfig, space: Space) -> dict[str, RunConfig]:
    """The jobs that the stages before `distill` run: the job's own values, and each combination of the space."""
    shared = space.shared()
    if len(shared) > max(config.tune.trials, 1):
        raise ConfigError(
            f"the space has {len(shared)} combinations of keys that change the stages before training, more than the "
            f"{config.tune.trials} trials; remove some, or raise --trials"
        )
    chosen = {json.dumps(one): overlay(config, space.settings(one)) for one in shared}
    return {key: _without_tracking(group) for key, group in {_OWN: config, **chosen}.items()}


def _prepare(groups: dict[str, RunConfig], space: Space, progress: Progress) -> dict[str, Outcome]:
    """Run the stages before `distill`, once for equal groups."""
    prepared: dict[str, Outcome] = {}
    for key, group in groups.items():
        if twin := next((other for other in prepared if groups[other] == group), None):
            prepared[key] = prepared[twin]
            continue
        ready = overlay(group, {"loss": {"kd_weight": 1}}) if _may_need_teacher(group, space) else group
        prepared[key] = run_stages(ready, progress, "teach")
    return prepared


def _check(config: RunConfig, space: Space, groups: dict[str, RunConfig]) -> None:
    check_measurable(config, "tune", ("val",))
    if config.teacher is not None and config.teacher.head == "fine_tune":
        if fixed := sorted(space.all_keys() & set(_OF_FINE_TUNING)):
            raise ConfigError(
                f"{fixed[0]}: teacher.head=fine_tune trains the teacher with it too, so each value would need another "
                "teacher; remove it from the space"
            )
    if config.tune.sampler == "cmaes" and len(config.tune.objectives) > 1:
        raise ConfigError("tune.sampler=cmaes takes one objective; set tune.sampler=tpe, or give one objective")
    drawn_at_random(config, space)
    if config.cluster.address is None:
        here, reserved = local_plan(config), RESERVED if config.distill.most_workers > 1 else 0.0
        plan_trials(config, plan_resources(config, here.cpus - reserved, here.gpus, int(here.cpus)))
    for group in groups.values():
        if group.views.per_image == "fresh" and _may_need_teacher(group, space):
            raise ConfigError(
                "views.per_image=fresh would run the teacher again in every trial; set a number of stored views"
            )
        check_run(group, find_work(group, "distill"))
    if config.tune.sampler == "grid":
        space.grid()
    num_classes = len(list_images(config.images).classes)
    for key, entry in space.entries.items():
        if key in ("student", "student.model"):
            for label in entry.choices or [None]:
                build_student(overlay(config, space.settings({key: label})).student, num_classes)


def _forecast(config: RunConfig, own: Outcome, layout: TrialResources, left: int, job: DistillJob) -> list[str]:
    step = seconds_per_step(job, layout.plan.train_threads)
    each = None if step is None else job.total_steps * step / config.distill.most_workers
    # A new seed repeats these stages: the split, the teacher's head and the soft targets depend on the seed.
    before = sum(read_seconds(path) for path in own.directories.values())
    return forecast_lines(config, left, layout.together, each, before)


def _best(config: RunConfig, study: optuna.Study, trials: list[Trial]) -> tuple[Trial, list[int]]:
    """The best trial by the first objective (of equal ones the earlier), and the Pareto front."""
    complete = [trial for trial in trials if trial.state == "complete"]
    if not complete:
        # Count reasons that differ only in their numbers, such as the step of a NaN loss, as one.
        reasons = [trial.reason or trial.state for trial in trials]
        counts = Counter(re.sub(r"[\d.]+", "#", reason) for reason in reasons)
        first = {re.sub(r"[\d.]+", "#", reason): reason for reason in reversed(reasons)}
        counted = "\n".join(f"  {count} x {first[kind]}" for kind, count in counts.most_common())
        raise StageError(f"tune: none of the {len(trials)} trials is complete:\n{counted}")
    front = [t.number for t in study.best_trials] if len(config.tune.objectives) > 1 else []
    candidates = [trial for trial in complete if not front or trial.number in front]
    return ranked(candidates, config.tune.objectives)[0], front


def _write(search: Search, study: optuna.Study, directory: StageDirectory, config: RunConfig) -> None:
    directory.write("best.yaml", as_yaml(search.best).encode())
    directory.write_json("search.json", {**asdict(search), "objectives": config.tune.objectives})
    directory.write("search.html", _page(search, study, config))
    directory.finish({"path": directory.path, "verdict": search.verdict, "trials": len(search.trials)})


def _page(search: Search, study: optuna.Study, config: RunConfig) -> bytes:
    names, counts = config.tune.objectives, Counter(trial.state for trial in search.trials)
    best = ranked(search.trials, names)
    (chosen,) = (trial for trial in best if trial.number == search.best_number)
    own = next((trial.values[0] for trial in best if trial.own and trial.values), None)
    more = [
        f"{counts[state]} {words}"
        for state, words in (("pruned", "ended early"), ("failed", "failed"))
        if counts[state]
    ]
    tiles = [
        (f"{value:.4g}", f"{name} of trial {chosen.number}")
        for name, value in zip(names, chosen.values or (), strict=False)
    ]
    tiles += [] if own is None else [(f"{own:.4g}", f"{names[0]} with the job's own values")]
    tiles += [(str(len(search.trials)), ", ".join(["trials", *more])), (minutes(search.seconds), "by the clock")]
    rows = [
        [f"{trial.number}", *(f"{value:.4g}" for value in trial.values or ()), f"{trial.seconds:.0f} s",
         "the job's own values" if trial.own else settings_words(trial.choices)]
        for trial in best[:_MOST_SHOWN]
    ]  # fmt: skip
    return search_page(
        study, names, name=job_name(config), when=datetime.now(UTC), verdict=search.verdict, tiles=tiles,
        best=Table(["trial", *names, "took", "settings"], rows),
    )  # fmt: skip

"""tune: search a space of settings with one student a trial and no pass of the teacher, and say what it gained.

Every trial is an ordinary run of the job under an overlay, so `raydistill run JOB best.yaml` finds its student trained.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import optuna

from raydistill.cluster.plan import local_plan, plan_resources
from raydistill.cluster.session import ray_cluster
from raydistill.config import RunConfig, overlay
from raydistill.data.sources.listing import list_images
from raydistill.documents import as_yaml
from raydistill.engine.batches import DistillJob
from raydistill.errors import ConfigError, StageError
from raydistill.graph import find_work
from raydistill.identity import stage_directory, tuned
from raydistill.models.student import build_student
from raydistill.pages.study import search_page
from raydistill.preflight import check_measurable, check_run
from raydistill.results import Outcome
from raydistill.run import run_stages
from raydistill.runtime.progress import Progress
from raydistill.search.display import Clock, SearchDisplay, minutes
from raydistill.search.significance import LEVEL, Answers, align, difference, needed_words, p_words, read_answers
from raydistill.search.space import Choice, Distribution, Space, read_space, shared_part
from raydistill.search.study import (
    MAXIMISED,
    Trial,
    drawn_at_random,
    drop_pruned,
    num_trials,
    open_study,
    read_trials,
    refuse_others,
    seconds_noted,
)
from raydistill.search.trials import RESERVED, Layout, MakeJob, lay_out, run_trials, seconds_per_step
from raydistill.secrets import redacted_tree, without_secrets
from raydistill.stages.distill import distill_job
from raydistill.storage.directory import StageDirectory, check_writable, read_seconds, workspace_root
from raydistill.storage.lease import held
from raydistill.storage.state import needed_state
from raydistill.tracking.tracker import Tracker


@dataclass(frozen=True)
class Gain:
    """The best settings against the job's own over new seeds, paired by seed and image: means, and the gain with its
    95 % interval over seeds and images; with one seed over images alone, and without a p-value."""

    split: str
    own: float
    best: float
    gain: float
    low: float
    high: float
    p_value: float | None
    needed: str  # in words: what would tell it from chance


@dataclass(frozen=True)
class Search:
    """What a search came to. `best` is the overlay of its best trial."""

    path: str
    trials: list[Trial]
    best_number: int
    best: dict[str, Any]
    front: list[int]  # of several objectives: the trials that no other beats in all
    confirmed: list[Gain]
    seconds: float  # by the clock, of all commands that worked on it
    training_seconds: float  # of all trials and retrainings, those that ran at once counted each
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
    check_writable(config)
    directory = _directory(config, space, progress)
    directory.begin()
    study = open_study(config, directory, space.own(config))
    refuse_others(read_trials(study), space)
    seconds_noted(study)
    if at_random := drawn_at_random(config, space):
        progress.line(f"tune: tune.sampler={config.tune.sampler} draws at random, and learns nothing of: "
                      f"{', '.join(at_random)}")  # fmt: skip
    # Trials that another command has begun would look like those of a killed one.
    with (
        held(directory, progress.line),
        Clock(study) as clock,
        Tracker(config, directory.name, "tune") as tracker,
    ):
        watcher = SearchDisplay(config, progress, read_trials(study), num_trials(config, space), clock)
        tracker.end_orphans()
        watcher.record_ended(tracker)
        if watcher.left:
            many = config.distill.most_workers > 1
            with ray_cluster(config, reserved=RESERVED if many else 0.0, dashboard=many) as plan:
                layout = lay_out(config, plan)
                prepared = _prepare(groups, space, progress)
                _forecast(config, prepared, layout, watcher.left, progress)
                with watcher.shown(tracker):
                    run_trials(config, space, study, _job_maker(config, space, prepared), layout, watcher)
        trials = read_trials(study)
        drop_pruned(trials, workspace_root(config))
        best, front = _best(config, study, trials)
        settings = {} if best.own else space.settings(best.choices)
        gains, retrained = _confirm(config, settings, progress, tracker)
        training = sum(trial.seconds for trial in trials) + retrained
        seconds = clock.seconds
        progress.line(f"tune: {minutes(seconds)} by the clock, over all commands; {minutes(training)} of trials and "
                      "retrainings, those that ran at once counted each")  # fmt: skip
        search = Search(
            directory.path, trials, best.number, settings, front, gains, seconds, training, _cost(config, seconds),
            _verdict(config, best, trials, gains),
        )  # fmt: skip
        _write(search, study, directory, config)
        shown = {f"best_{name}": value for name, value in zip(config.tune.objectives, best.values or (), strict=True)}
        tracker.parent.log(shown | {f"gain_{gain.split}": gain.gain for gain in gains})
        tracker.parent.note({"verdict": search.verdict})
        tracker.parent.files([f"{directory.path}/{name}" for name in ("search.html", "search.json", "best.yaml")])
    return search


_OWN = "own"
_OF_FINE_TUNING = ("distill.precision", "distill.channels_last")


def _key(shared: dict[str, Choice]) -> str:
    return json.dumps(shared)


def _quiet(config: RunConfig) -> RunConfig:
    return overlay(config, {"tracking": {"enabled": False}})


def _samples(outcome: Outcome) -> Any:
    assert outcome.samples is not None
    return outcome.samples


def _job_maker(config: RunConfig, space: Space, prepared: dict[str, Outcome]) -> MakeJob:
    def make_job(choices: dict[str, Choice] | None) -> tuple[DistillJob, StageDirectory]:
        # The job's own trial is the job itself: what the space fixes is no part of it.
        trial = _quiet(config if choices is None else overlay(config, space.settings(choices)))
        outcome = prepared[_OWN if choices is None else _key(shared_part(choices))]
        later = tuned(trial, _samples(outcome))
        assert later is not None, "a fine-tuned teacher is ready before the first trial"
        return distill_job(later, outcome)

    return make_job


def _may_need_teacher(group: RunConfig, space: Space) -> bool:
    """Where the space may turn a term on that needs the teacher, the teacher has to be ready."""
    searched = any(key.partition(".")[0] == "loss" for key in space.entries)
    return group.loss.needs_teacher or (group.teacher is not None and searched)


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
        ready = overlay(group, {"loss": {"kd_weight": 1}}) if _may_need_teacher(group, space) else group
        prepared[key] = run_stages(ready, progress, "teach")
    return prepared


def _check(config: RunConfig, space: Space, groups: dict[str, RunConfig]) -> None:
    check_measurable(config, "tune", ("val",))
    if config.teacher is not None and config.teacher.head == "fine_tune":
        if fixed := sorted(space.all_keys() & set(_OF_FINE_TUNING)):
            raise ConfigError(
                f"{fixed[0]}: teacher.head=fine_tune trains the teacher in this way too, so each of its values would "
                "cost a teacher; take it out of the space"
            )
    if config.tune.sampler == "cmaes" and len(config.tune.objectives) > 1:
        raise ConfigError("tune.sampler=cmaes takes one objective; set tune.sampler=tpe, or give one of them")
    drawn_at_random(config, space)
    if config.cluster.address is None:
        here, reserved = local_plan(config), RESERVED if config.distill.most_workers > 1 else 0.0
        lay_out(config, plan_resources(config, here.cpus - reserved, here.gpus, int(here.cpus)))
    for group in groups.values():
        if group.views.per_image == "fresh" and _may_need_teacher(group, space):
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
    left_out = {"workspace", "cluster", "tracking", "name", "export", "compare", "tune"}
    settings = config.tune.model_dump(include={"sampler", "pruner", "grace_epochs", "objectives"})
    identity = {
        "config": redacted_tree(config.model_dump(mode="json", exclude=left_out), without_secrets),
        "files": list_images(config.images).fingerprint,
        "space": [[key, _identity(entry)] for key, entry in space.entries.items()],
        "tune": settings,
    }
    directory = stage_directory(config, "tune", identity)
    if not directory.started():
        for line in _differences(config, directory):
            progress.line(line)
    return directory


def _identity(entry: Distribution) -> dict[str, Any]:
    """In lists, whose order counts: what is drawn depends on that of keys and of labels."""
    dump = entry.model_dump(by_alias=True, exclude_unset=True)
    if isinstance(entry.categorical, dict):
        dump["categorical"] = [[label, value] for label, value in entry.categorical.items()]
    return dump


def _differences(config: RunConfig, directory: StageDirectory) -> list[str]:
    """What a new search of a job differs in from the latest one before it."""
    fs, mine = directory.fs, json.loads(directory.identity)
    root = directory.place.rpartition("/")[0]
    names = [name for name in fs.names(root) if name.startswith("tune-")]
    paths = [path for name in names if fs.exists(path := f"{root}/{name}/identity.json")]
    for path in sorted(paths, key=fs.modified, reverse=True):
        other = needed_state(f"{directory.path.rpartition('/')[0]}{path.removeprefix(root)}", dict[str, Any])
        if (other.get("config"), other.get("files")) == (mine["config"], mine["files"]):
            before, after = (json.dumps({k: t.get(k) for k in ("format", "space", "tune")}, indent=1).splitlines()
                             for t in (other, mine))  # fmt: skip
            changes = list(difflib.unified_diff(before, after, n=0, lineterm=""))[3:]
            shown = [line for line in changes if not line.startswith("@@")]
            return [f"tune: a new search, since this changed from the one in {path.rpartition('/')[0]}:",
                    *(f"  {line}" for line in shown)]  # fmt: skip
    return []


def _forecast(config: RunConfig, prepared: dict[str, Outcome], layout: Layout, left: int, progress: Progress) -> None:
    """What the search will take: a few steps of the job's own student, times all of them."""
    outcome = prepared[_OWN]
    later = tuned(_quiet(config), _samples(outcome))
    assert later is not None
    job, _ = distill_job(later, outcome)
    step = seconds_per_step(job, layout.plan.train_threads)
    each = None if step is None else job.total_steps * step / config.distill.most_workers
    # What a new seed costs before it trains: the split, the teacher's head and its soft targets depend on it.
    before = sum(read_seconds(path) for path in outcome.directories.values())
    for line in forecast_lines(config, left, layout.together, each, before):
        progress.line(line)


def forecast_lines(config: RunConfig, left: int, together: int, each: float | None, before: float) -> list[str]:
    """The forecast in words: `left` trials of `each` seconds, and to confirm two trainings for each new seed, after the
    stages `before` them."""
    lines = [f"tune: {left} trials, {together} at a time"]
    seeds = config.tune.confirm_seeds
    confirming = f"; then {2 * seeds} trainings with {seeds} new seed(s) to confirm" if seeds else ""
    if each is None:
        return [f"{lines[0]}{confirming}: how long is unknown, since a first few steps of the job's own student failed"]
    trials, again = math.ceil(left / together) * each, seeds * (2 * each + before)
    early = "" if config.tune.pruner == "none" else "; less where trials fall behind and end early"
    lines[0] += f", of about {each:.0f} s each: about {minutes(trials)}{early}"
    if seeds:
        stages = f", {before:.0f} s of earlier stages for each" if before else ""
        lines.append(f"tune:{confirming[1:]}{stages}: about {minutes(again)}")
    cost = _cost(config, trials + again)
    money = "" if cost is None else f", {cost:.2f} at {config.cluster.price_per_hour:g} an hour"
    return [*lines, f"tune: about {minutes(trials + again)} in all{money}"]


def _cost(config: RunConfig, seconds: float) -> float | None:
    """Of all machines for so long by the clock."""
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
    answers: dict[str, dict[str, list[Answers]]] = {"val": {"own": [], "best": []}, "test": {"own": [], "best": []}}
    stages: set[str] = set()  # both share some
    for number in range(1, config.tune.confirm_seeds + 1):
        for who, tree in (("own", {}), ("best", settings)):
            again = _quiet(overlay(config, {**tree, "seed": config.seed + number}))
            progress.line(f"tune: confirming, {who} settings with seed {again.seed}")
            with tracker.child(f"confirm {who}, seed {again.seed}") as record:
                outcome = run_stages(again, progress)
                record.data(again, _samples(outcome))
                report = outcome.report
                assert report is not None
                for split, of_split in answers.items():
                    if split in report.student:
                        of_split[who].append(read_answers(report.path, split))
                        record.log({f"{split}_accuracy": float(of_split[who][-1].right.mean())})
            stages |= set(outcome.directories.values())
    return gains_of(answers), sum(read_seconds(path) for path in stages)


def gains_of(answers: dict[str, dict[str, list[Answers]]]) -> list[Gain]:
    """By split, where there are answers of the `own` and the `best` settings; one a seed."""
    gains = []
    for split, of_split in answers.items():
        if of_split["own"]:
            own_SN, best_SN = align([of_split["own"], of_split["best"]])
            gain = difference(best_SN, own_SN)
            own, best = (float(np.mean([one.right.mean() for one in of_split[who]])) for who in ("own", "best"))
            needed = needed_words(gain, LEVEL, "tune.confirm_seeds")
            gains.append(Gain(split, own, best, gain.mean, *gain.interval(), gain.p_value(), needed))
    return gains


def _verdict(config: RunConfig, best: Trial, trials: list[Trial], gains: list[Gain]) -> str:
    name = config.tune.objectives[0]
    assert best.values is not None
    own = next((t.values[0] for t in trials if t.own and t.values), None)
    failed = sum(trial.state == "failed" for trial in trials)
    lost = f" ({failed} failed, see search.json)" if failed else ""
    words = f"Trial {best.number} of {len(trials)}{lost} is best: {name} {best.values[0]:.4g}"
    if best.own:
        return f"{words}, with the job's own values. Keep them; no trial of this space was better."
    words += "" if own is None else f" against {own:.4g} with the job's own values"
    if not gains:
        return f"{words}. A search flatters what it finds: confirm it with tune.confirm_seeds=3."
    shown = [f"{100 * g.gain:+.1f} points on {g.split} ({100 * g.low:+.1f} to {100 * g.high:+.1f})" for g in gains]
    words += f". With {config.tune.confirm_seeds} new seed(s) it gains {' and '.join(shown)}"
    # The search chose by val, which flatters what it found there even with new seeds: test decides where there is one.
    last = gains[-1]
    if last.p_value is None:
        return f"{words}; {last.needed}."
    if last.gain <= 0:
        return f"{words}: keep the job's own values; the search found what suits one val split."
    if last.p_value < LEVEL:
        flattered = ", by which the search chose" if last.split == "val" else ""
        return f"{words}; on {last.split}{flattered}, p {p_words(last.p_value, '= ')}: run the job with best.yaml."
    return f"{words}; on {last.split} p = {last.p_value:.2f}, so this may be chance: {last.needed}."


def _write(search: Search, study: optuna.Study, directory: StageDirectory, config: RunConfig) -> None:
    directory.write("best.yaml", as_yaml(search.best).encode())
    directory.write_json("search.json", {**asdict(search), "objectives": config.tune.objectives})
    directory.write("search.html", search_page(study, search.verdict, config.tune.objectives))
    directory.finish({"path": directory.path, "verdict": search.verdict, "trials": len(search.trials)})

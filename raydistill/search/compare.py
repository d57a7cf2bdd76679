"""compare: train one student in several ways (arms) on the same data with the same number of steps.

Every arm is an ordinary run of the job with an overlay. So arms share stages, an interrupted comparison resumes, and
`jobs/overlays/<arm>.yaml` repeats a single arm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from raydistill.cluster.session import ray_cluster
from raydistill.config import RunConfig, merged
from raydistill.config.baselines import OVERLAYS
from raydistill.data.sources.listing import list_images
from raydistill.errors import ConfigError
from raydistill.generation.pipelines import inspect_pipeline
from raydistill.graph import find_work, stage_named
from raydistill.identity import stage_directory
from raydistill.preflight import check_measurable, check_run
from raydistill.run import run_stages
from raydistill.runtime.progress import Progress
from raydistill.search.arms import Arm, arm_of
from raydistill.search.directory import trained_settings
from raydistill.search.page import comparison_page
from raydistill.search.verdict import Comparison, summarise
from raydistill.storage.directory import StageDirectory, check_writable
from raydistill.storage.jobs import JobRecord, job_name
from raydistill.tracking.tracker import Tracker

_GENERATED = "+generated"
_UNJUDGED: dict[str, Any] = {"confidence": None, "class_confidence": {}, "agreement": False, "weigh": False}


@dataclass(frozen=True)
class _Trial:
    """One run of the comparison."""

    arm: str
    seed: int
    config: RunConfig
    label_share: float = 1.0

    @property
    def name(self) -> str:
        share = "" if self.label_share == 1 else f" with {self.label_share:.1%} of the labels"
        return f"{self.arm}, seed {self.seed}{share}"


def compare_arms(config: RunConfig, progress: Progress, learning_curve: bool = False) -> tuple[Comparison, str]:
    """Run every arm with every seed, skip finished runs, and return the comparison and its directory.

    Raises ConfigError before it starts: an arm has no pre-trained weights for its student, or no teacher for its loss.
    """
    arms = _arms(config, progress)
    trials = [_trial(config, arm, seed) for seed in _seeds(config) for arm in arms]
    check_measurable(config, "compare", ("val", "test"))
    _check(config, trials)
    if learning_curve:
        _check(config, [_trial(config, _curve_arm(config), config.seed)])
    check_writable(config)
    directory = _directory(config, trials, learning_curve)
    with Tracker(config, directory.name, "compare") as tracker, JobRecord(config, directory.name, "compare") as record:
        record.uses({"compare": directory.path})
        needs_ray = learning_curve or any(find_work(t.config, "evaluate").needs_ray for t in trials)
        with ray_cluster(config) if needs_ray else contextlib.nullcontext():
            ran = [_run(trial, progress, tracker) for trial in _told(trials, progress)]
            curve = []
            if learning_curve:
                shares = _curve_trials(config, progress)
                curve = [_run(trial, progress, tracker) for trial in _told(shares, progress)]
        comparison = summarise(ran, curve, config.compare.seeds)
        _write(comparison, directory, config)
        record.results({}, f"{directory.path}/compare.html")
        tracker.parent.log({f"{row.arm}_test_accuracy": row.test_mean for row in comparison.rows})
        tracker.parent.note({"verdict": comparison.verdict})
        if "://" not in directory.path:
            tracker.parent.files([directory.path], "compare")
    return comparison, directory.path


def _seeds(config: RunConfig) -> range:
    return range(config.seed, config.seed + config.compare.seeds)


def _arms(config: RunConfig, progress: Progress) -> list[str]:
    """Each arm without generated images and, if the job generates, with them. Images of an unconditional pipeline have
    no labels, so an arm without a teacher cannot use them; a line names it, and it is left out."""
    if config.generate is None:
        return list(config.compare.arms)
    both = [f"{arm}{_GENERATED}" for arm in config.compare.arms]
    if inspect_pipeline(config.generate).kind == "none":
        without = [arm for arm in both if not _trial(config, arm, config.seed).config.loss.needs_teacher]
        both = [arm for arm in both if arm not in without]
        for arm in without:
            progress.line(
                f"compare:  {arm} is left out: the images of an unconditional pipeline have no labels, and this arm "
                "has no teacher"
            )
    return [*config.compare.arms, *both]


def _trial(config: RunConfig, name: str, seed: int, num_labelled: int | None = None, share: float = 1.0) -> _Trial:
    tree, arm = config.model_dump(mode="json"), name.removesuffix(_GENERATED)
    if arm == name:
        tree["generate"] = None
    elif OVERLAYS[arm].get("teacher", tree["teacher"]) is None:
        # Without a teacher the filter cannot judge the images, and the student can learn from their labels only.
        tree["generate"]["filter"] |= _UNJUDGED
        tree["generate"]["task_weight"] = tree["generate"]["task_weight"] or 1.0
    overlay: dict[str, Any] = {**OVERLAYS[arm], "seed": seed, "tracking": {"enabled": False}}
    if overlay.get("student", {}).get("init") == "pretrained":
        overlay["student"] = {**overlay["student"], "weights": config.compare.student_weights or config.student.weights}
    if num_labelled is not None:
        overlay["images"] = {"num_labelled": num_labelled}
    try:
        return _Trial(name, seed, RunConfig.model_validate(merged(tree, overlay)), share)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"compare.arms: {name} cannot be trained with this job: {reason}") from None


def _check(config: RunConfig, trials: list[_Trial]) -> None:
    seen = set()
    for trial in trials:
        if trial.arm in seen:
            continue
        seen.add(trial.arm)
        work = find_work(trial.config, "evaluate")
        try:
            check_run(trial.config, work)
        except ConfigError as error:
            if trial.config.student.init != "pretrained":
                raise
            inits = {arm: _trial(config, arm, config.seed).config.student.init for arm in config.compare.arms}
            others = [arm for arm, init in inits.items() if init == "random"]
            raise ConfigError(
                f"compare: {trial.arm} starts from a pre-trained student: {error}. Set compare.student_weights to its "
                f"weights, or leave such arms out: compare.arms=[{','.join(others)}]"
            ) from None


def _told(trials: list[_Trial], progress: Progress) -> Iterator[_Trial]:
    for number, trial in enumerate(trials, start=1):
        progress.line(f"compare:  {number} of {len(trials)}: {trial.name}")
        yield trial


def _run(trial: _Trial, progress: Progress, tracker: Tracker) -> Arm:
    sections = set(stage_named("distill").settings)
    settings = {"arm": trial.arm, "label_share": trial.label_share}
    with tracker.child(
        trial.name, settings=settings | trial.config.resolved.model_dump(mode="json", include=sections)
    ) as record:
        outcome = run_stages(trial.config, progress)
        arm = arm_of(trial.arm, trial.seed, trial.label_share, outcome)
        assert outcome.samples is not None
        record.data(trial.config, outcome.samples)
        numbers = {key: float(v) for key, v in vars(arm).items() if isinstance(v, int | float)}
        record.log(numbers | {"test_accuracy": arm.test_accuracy})
        record.log_each(lambda: [(epoch, int(epoch["step"])) for epoch in arm.epochs])
    return arm


def _curve_arm(config: RunConfig) -> str:
    """The distilled arm that the learning curve shows beside scratch."""
    return next((a for a in config.compare.arms if a in ("align_uniform", "job", "crd", "kd")), "align_uniform")


def _curve_trials(config: RunConfig, progress: Progress) -> list[_Trial]:
    """Scratch and the distilled arm at each share of the labels. An image that loses its label stays as an unlabelled
    image, which only a teacher can use."""
    distilled = _curve_arm(config)
    found = []
    for seed in _seeds(config):
        samples = run_stages(_trial(config, "scratch", seed).config, progress, until="prepare").samples
        assert samples is not None
        for share in config.compare.label_shares:
            count = max(len(samples.classes), round(share * samples.num_labelled["train"]))
            limit = None if share == 1 else count
            found += [_trial(config, arm, seed, limit, share) for arm in ("scratch", distilled)]
    return found


def _directory(config: RunConfig, trials: list[_Trial], learning_curve: bool) -> StageDirectory:
    identity = {
        "trials": [[t.arm, t.seed, trained_settings(t.config)] for t in trials],
        "files": list_images(config.images).fingerprint,
        "learning_curve": list(config.compare.label_shares) if learning_curve else None,
    }
    directory = stage_directory(config, "compare", identity)
    directory.begin()
    return directory


def _write(comparison: Comparison, directory: StageDirectory, config: RunConfig) -> None:
    directory.write_json("compare.json", asdict(comparison))
    directory.write("compare.md", comparison.markdown(job_name(config)).encode())
    directory.write("compare.html", comparison_page(comparison, job_name(config)))
    directory.finish({"path": directory.path, "verdict": comparison.verdict})

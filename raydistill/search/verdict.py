"""What a comparison says: means with intervals, paired tests, seconds, and one sentence to act on.

Arms are ranked and chosen by val accuracy; test accuracy is what is reported of the choice and chooses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from raydistill.infra.artifacts import read_seconds
from raydistill.stages.distill import read_epochs
from raydistill.stages.run import Outcome

BASELINES = ("scratch", "linear_probe", "fine_tune")
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Arm:
    """One run: shares of right answers, and seconds of each part of the work, shared or not."""

    arm: str
    seed: int
    label_share: float
    num_labelled: int
    val_accuracy: float
    test_accuracy: float
    adapt_seconds: float
    generate_seconds: float
    teach_seconds: float
    train_seconds: float
    steps: int
    epochs: list[dict[str, float]]
    seconds_by_epoch: list[float]  # of training, up to the end of each epoch

    @property
    def seconds(self) -> float:
        return self.seconds_before + self.train_seconds

    @property
    def seconds_before(self) -> float:
        return self.adapt_seconds + self.generate_seconds + self.teach_seconds


@dataclass(frozen=True)
class Row:
    """One arm over its seeds. `test_low` and `test_high` bound the mean with 95 % confidence (Student's t over seeds);
    None with a single seed. `gain` is test accuracy above the best baseline's, paired by seed, and `p_value` that of
    the paired t-test; None for that baseline itself and with a single seed."""

    arm: str
    seeds: list[int]
    val: list[float]  # accuracy by seed
    test: list[float]
    val_mean: float
    test_mean: float
    test_low: float | None
    test_high: float | None
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    p_value: float | None
    adapt_seconds: float
    generate_seconds: float
    teach_seconds: float
    train_seconds: float
    seconds: float
    seconds_to_baseline: float | None
    steps: int


@dataclass(frozen=True)
class Comparison:
    rows: list[Row]
    curve: list[dict[str, Any]]
    best_baseline: str | None
    best: str
    verdict: str
    curve_verdict: str | None
    num_seeds: int

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Titles and cells, the best by val first."""
        titles = ["arm", "val", "test", f"{_CONFIDENCE:.0%} interval", f"gain over {self.best_baseline or 'none'}", "p",
                  "adapt s", "generate s", "teach s", "train s", "total s", "s to baseline", "steps"]  # fmt: skip
        cells = []
        for row in self.rows:
            gain = (
                "" if row.gain is None else f"{100 * row.gain:+.1f}" + _bounds(row.gain_low, row.gain_high, 100, "+.1f")
            )
            cells.append([
                row.arm, f"{row.val_mean:.3f}", f"{row.test_mean:.3f}",
                _bounds(row.test_low, row.test_high, 1, ".3f").strip() or "one seed", gain,
                "" if row.p_value is None else f"{row.p_value:.3f}",
                f"{row.adapt_seconds:.0f}", f"{row.generate_seconds:.0f}", f"{row.teach_seconds:.0f}",
                f"{row.train_seconds:.0f}", f"{row.seconds:.0f}",
                "never" if row.seconds_to_baseline is None else f"{row.seconds_to_baseline:.0f}", f"{row.steps:,}",
            ])  # fmt: skip
        return titles, cells

    def markdown(self, name: str) -> str:
        titles, cells = self.table()
        lines = [f"# {name}: {self.num_seeds} seed(s)", "", self.verdict, ""]
        lines += ["| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *cells)]
        if self.curve_verdict:
            lines += ["", self.curve_verdict]
        lines += ["", NOTES]
        return "\n".join(lines) + "\n"


NOTES = (
    "All arms take the same number of steps with the same batch size, and none was tuned for this data. Arms are "
    "ranked by mean val accuracy; gains are test accuracies in points, paired by seed. Seconds are those of this "
    "machine; a stage that arms share counts in full for each, and generating by the seconds of its actors. Seconds to "
    "baseline: until the val accuracy first reaches what the best baseline ended with on the same seed, all that came "
    "before training included; never: not with every seed."
)


def arm_of(name: str, seed: int, label_share: float, outcome: Outcome) -> Arm:
    """The figures of a finished run, read from its stage directories, whichever command made them."""
    report, samples, student = outcome.report, outcome.samples, outcome.student
    assert report is not None
    assert samples is not None
    assert student is not None
    epochs = read_epochs(student.path)
    spent = training_seconds(epochs, student.batch_size)
    seconds = {stage: read_seconds(path) for stage, path in outcome.directories.items()}
    return Arm(
        arm=name,
        seed=seed,
        label_share=label_share,
        num_labelled=samples.num_labelled["train"],
        val_accuracy=report.student["val"]["accuracy"],
        test_accuracy=report.student["test"]["accuracy"],
        adapt_seconds=sum(seconds.get(stage, 0.0) for stage in ("fine_tune", "features", "adapt")),
        generate_seconds=0.0 if outcome.generated is None else outcome.generated.actor_seconds,
        teach_seconds=seconds.get("teach", 0.0) + seconds.get("teach_generated", 0.0),
        train_seconds=spent[-1],
        steps=student.steps,
        epochs=epochs,
        seconds_by_epoch=spent,
    )


def training_seconds(epochs: list[dict[str, float]], batch_size: int) -> list[float]:
    """Seconds of training up to the end of each epoch, from the rates: measuring val does not count, and a resumed
    epoch counts once."""
    steps = np.diff([0.0, *(epoch["step"] for epoch in epochs)])
    return list(
        np.cumsum([batch_size * n / epoch["images_per_second"] for n, epoch in zip(steps, epochs, strict=True)])
    )


def summarise(arms: list[Arm], curve: list[Arm], num_seeds: int) -> Comparison:
    """Tables and verdict of the runs of all arms over the same seeds."""
    by_arm: dict[str, list[Arm]] = {}
    for arm in arms:
        by_arm.setdefault(arm.arm, []).append(arm)
    val = {name: float(np.mean([run.val_accuracy for run in runs])) for name, runs in by_arm.items()}
    baselines = [name for name in by_arm if name in BASELINES]
    best_baseline = max(baselines, key=val.__getitem__) if baselines else None
    rows = [_row(runs, by_arm.get(best_baseline or "")) for runs in by_arm.values()]
    rows.sort(key=lambda row: -row.val_mean)
    points = _curve_points(curve)
    return Comparison(
        rows=rows,
        curve=points,
        best_baseline=best_baseline,
        best=rows[0].arm,
        verdict=_verdict(rows, best_baseline),
        curve_verdict=_curve_verdict(points) if points else None,
        num_seeds=num_seeds,
    )


def _row(runs: list[Arm], baseline: list[Arm] | None) -> Row:
    test = [run.test_accuracy for run in runs]
    low, high = mean_interval(test)
    gain = gain_low = gain_high = p_value = None
    if baseline is not None and baseline is not runs:
        gains = [run.test_accuracy - other.test_accuracy for run, other in zip(runs, baseline, strict=True)]
        gain, (gain_low, gain_high) = float(np.mean(gains)), mean_interval(gains)
        p_value = paired_p_value(gains)
    # Each seed against itself: it draws its own val split, and some are easier than others.
    pairs = zip(runs, baseline, strict=True) if baseline is not None else ()
    reached = [_seconds_to(run, other.val_accuracy) for run, other in pairs]
    times = [seconds for seconds in reached if seconds is not None]
    mean = {key: float(np.mean([getattr(run, key) for run in runs]))
            for key in ("val_accuracy", "adapt_seconds", "generate_seconds", "teach_seconds", "train_seconds",
                        "seconds")}  # fmt: skip
    return Row(
        arm=runs[0].arm,
        seeds=[run.seed for run in runs],
        val=[run.val_accuracy for run in runs],
        test=test,
        val_mean=mean["val_accuracy"],
        test_mean=float(np.mean(test)),
        test_low=low,
        test_high=high,
        gain=gain,
        gain_low=gain_low,
        gain_high=gain_high,
        p_value=p_value,
        adapt_seconds=mean["adapt_seconds"],
        generate_seconds=mean["generate_seconds"],
        teach_seconds=mean["teach_seconds"],
        train_seconds=mean["train_seconds"],
        seconds=mean["seconds"],
        seconds_to_baseline=float(np.mean(times)) if len(times) == len(runs) else None,
        steps=runs[0].steps,
    )


def mean_interval(values: list[float]) -> tuple[float | None, float | None]:
    """Student's t interval of the mean; (None, None) for a single value."""
    if len(values) < 2:
        return None, None
    half = stats.sem(values) * stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def paired_p_value(differences: list[float]) -> float | None:
    """Two-sided p-value of the paired t-test; None for a single pair; 1 where all are 0, 0 where all are equal."""
    if len(differences) < 2:
        return None
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _seconds_to(run: Arm, accuracy: float) -> float | None:
    """Until the val accuracy first reached `accuracy`; None where it never did."""
    for epoch, spent in zip(run.epochs, run.seconds_by_epoch, strict=True):
        if epoch.get("val_accuracy", -1.0) >= accuracy:
            return run.seconds_before + spent
    return None


def _verdict(rows: list[Row], best_baseline: str | None) -> str:
    best = rows[0]
    if best_baseline is None:
        return f"Ship {best.arm}: it has the best val accuracy, {best.test_mean:.3f} on test; no baseline was trained."
    base = next(row for row in rows if row.arm == best_baseline)
    if best is base:
        second = next((row for row in rows if not is_baseline(row.arm)), None)
        words = f"Ship {base.arm} ({base.test_mean:.3f} on test, {base.seconds:.0f} s)"
        if second is None:
            return f"{words}: nothing else was trained but baselines."
        return (
            f"{words}: no distilled arm has a better val accuracy; the nearest, {second.arm}, is "
            f"{_points(second)} on test at {second.seconds:.0f} s."
        )
    return (
        f"Ship {best.arm}: {best.test_mean:.3f} on test, {_points(best)} against {base.arm}, the best baseline, for "
        f"{best.seconds:.0f} s against {base.seconds:.0f} s; {_how_sure(best)}."
    )


def is_baseline(arm: str) -> bool:
    """An arm without a teacher, with generated images or without; gains are against those without."""
    return arm.removesuffix("+generated") in BASELINES


def _points(row: Row) -> str:
    assert row.gain is not None
    return f"{100 * row.gain:+.1f} points{_bounds(row.gain_low, row.gain_high, 100, '+.1f')}"


def _how_sure(row: Row) -> str:
    if row.p_value is None:
        return "one seed says nothing of how sure that is; use compare.seeds=3 or more"
    count = len(row.seeds)
    if row.p_value < 1 - _CONFIDENCE:
        return f"this is unlikely to be chance (paired t-test over {count} seeds, p = {row.p_value:.3f})"
    return f"this may be chance (paired t-test over {count} seeds, p = {row.p_value:.2f}); more seeds would tell"


def _bounds(low: float | None, high: float | None, factor: float, form: str) -> str:
    if low is None or high is None:
        return ""
    return f" ({factor * low:{form}} to {factor * high:{form}})"


def _curve_points(curve: list[Arm]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, float], list[Arm]] = {}
    for arm in curve:
        groups.setdefault((arm.arm, arm.label_share), []).append(arm)
    points = []
    for (name, share), runs in sorted(groups.items()):
        test = [run.test_accuracy for run in runs]
        low, high = mean_interval(test)
        points.append(
            {
                "arm": name,
                "label_share": share,
                "num_labelled": round(np.mean([run.num_labelled for run in runs])),
                "val_mean": float(np.mean([run.val_accuracy for run in runs])),
                "test_mean": float(np.mean(test)),
                "test_low": low,
                "test_high": high,
            }
        )
    return points


def _curve_verdict(points: list[dict[str, Any]]) -> str:
    """What the last doubling of the labels bought the distilled student, and what distilling buys at all labels."""
    distilled = sorted((p for p in points if p["arm"] != "scratch"), key=lambda p: p["label_share"])
    scratch = sorted((p for p in points if p["arm"] == "scratch"), key=lambda p: p["label_share"])
    if len(distilled) < 2:
        return "One share of the labels says nothing of a slope; give compare.label_shares two or more."
    slope = distilled[-1]["val_mean"] - distilled[-2]["val_mean"]
    ahead = distilled[-1]["val_mean"] - scratch[-1]["val_mean"]
    ratio = distilled[-1]["num_labelled"] / max(distilled[-2]["num_labelled"], 1)
    bought = (
        f"the last {ratio:.1f}-fold of labels bought the distilled student {100 * slope:+.1f} points of val accuracy"
    )
    if slope > 0.02:
        return f"More labels: {bought}, and the curve has not levelled off."
    if ahead > 0.02:
        return (
            f"More unlabelled or generated images rather than labels: {bought}, while distilling is still "
            f"{100 * ahead:+.1f} points ahead of scratch."
        )
    return (
        f"Nothing more of this kind: {bought}, and distilling is {100 * ahead:+.1f} points from scratch with "
        f"{distilled[-1]['num_labelled']} of them."
    )

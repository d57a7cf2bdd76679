"""What a comparison says: means with intervals, tests, seconds, and one sentence to act on.

Arms are ranked by val accuracy. What is said to be better is so on test, with images and seeds counted, and is claimed
of an arm against cheaper ones alone: k arms make k - 1 claims, "better than the cheapest" and, only where that holds,
"better than every cheaper one". Each is made at 5 % / (k - 1), so that all of them together are wrong no more than one
time in twenty (Bonferroni; that an arm beats *all* cheaper ones needs every one of its tests, and so no more shares).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raydistill.search.arms import BASELINES, Arm
from raydistill.search.learning_curve import learning_curve
from raydistill.search.significance import (
    LEVEL,
    Spread,
    accuracy_interval,
    align,
    difference,
    gain_words,
    needed_words,
    p_words,
)
from raydistill.strangers import markdown

_SECONDS = ("adapt_seconds", "generate_seconds", "teach_seconds", "train_seconds", "seconds")


@dataclass(frozen=True)
class Row:
    """One arm over its seeds. `test_low` and `test_high` bound the mean accuracy with 95 % confidence over images and
    seeds; with a single seed over images alone. `gain` is test accuracy above the cheapest arm's, paired by seed and
    image; its bounds hold for all arms at once, and `p_value` is corrected for their number; None for the cheapest
    itself, and `p_value` with a single seed. `is_better`: shown to be better than every cheaper arm."""

    arm: str
    seeds: list[int]
    val: list[float]  # accuracy by seed
    test: list[float]
    val_mean: float
    test_mean: float
    test_low: float
    test_high: float
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    p_value: float | None
    is_better: bool
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
    best_baseline: str | None  # by val
    best: str  # by val
    cheapest: str
    ship: str | None  # None where the evidence names no arm
    verdict: str
    curve_verdict: str | None
    num_seeds: int

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Titles and cells, the best by val first."""
        titles = ["arm", "val", "test", f"{1 - LEVEL:.0%} interval", f"gain over {self.cheapest}", "p",
                  "adapt s", "generate s", "teach s", "train s", "total s", "s to baseline", "steps"]  # fmt: skip
        cells = []
        for row in self.rows:
            gain = "" if row.gain is None else f"{100 * row.gain:+.1f}{_points(row.gain_low, row.gain_high)}"
            cells.append([
                row.arm, f"{row.val_mean:.3f}", f"{row.test_mean:.3f}", f"({row.test_low:.3f} to {row.test_high:.3f})",
                gain, "" if row.gain is None else p_words(row.p_value),
                f"{row.adapt_seconds:.0f}", f"{row.generate_seconds:.0f}", f"{row.teach_seconds:.0f}",
                f"{row.train_seconds:.0f}", f"{row.seconds:.0f}",
                "never" if row.seconds_to_baseline is None else f"{row.seconds_to_baseline:.0f}", f"{row.steps:,}",
            ])  # fmt: skip
        return titles, cells

    def markdown(self, name: str) -> str:
        odd = {row.arm for row in self.rows if not re.fullmatch(r"\w[\w+]*", row.arm)}
        names = re.compile("|".join(map(re.escape, sorted(odd, key=len, reverse=True))))

        def plain(text: str) -> str:
            return names.sub(lambda found: markdown(found[0]), text)

        titles, cells = self.table()
        lines = [f"# {markdown(name)}: {self.num_seeds} seed(s)", "", plain(self.verdict), ""]
        lines += ["| " + " | ".join(map(plain, row)) + " |" for row in (titles, ["---"] * len(titles), *cells)]
        if self.curve_verdict:
            lines += ["", plain(self.curve_verdict)]
        lines += ["", NOTES]
        return "\n".join(lines) + "\n"


NOTES = (
    "All arms take the same number of steps with the same batch size, and none was tuned for this data. Arms are "
    "ranked by mean val accuracy; gains are test accuracies in points against the cheapest arm by seconds, paired by "
    "seed and image. Intervals and p count that other test images and other seeds would give other figures; those of "
    "gains hold for all arms at once. With one seed, intervals count images alone, and nothing is shown. Seconds are "
    "those of this machine; a stage that arms share counts in full for each, and generating by the seconds of its "
    "actors. Seconds to baseline: until the val accuracy first reaches what the best baseline by val ended with on the "
    "same seed, all that came before training included; never: not with every seed."
)


def summarise(arms: list[Arm], curve: list[Arm], num_seeds: int) -> Comparison:
    """Tables and verdict of the runs of all arms over the same seeds."""
    by_arm: dict[str, list[Arm]] = {}
    for arm in arms:
        by_arm.setdefault(arm.arm, []).append(arm)
    val = {name: float(np.mean([run.val_accuracy for run in runs])) for name, runs in by_arm.items()}
    seconds = {name: float(np.mean([run.seconds for run in runs])) for name, runs in by_arm.items()}
    baselines = [name for name in by_arm if name in BASELINES]
    best_baseline = max(baselines, key=val.__getitem__) if baselines else None
    order = sorted(by_arm, key=lambda name: (seconds[name], name))
    evidence = _Evidence(
        order, dict(zip(by_arm, align([[r.test for r in runs] for runs in by_arm.values()]), strict=True))
    )
    rows = [_row(runs, by_arm.get(best_baseline or ""), evidence) for runs in by_arm.values()]
    rows.sort(key=lambda row: -row.val_mean)
    ship, verdict = _verdict(rows, evidence)
    points, curve_verdict = learning_curve(curve) if curve else ([], None)
    return Comparison(
        rows=rows, curve=points, best_baseline=best_baseline, best=rows[0].arm, cheapest=order[0], ship=ship,
        verdict=verdict, curve_verdict=curve_verdict, num_seeds=num_seeds,
    )  # fmt: skip


@dataclass(frozen=True)
class _Evidence:
    """Answers on the test split of all arms, and what they show of one arm against another."""

    order: list[str]  # the cheapest first
    right: dict[str, np.ndarray]  # (seeds, images)
    _gains: dict[tuple[str, str], Spread] = field(default_factory=dict)

    @property
    def level(self) -> float:
        return LEVEL / max(len(self.order) - 1, 1)

    def gain(self, arm: str, other: str) -> Spread:
        if (arm, other) not in self._gains:
            self._gains[arm, other] = difference(self.right[arm], self.right[other])
        return self._gains[arm, other]

    def shows(self, arm: str, other: str) -> bool:
        """That `arm` is better than `other`. One seed shows nothing."""
        gain = self.gain(arm, other)
        return gain.seeds > 1 and gain.interval(self.level)[0] > 0

    def words(self, arm: str, other: str) -> str:
        return gain_words(self.gain(arm, other), self.level)

    def cheaper(self, arm: str) -> list[str]:
        return self.order[: self.order.index(arm)]

    def is_better(self, arm: str) -> bool:
        return bool(self.cheaper(arm)) and all(self.shows(arm, other) for other in self.cheaper(arm))


def _row(runs: list[Arm], baseline: list[Arm] | None, evidence: _Evidence) -> Row:
    name, cheapest = runs[0].arm, evidence.order[0]
    test = [run.test_accuracy for run in runs]
    low, high = accuracy_interval(evidence.right[name])
    gain = gain_low = gain_high = p_value = None
    if name != cheapest:
        found = evidence.gain(name, cheapest)
        gain, (gain_low, gain_high) = found.mean, found.interval(evidence.level)
        p = found.p_value()
        p_value = None if p is None else min(p * LEVEL / evidence.level, 1.0)
    # Each seed against itself: it draws its own val split, and some are easier than others.
    pairs = zip(runs, baseline, strict=True) if baseline is not None else ()
    reached = [_seconds_to(run, other.val_accuracy) for run, other in pairs]
    times = [seconds for seconds in reached if seconds is not None]
    return Row(
        arm=name, seeds=[run.seed for run in runs], val=[run.val_accuracy for run in runs], test=test,
        val_mean=float(np.mean([run.val_accuracy for run in runs])), test_mean=float(np.mean(test)),
        test_low=low, test_high=high, gain=gain, gain_low=gain_low, gain_high=gain_high, p_value=p_value,
        is_better=evidence.is_better(name),
        seconds_to_baseline=float(np.mean(times)) if len(times) == len(runs) else None, steps=runs[0].steps,
        **{key: float(np.mean([getattr(run, key) for run in runs])) for key in _SECONDS},
    )  # fmt: skip


def _seconds_to(run: Arm, accuracy: float) -> float | None:
    """Until the val accuracy first reached `accuracy`; None where it never did."""
    for epoch, spent in zip(run.epochs, run.seconds_by_epoch, strict=True):
        if epoch.get("val_accuracy", -1.0) >= accuracy:
            return run.seconds_before + spent
    return None


def _verdict(rows: list[Row], evidence: _Evidence) -> tuple[str | None, str]:
    """The arm to ship, if the evidence names one, and the sentence. Rows are ranked by val."""
    row_of, order = {row.arm: row for row in rows}, evidence.order
    cheapest = row_of[order[0]]
    if len(rows) == 1:
        return cheapest.arm, f"Ship {_what(cheapest)}: no other arm was trained, so nothing is known of any."
    top = [name for name in order if name == cheapest.arm or row_of[name].is_better][-1]
    if rivals := [name for name in order[order.index(top) + 1 :] if evidence.shows(name, top)]:
        return None, _undecided(rivals[-1], top, evidence)
    if top != cheapest.arm:
        best = row_of[top]
        every = ", and shown to be better than every cheaper arm" if len(evidence.cheaper(top)) > 1 else ""
        longer = " No arm that takes longer is shown to be better." if top != order[-1] else ""
        return top, (
            f"Ship {_what(best)}: {evidence.words(top, cheapest.arm)} against {cheapest.arm}, the cheapest "
            f"({cheapest.seconds:.0f} s), p {p_words(best.p_value, '= ')}{every}.{longer}"
        )
    rival = next(row for row in rows if row is not cheapest)
    gain = evidence.gain(rival.arm, cheapest.arm)
    seen = f"{rival.arm}, is {evidence.words(rival.arm, cheapest.arm)} at {rival.seconds:.0f} s"
    if gain.mean <= 0 and gain.seeds > 1:
        return cheapest.arm, (
            f"Ship {_what(cheapest)}, the cheapest: no other arm is shown to be better. The best other by val, {seen}."
        )
    return None, (
        f"Nothing is proven: no arm is shown to be better than {_what(cheapest)}, the cheapest, so ship that one or "
        f"look further. The best other by val, {seen}; {needed_words(gain, evidence.level, 'compare.seeds')}."
    )


def _undecided(arm: str, top: str, evidence: _Evidence) -> str:
    """`arm` is better than `top`, and not than something that is cheaper than `arm`."""
    other = next(name for name in evidence.cheaper(arm) if not evidence.shows(arm, name))
    return (
        f"Nothing to ship is proven: {arm} is shown to be better than {top} ({evidence.words(arm, top)}), and not than "
        f"{other}, which is cheaper than {arm} ({evidence.words(arm, other)}); "
        f"{needed_words(evidence.gain(arm, other), evidence.level, 'compare.seeds')}."
    )


def _what(row: Row) -> str:
    return f"{row.arm} ({row.test_mean:.3f} on test, {row.seconds:.0f} s)"


def _points(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({100 * low:+.1f} to {100 * high:+.1f})"

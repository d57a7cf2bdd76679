"""The result of a comparison: means with confidence intervals, p-values, seconds, and a verdict.

Val accuracy ranks the arms. Test accuracy decides whether an arm is better, over test images and seeds, and only
against cheaper arms: k arms make k - 1 claims, "better than the cheapest" and, only if that holds, "better than every
cheaper one". Each claim is tested at 5 % / (k - 1), so one of them is wrong in at most 5 % of comparisons (Bonferroni;
that an arm beats *all* cheaper ones needs every one of its tests, so it needs no further correction).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raydistill.escaping import counted, markdown
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

_SECONDS = ("adapt_seconds", "generate_seconds", "teach_seconds", "train_seconds", "seconds")


@dataclass(frozen=True)
class Row:
    """One arm over its seeds. `test_low` and `test_high` are the 95 % confidence interval of the mean accuracy over
    images and seeds; with one seed over images only. `gain` is test accuracy minus the cheapest arm's, paired by seed
    and image; its interval and `p_value` are corrected for the number of arms. They are None for the cheapest arm, and
    `p_value` also with one seed. `is_better`: significantly better than every cheaper arm."""

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
    ship: str | None  # None if the results are not significant
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
        lines = [f"# {markdown(name)}: {counted(self.num_seeds, 'seeds')}", "", plain(self.verdict), ""]
        lines += ["| " + " | ".join(map(plain, row)) + " |" for row in (titles, ["---"] * len(titles), *cells)]
        if self.curve_verdict:
            lines += ["", plain(self.curve_verdict)]
        lines += ["", NOTES]
        return "\n".join(lines) + "\n"

    def _repr_markdown_(self) -> str:
        return self.markdown("").partition("\n")[2]  # a notebook has headings of its own


NOTES = (
    "All arms take the same number of steps with the same batch size, and none is tuned for this data. Mean val "
    "accuracy ranks the arms. Gains are test accuracies in points over the cheapest arm by seconds, paired by seed and "
    "image. Confidence intervals and p-values cover the choice of test images and of seeds; those of gains are "
    "corrected for the number of arms. With one seed they cover images only, and no gain is significant. Seconds are "
    "measured on this machine; each arm counts a shared stage in full, and generation counts the seconds of its "
    "actors. Seconds to baseline: from the start of the first stage until the val accuracy reaches the final val "
    "accuracy of the best baseline by val with the same seed; never: not with every seed."
)


def summarise(arms: list[Arm], curve: list[Arm], num_seeds: int) -> Comparison:
    """The tables and the verdict, from the runs of all arms with the same seeds."""
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
    """The answers of all arms on the test split, and the gain of one arm over another."""

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
        """Whether `arm` is significantly better than `other`; never with one seed."""
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
    # Compare runs of equal seeds: each seed draws its own val split, and some are easier than others.
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
    """Seconds until the val accuracy reached `accuracy`; None if it never did."""
    for epoch, spent in zip(run.epochs, run.seconds_by_epoch, strict=True):
        if epoch.get("val_accuracy", -1.0) >= accuracy:
            return run.seconds_before + spent
    return None


def _verdict(rows: list[Row], evidence: _Evidence) -> tuple[str | None, str]:
    """The arm to ship, if the results name one, and the verdict. Val accuracy ranks the rows."""
    row_of, order = {row.arm: row for row in rows}, evidence.order
    cheapest = row_of[order[0]]
    if len(rows) == 1:
        return cheapest.arm, f"Ship {_what(cheapest)}: it is the only arm, so there is nothing to compare."
    top = [name for name in order if name == cheapest.arm or row_of[name].is_better][-1]
    if rivals := [name for name in order[order.index(top) + 1 :] if evidence.shows(name, top)]:
        return None, _undecided(rivals[-1], top, evidence)
    if top != cheapest.arm:
        best = row_of[top]
        every = ", and it is significantly better than every cheaper arm" if len(evidence.cheaper(top)) > 1 else ""
        longer = " No arm that takes longer is significantly better." if top != order[-1] else ""
        return top, (
            f"Ship {_what(best)}: it gains {evidence.words(top, cheapest.arm)} over {cheapest.arm}, the cheapest arm "
            f"({cheapest.seconds:.0f} s), p {p_words(best.p_value, '= ')}{every}.{longer}"
        )
    rival = next(row for row in rows if row is not cheapest)
    gain = evidence.gain(rival.arm, cheapest.arm)
    seen = f"The best other arm by val, {rival.arm}, gains {evidence.words(rival.arm, cheapest.arm)} in"
    seen += f" {rival.seconds:.0f} s"
    if gain.mean <= 0 and gain.seeds > 1:
        return cheapest.arm, f"Ship {_what(cheapest)}, the cheapest arm: no other arm is significantly better. {seen}."
    return None, (
        f"No arm is significantly better than {_what(cheapest)}, the cheapest. Ship that one, or measure more. "
        f"{seen}; {needed_words(gain, evidence.level, 'compare.seeds')}."
    )


def _undecided(arm: str, top: str, evidence: _Evidence) -> str:
    """`arm` is significantly better than `top`, but not than another arm that is cheaper than `arm`."""
    other = next(name for name in evidence.cheaper(arm) if not evidence.shows(arm, name))
    return (
        f"The results do not decide which arm to ship: {arm} is significantly better than {top} "
        f"({evidence.words(arm, top)}), but not than {other} ({evidence.words(arm, other)}), which is cheaper; "
        f"{needed_words(evidence.gain(arm, other), evidence.level, 'compare.seeds')}."
    )


def _what(row: Row) -> str:
    return f"{row.arm} ({row.test_mean:.3f} on test, {row.seconds:.0f} s)"


def _points(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({100 * low:+.1f} to {100 * high:+.1f})"

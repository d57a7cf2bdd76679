"""Is a student better than always naming the most frequent class?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scipy.stats import binom, hypergeom

LEVEL = 0.05
# A student counts as useful at this share of the way from the most frequent class's share to perfect. A student that
# predicts a single class is at chance if one that knew this share of the other classes' images would predict another.
_SOME_USE, _KNOWN = 1 / 3, 1 / 2
_MOST_NAMES = 8
State = Literal["better", "at chance", "unknown"]
# By class the images, the answers, and the answers that are right.
Counts = dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class MajorityComparison:
    """`state` is `unknown` if the images are too few. `warnings` are whole sentences."""

    state: State
    warnings: tuple[str, ...]


def compare_with_majority(measured: Mapping[str, Mapping[str, Any]]) -> MajorityComparison:
    """From a student's measures by split, as in `Report.student`. It decides by the test images, which selected
    nothing; if they are too few, by val and test together."""
    counts = {split: _counts(of_split["per_class"]) for split, of_split in measured.items()}
    both: Counts = {}
    for of_split in counts.values():
        for name, numbers in of_split.items():
            images, answers, right = (a + b for a, b in zip(both.get(name, (0, 0, 0)), numbers, strict=True))
            both[name] = (images, answers, right)
    if not any(images for images, _, _ in both.values()):
        nothing = "There are no labelled val or test images, so it is unknown if the student is better than chance."
        return MajorityComparison("unknown", (nothing,))
    what, decides = " and ".join(counts), both
    if "test" in counts and _state(counts["test"]) != "unknown":
        what, decides = "test", counts["test"]
    state, warnings = _state(decides), []
    if state == "at chance":
        warnings.append(f"The student is no better than chance: {_compared_with_chance(decides, what)}.")
    elif state == "unknown":
        start = f"The {what} images cannot show whether the student is better than chance"
        warnings.append(f"{start}: {_compared_with_chance(decides, what)}.")
    if never := [(name, images) for name, (images, answers, _) in both.items() if images and not answers]:
        warnings.append(_unnamed(never, both, " and ".join(counts)))
    return MajorityComparison(state, tuple(warnings))


def _counts(per_class: Mapping[str, Mapping[str, Any]]) -> Counts:
    return {
        name: (one["images"], one["answers"], round((one["recall"] or 0) * one["images"]))
        for name, one in per_class.items()
    }


def _state(counts: Counts) -> State:
    """One-sided exact tests. A student is better than chance if always naming the most frequent class would hardly ever
    be right as often. If one class has nearly all images, accuracy cannot show that; then it is also better if it tells
    that class from the others (Fisher's test) and its balanced accuracy is halfway to perfect. Otherwise it is at
    chance if a useful student would hardly ever be right so rarely."""
    there = [numbers for numbers in counts.values() if numbers[0]]
    total, right = sum(images for images, _, _ in there), sum(right for _, _, right in there)
    most, named, named_rightly = max(there, default=(0, 0, 0))
    if len(there) < 2:
        return "unknown"
    if any(answers == total for _, answers, _ in counts.values()):
        return "at chance" if (1 - _KNOWN) ** (total - most) <= LEVEL else "unknown"
    chance, recall = most / total, sum(right / images for images, _, right in there) / len(there)
    tells_apart = hypergeom.sf(named_rightly - 1, total, most, named) <= LEVEL
    if binom.sf(right - 1, total, chance) <= LEVEL or (tells_apart and recall >= (1 + 1 / len(there)) / 2):
        return "better"
    return "at chance" if binom.cdf(right, total, chance + _SOME_USE * (1 - chance)) <= LEVEL else "unknown"


def _compared_with_chance(counts: Counts, what: str) -> str:
    total, right = sum(images for images, _, _ in counts.values()), sum(right for _, _, right in counts.values())
    commonest = max(counts, key=lambda name: counts[name][0])
    most = counts[commonest][0]
    return (
        f"it is right for {right:,} of {total:,} {what} images ({right / total:.3f}); always naming {commonest} "
        f"would be right for {most:,} ({most / total:.3f})"
    )


def _unnamed(never: list[tuple[str, int]], both: Counts, what: str) -> str:
    never = sorted(never, key=lambda one: -one[1])
    names = ", ".join(f"{name} ({images:,} image{'s' * (images > 1)})" for name, images in never[:_MOST_NAMES])
    more = f" and {len(never) - _MOST_NAMES:,} more" if len(never) > _MOST_NAMES else ""
    there = sum(images > 0 for images, _, _ in both.values())
    return f"It never names {len(never):,} of the {there:,} classes of the {what} images: {names}{more}."

"""Is a student better than always naming the most frequent class, and are there enough images to tell?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any, Literal

LEVEL = 0.05
# With fewer images in val or test the 95 % interval of an accuracy is wider than 28 points.
FEWEST_MEASURED = 50
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


def few_images(counts: Mapping[str, int]) -> tuple[str, str, str] | None:
    """If val or test have too few images, by the counts of the splits: that, why they are too few, and what to do."""
    few = [(split, counts[split]) for split in ("val", "test") if 0 < counts.get(split, 0) < FEWEST_MEASURED]
    if not few:
        return None
    return (
        f"too few images to measure by ({' and '.join(f'{split} {count}' for split, count in few)})",
        f"on fewer than {FEWEST_MEASURED} the interval of an accuracy is some 30 points wide or more",
        f"label more images, or raise {' and '.join(f'images.{split}_share' for split, _ in few)}",
    )


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
        total = sum(images for images, _, _ in decides.values())
        only = next((f", and it answers {name} to all" for name, numbers in decides.items() if numbers[1] == total), "")
        warnings.append(f"The student is no better than chance: {_compared_with_chance(decides, what)}{only}.")
    elif state == "unknown":
        start = f"The {what} images are too few to tell whether the student is better than chance"
        enough = max(_enough(decides), 1 + sum(images for images, _, _ in decides.values()))
        warnings.append(
            f"{start}: {_compared_with_chance(decides, what)}. Some {enough:,} would tell: label more images, or raise "
            "images.test_share."
        )
    elif few := few_images({split: sum(n for n, _, _ in of_split.values()) for split, of_split in counts.items()}):
        what, why, how = few
        warnings.append(f"{what[:1].upper()}{what[1:]}: {why}; {how}.")
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
    chance if a useful student would hardly ever be right so rarely, and the images are enough to tell the two apart."""
    from scipy.stats import binom, hypergeom  # half a second, and `check` only counts

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
    is_useless = binom.cdf(right, total, chance + _SOME_USE * (1 - chance)) <= LEVEL
    return "at chance" if is_useless and total >= _enough(counts) else "unknown"


def _enough(counts: Counts) -> int:
    """Images that tell a student at chance from one of some use, with an error of `LEVEL` on either side: the sample
    size of a one-sided test of a proportion, by the normal approximation (Fleiss, Levin and Paik 2003, chapter 2)."""
    from scipy.stats import norm

    chance = max(images for images, _, _ in counts.values()) / sum(images for images, _, _ in counts.values())
    useful = chance + _SOME_USE * (1 - chance)
    spread = sqrt(chance * (1 - chance)) + sqrt(useful * (1 - useful))
    return ceil((norm.isf(LEVEL) * spread / (useful - chance)) ** 2) if chance < 1 else 0


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

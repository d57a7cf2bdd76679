"""Confidence intervals and p-values of an accuracy, or of a difference of two, over test images and seeds.

An arm's answers are a table of seeds and images: 1 for a correct answer, 0 for a wrong one, nan for an image outside
that seed's test split. Other images and other seeds would both change its mean. Studies of several readers and several
cases split the variance of the mean of such a table in the same way (Obuchowski and Rockette 1995; Hillis 2007):

    Var(mean) = between / S + shared

`between` is the variance of the seeds' means around each other. `shared` is the covariance of two seeds' means through
the images that both measure: all images of a fixed test split, some if each seed draws its own. The half width of an
interval is the root of the sum of two squares, one for seeds and one for images (Banerjee 1960), each with the quantile
of Student's t for its degrees of freedom. For normal means the coverage is at least nominal, whatever the share of
either; with few seeds the intervals are wide, because there are few degrees of freedom.

The method assumes that seeds are draws from one normal distribution, and images independent draws. Three seeds cannot
show a failure of one seed in fifty, and near duplicates among the images make intervals too narrow.

Shapes: S seeds, N images of any seed.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc
from scipy import special
from scipy.optimize import brentq

from raydistill.results import PREDICTIONS, PREDICTIONS_FILE
from raydistill.storage.tables import read_table

LEVEL, POWER = 0.05, 0.8
_MOST_SEEDS, _MOST_TIMES_IMAGES = 100, 100.0
_LEAST_P = 1e-12


@dataclass(frozen=True, eq=False)
class Answers:
    """One student's answers on one split: the images' ids (N,), and whether each answer is correct (N,)."""

    ids: np.ndarray
    right: np.ndarray


def read_answers(path: str, split: str) -> Answers:
    """Read them from the `evaluate` directory `path`."""
    columns = ("sample_id", "label", "split", "student_class")
    table = read_table(f"{path}/{PREDICTIONS_FILE}", pa.schema(PREDICTIONS.field(name) for name in columns))
    table = table.filter(pc.equal(table["split"], split)).combine_chunks()
    return Answers(table["sample_id"].to_numpy(), pc.equal(table["student_class"], table["label"]).to_numpy())


def align(answers: Sequence[Sequence[Answers]]) -> list[np.ndarray]:
    """By arm, the table of seeds and images (S, N). All arms have the same images as columns."""
    columns: dict[object, int] = {}

    def places(ids: np.ndarray) -> np.ndarray:
        return np.array([columns.setdefault(i, len(columns)) for i in ids.tolist()])

    # The arms of one seed nearly always share a split, so try the first arm's columns.
    first = [(one.ids, places(one.ids)) for one in answers[0]]
    found = []
    for arm in answers:
        pairs = zip(arm, first, strict=True)
        found.append([known if np.array_equal(one.ids, ids) else places(one.ids) for one, (ids, known) in pairs])
    tables = [np.full((len(arm), len(columns)), np.nan) for arm in answers]
    for right_SN, arm, of_arm in zip(tables, answers, found, strict=True):
        for row, one, place in zip(right_SN, arm, of_arm, strict=True):
            row[place] = one.right
    return tables


@dataclass(frozen=True)
class Spread:
    """The mean of a table and its variances, which are those of means over one seed's images."""

    mean: float
    seeds: int
    images: int  # of all seeds; each seed has `each` of them
    each: float
    alone: float  # variance of one seed's mean by the draw of its images
    shared: float  # covariance of two seeds' means by the images that both saw; with one seed `alone`
    between: float  # variance of seeds' means around each other, no less than `alone - shared`; 0 with one seed

    def margin(self, level: float = LEVEL) -> float:
        """Half the width of the interval with error rate `level`. With one seed it covers the images only, since the
        variance between seeds is unknown."""
        return float(np.sqrt(self._margins(level, self.between)))

    def _margins(self, level: float, between: float | np.ndarray) -> float | np.ndarray:
        """The squared half width, given an estimated variance between seeds."""
        of_images = special.stdtrit(max(self.images - 1, 1), level / 2) ** 2 * self.shared
        if self.seeds == 1:
            return of_images
        return special.stdtrit(self.seeds - 1, level / 2) ** 2 * between / self.seeds + of_images

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The interval of a difference, within [-1, 1]."""
        margin = self.margin(level)
        return max(self.mean - margin, -1.0), min(self.mean + margin, 1.0)

    def p_value(self) -> float | None:
        """The level at which the interval ends at 0; None with one seed."""
        if self.seeds == 1:
            return None
        if self.margin(_LEAST_P) <= abs(self.mean):
            return _LEAST_P
        if self.mean == 0:
            return 1.0
        return float(np.exp(brentq(lambda x: self.margin(np.exp(x)) - abs(self.mean), np.log(_LEAST_P), 0.0)))

    def planned(self, seeds: int, times_images: float = 1.0) -> Spread:
        """The expected spread with this many seeds and times the images."""
        own = max(self.between - max(self.alone - self.shared, 0.0), 0.0)  # of the seeds, without their images
        alone, shared = self.alone / times_images, self.shared / times_images
        return replace(
            self, seeds=seeds, images=round(self.images * times_images), each=self.each * times_images, alone=alone,
            shared=shared, between=own + max(alone - shared, 0.0),
        )  # fmt: skip

    def power(self, gain: float, level: float = LEVEL) -> float:
        """The probability that a true difference of `gain` is significant, over the sampling of the mean and of the
        variance between seeds, which few seeds estimate badly."""
        freedom, quantiles = self.seeds - 1, (np.arange(50) + 0.5) / 50
        between = self.between * special.gammaincinv(freedom / 2, quantiles) * 2 / freedom  # chi-squared over freedom
        margins = np.sqrt(self._margins(level, np.maximum(between, self.alone - self.shared)))
        return float(special.ndtr((abs(gain) - margins) / np.sqrt(self.between / self.seeds + self.shared)).mean())

    def needed(self, gain: float, level: float = LEVEL) -> list[tuple[int, float]]:
        """The (seeds, times the images) at which `gain` is significant with a power of 80 %: more seeds, or more
        images, or both if a hundred of neither is enough; empty if a hundred of both is not."""

        def enough_seeds(times: float) -> int | None:
            counts = range(max(self.seeds, 2), _MOST_SEEDS + 1)
            found = bisect.bisect_left(counts, POWER, key=lambda n: self.planned(n, times).power(gain, level))
            return counts[found] if found < len(counts) else None

        ways = [(seeds, 1.0)] if (seeds := enough_seeds(1)) else []
        steps = np.geomspace(1, _MOST_TIMES_IMAGES, 100)
        found = bisect.bisect_left(steps, POWER, key=lambda x: self.planned(self.seeds, x).power(gain, level))
        ways += [(self.seeds, float(steps[found]))] if found < len(steps) else []
        both = ((seeds, times) for times in (2.0, 5.0, 10.0, 100.0) if (seeds := enough_seeds(times)))
        return ways or list(itertools.islice(both, 1))


def spread(values_SN: np.ndarray) -> Spread:
    """The spread of answers, or of differences of answers. If every seed has every image, `between` and `shared` are
    those of the two-way analysis of variance: MS(seeds) / N and (MS(images) - MS(error)) / (S N)."""
    values_SN = values_SN[:, ~np.isnan(values_SN).all(0)]
    seen_SN = ~np.isnan(values_SN)
    each_S, (seeds, images) = seen_SN.sum(1), values_SN.shape
    mean_S = np.nanmean(values_SN, 1)
    rest_SN = np.where(seen_SN, values_SN - mean_S[:, None], 0.0) / each_S[:, None]
    covariance_SS = rest_SN @ rest_SN.T * each_S.mean() / max(each_S.mean() - 1, 1)
    alone = float(np.trace(covariance_SS)) / seeds
    if seeds == 1:
        return Spread(float(mean_S[0]), 1, images, float(each_S[0]), alone, alone, 0.0)
    shared = max(float(covariance_SS.sum() - np.trace(covariance_SS)) / (seeds * (seeds - 1)), 0.0)
    # If the seeds agree by chance, their images still give this variance.
    between = max(float(mean_S.var(ddof=1)), alone - shared)
    return Spread(float(mean_S.mean()), seeds, images, float(each_S.mean()), alone, shared, between)


def difference(one_SN: np.ndarray, other_SN: np.ndarray) -> Spread:
    """The spread of the difference of two arms, paired by seed and image. One added image, won half by each, keeps few
    differing answers from looking certain (half an image in each cell, as in Agresti and Min 2005)."""
    found = spread(one_SN - other_SN)
    more = 1 / found.images**2
    return replace(found, alone=found.alone + more, shared=found.shared + more)


def accuracy_interval(right_SN: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of the mean accuracy, for the effective number of images: the number of independent images with
    the same variance, at most the real number (as Korn and Graubard 1998 for surveys). It stays within [0, 1]."""
    found, z = spread(right_SN), float(special.ndtri(1 - level / 2))
    p, variance = found.mean, (found.margin(level) / z) ** 2
    n = min(p * (1 - p) / variance, found.images) if variance > 0 else found.images
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = (float((centre + sign * half) / (1 + z**2 / n)) for sign in (-1, 1))
    return max(min(low, p), 0.0), min(max(high, p), 1.0)  # rounding errors


def gain_words(gain: Spread, level: float = LEVEL) -> str:
    """The gain in points, with its interval."""
    low, high = gain.interval(level)
    return f"{100 * gain.mean:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def p_words(p_value: float | None, sign: str = "") -> str:
    if p_value is None:
        return "one seed"
    return "< 0.001" if p_value < 0.001 else f"{sign}{p_value:.3f}"


def needed_words(gain: Spread, level: float, key: str) -> str:
    """The seeds or images at which a true difference of the measured size is significant; `key` sets the seeds."""
    if gain.seeds == 1:
        return f"one seed cannot show a difference: set {key}=3 or more"
    if gain.mean <= 0:
        return "the results show no gain"
    ways = []
    for seeds, times in gain.needed(gain.mean, level):
        images = f"about {_round(gain.each * times):,} test images instead of {round(gain.each):,}"
        parts = [f"{key}={seeds}"] * (seeds != gain.seeds) + [images] * (times != 1)
        ways.append(" with ".join(parts))
    if not ways:
        return "a true difference of that size is not significant even with 100 seeds and 100 times the images"
    return f"{' or '.join(ways)} would make a true difference of that size significant (power {POWER:.0%})"


def _round(count: float) -> int:
    """Rounded to two digits."""
    return int(float(f"{count:.1e}"))

"""How often `compare` calls equal arms different, how often it sees a true gain, and how often its intervals hold.

    python -m benchmarks.verdict --json verdict.json

Arms are simulated whose accuracy over all images and all seeds is known, and go through `summarise`, as in `compare`:
its tables, intervals, p-values, the arm that it ships and the sentence on the learning curve are what is counted. An
answer is right where a sum of normal effects is above a threshold: of the image, of the arm on the image, of the seed
(of the arm, and one that the arms share), of the seed on each of ten kinds of images, and of the single answer. The
threshold gives the wanted accuracy over all of them exactly, so that equal arms are equal however unequally their
seeds scatter. Seeds test on one split, or each on a fifth of the images that it draws.

Prints and, with --json, writes `false_alarms`: for each setting the share of comparisons in which an arm that is equal
to a cheaper one is called better or worse, or is shipped; `max_false_alarms`; and by setting the `power` to show, and
to ship, an arm that is 2 or 5 points better, the `coverage` of the 95 % intervals of accuracies and of gains, and
`monte_carlo_error`, a standard error at a rate of 5 %. About 25 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product, repeat

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.special import ndtr, ndtri
from scipy.stats import norm

from raydistill.search.arms import Arm
from raydistill.search.learning_curve import learning_curve
from raydistill.search.significance import LEVEL, Answers
from raydistill.search.verdict import Comparison, Row, summarise

STDOUT = 1  # its file descriptor
KINDS, OVERLAP, GAINS = 10, 0.2, (0.02, 0.05)
ARM_ON_IMAGE = 0.3  # against 1 of the image: two arms with 70 % right differ on 13 % of the images


@dataclass(frozen=True)
class Seeds:
    """How much a seed moves what it trains, as standard deviations of accuracy and the share of answers that flip."""

    name: str
    flips: float = 0.03
    arm: float = 0.0  # of an arm's accuracy
    first: float | None = None  # the same of the first and cheapest arm, where it is another
    both: float = 0.0  # of all arms of a seed together, as an easy draw of labels would
    kind: float = 0.0  # of an arm's accuracy on each of ten kinds of images


SEEDS = (
    Seeds("3 % flips"),
    Seeds("3 % flips, seeds 1 point", arm=0.01, both=0.01),
    Seeds("seeds 4 points", arm=0.04, both=0.02),
    Seeds("scratch 5 points, others steady", arm=0.0, first=0.05),
    Seeds("many images at once", kind=0.08),
)


@dataclass(frozen=True)
class Setting:
    split: str  # "fixed" or "new"
    seeds: int
    arms: int
    images: int
    noise: Seeds
    accuracy: float = 0.7
    worse: float = 0.0  # by so much the cheapest arm is worse than the others, which are equal

    @property
    def name(self) -> str:
        worse = f", the cheapest {100 * self.worse:.0f} points worse" if self.worse else ""
        return (
            f"{self.split} split, {self.seeds} seed(s), {self.arms} arms, {self.images} images, "
            f"accuracy {self.accuracy:g}, {self.noise.name}{worse}"
        )


def settings() -> Iterator[Setting]:
    """Both splits, sizes, numbers of seeds and of arms, and noises; then what is harder: nearly all right, nearly all
    wrong, tiny tests, two seeds, many arms, and arms of which one does differ. One seed shows nothing, whatever the
    noise."""
    flips, _, wild, unequal, kinds = SEEDS
    sizes = [("fixed", 100), ("fixed", 469), ("fixed", 4000), ("new", 100), ("new", 469), ("new", 2000)]
    for (split, images), arms in product(sizes, (2, 5)):
        yield Setting(split, 1, arms, images, wild)
        for seeds, noise in product((3, 10), SEEDS if images == 469 else (flips, wild, kinds)):
            yield Setting(split, seeds, arms, images, noise)
    for split, seeds, accuracy in product(("fixed", "new"), (1, 2, 3, 10), (0.02, 0.98)):
        yield Setting(split, seeds, 2, 100, Seeds("1 % flips", flips=0.01), accuracy)
    for split, seeds, images in product(("fixed", "new"), (3, 10), (10, 30)):
        yield Setting(split, seeds, 2, images, flips)
    for seeds, arms, noise in product((2, 5), (2, 7), (wild, unequal)):
        yield Setting("fixed", seeds, arms, 4000, noise)
    for seeds, noise in product((3, 10), (flips, wild, unequal)):
        yield Setting("fixed", seeds, 5, 4000, noise, worse=0.10)


@dataclass(frozen=True)
class Simulated:
    """The runs of one comparison, and the true accuracy of each arm: over all seeds and images, or with one seed that
    of its student over all images, which is all that the intervals of one seed speak of."""

    runs: list[Arm]
    truth: dict[str, float]


def simulate(setting: Setting, rng: np.random.Generator, gains: tuple[float, ...] = ()) -> list[Simulated]:
    """A comparison of equal arms, and the same one with the last arm better by each of `gains`."""
    noise, seeds, fixed = setting.noise, setting.seeds, setting.split == "fixed"
    total = setting.images if fixed else round(setting.images / OVERLAP)
    ids = [np.arange(total) if fixed else rng.permutation(total)[: setting.images] for _ in range(seeds)]
    image, kind, shared = rng.normal(size=total), rng.integers(0, KINDS, total), rng.normal(size=seeds)
    single = np.sqrt((1 + ARM_ON_IMAGE**2) * (1 / np.cos(np.pi * noise.flips) - 1))  # flips so many at 50 % right
    steady = np.sqrt(1 + ARM_ON_IMAGE**2 + single**2)
    found = [Simulated([], {}) for _ in range(1 + len(gains))]
    for number in range(setting.arms):
        own = noise.arm if number or noise.first is None else noise.first
        base = setting.accuracy - (0 if number else setting.worse)
        unit = steady / norm.pdf(ndtri(base))  # one unit of accuracy, as an effect
        scale = np.sqrt(steady**2 + unit**2 * (own**2 + noise.both**2 + noise.kind**2))
        of_seed = unit * (own * rng.normal(size=seeds) + noise.both * shared)
        on_kind = of_seed[:, None] + unit * noise.kind * rng.normal(size=(seeds, KINDS))
        on_image = image + ARM_ON_IMAGE * rng.normal(size=total)
        latent = [on_image[i] + on_kind[s, kind[i]] + single * rng.normal(size=len(i)) for s, i in enumerate(ids)]
        for simulated, gain in zip(found, (0.0, *gains), strict=True):
            accuracy = base + (gain if number == setting.arms - 1 else 0)
            threshold, name = -ndtri(accuracy) * scale, f"arm {number}"
            simulated.truth[name] = accuracy if seeds > 1 else float(ndtr((on_kind - threshold) / steady).mean())
            for s in range(seeds):
                right = latent[s] > threshold
                simulated.runs.append(
                    Arm(
                        name, s, 1.0, 100, right.mean(), Answers(ids[s], right), 0, 0, 0, 10.0 * (number + 1), 1, [], []
                    )
                )
    return found


def is_false_alarm(setting: Setting, comparison: Comparison) -> bool:
    """An arm is called other than an equal one, or shipped although an equal one is cheaper."""
    others = [row for row in comparison.rows if row.gain is not None]
    if not setting.worse:
        return comparison.ship not in (None, "arm 0") or any(is_shown(row) for row in others)
    wrong = [row for row in others if (is_shown(row) and row.gain < 0) or (row.is_better and row.arm != "arm 1")]
    return comparison.ship not in (None, "arm 0", "arm 1") or bool(wrong)


def is_shown(row: Row) -> bool:
    return row.p_value is not None and row.p_value < LEVEL


def is_curve_alarm(setting: Setting, rng: np.random.Generator) -> bool:
    """Labels and teacher are worth nothing, and the sentence on the learning curve calls for more of something."""
    noise = replace(setting.noise, first=None)
    runs = simulate(replace(setting, arms=4, worse=0.0, noise=noise), rng)[0].runs
    places = {"arm 0": ("scratch", 0.5), "arm 1": ("scratch", 1.0), "arm 2": ("kd", 0.5), "arm 3": ("kd", 1.0)}
    curve = [replace(run, arm=places[run.arm][0], label_share=places[run.arm][1]) for run in runs]
    return learning_curve(curve)[1].startswith("More")


def measure(setting: Setting, repetitions: int) -> dict[str, float]:
    """Rates over so many comparisons; those of power and of coverage over a quarter of them."""
    rng = np.random.default_rng(zlib.crc32(setting.name.encode()))
    gains = GAINS if setting.accuracy + GAINS[-1] < 1 else ()
    seen: dict[str, list[bool]] = {}
    last = f"arm {setting.arms - 1}"
    for repetition in range(repetitions):
        more = gains if repetition % 4 == 0 else ()
        for gain, simulated in zip((0.0, *more), simulate(setting, rng, more), strict=True):
            comparison = summarise(simulated.runs, [], setting.seeds)
            row = next(row for row in comparison.rows if row.arm == last)
            points, truth = round(100 * gain), simulated.truth
            if not gain:
                seen.setdefault("false_alarms", []).append(is_false_alarm(setting, comparison))
                seen.setdefault("coverage_of_accuracy", []).append(row.test_low <= truth[last] <= row.test_high)
            else:
                seen.setdefault(f"power_at_{points}_points", []).append(is_shown(row) and row.gain > 0)
                seen.setdefault(f"shipped_at_{points}_points", []).append(comparison.ship == last)
            covered = row.gain_low <= truth[last] - truth["arm 0"] <= row.gain_high
            seen.setdefault("coverage_of_gain", []).append(covered)
        if repetition % 4 == 0:
            seen.setdefault("curve_false_alarms", []).append(is_curve_alarm(setting, rng))
    return {name: float(np.mean(values)) for name, values in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", nargs="?", const=STDOUT, metavar="FILE", help="write the figures; without FILE, to stdout"
    )
    parser.add_argument("--repetitions", type=int, default=2000, help="comparisons of equal arms in each setting")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    console, every = Console(highlight=False, stderr=arguments.json == STDOUT, width=200), list(settings())
    columns = ["false_alarms", "curve_false_alarms", *(f"{what}_at_{round(100 * gain)}_points" for gain in GAINS
               for what in ("power", "shipped")), "coverage_of_accuracy", "coverage_of_gain"]  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    with ProcessPoolExecutor(arguments.processes) as pool:
        for setting, rates in zip(every, pool.map(measure, every, repeat(arguments.repetitions)), strict=True):
            found[setting.name] = rates
            console.print(f"{setting.name}: " + ", ".join(f"{key} {value:.3f}" for key, value in rates.items()))
    table = Table("setting", *columns, box=None, pad_edge=False)
    for name, rates in found.items():
        table.add_row(name, *(f"{rates[column]:.3f}" if column in rates else "" for column in columns))
    console.print("", table)
    figures: dict[str, object] = {column: {n: r[column] for n, r in found.items() if column in r} for column in columns}
    for column in ("false_alarms", "curve_false_alarms"):
        figures[f"max_{column}"] = max(rates[column] for rates in found.values())
    figures["monte_carlo_error"] = float(np.sqrt(0.05 * 0.95 / arguments.repetitions))
    for name in ("max_false_alarms", "max_curve_false_alarms", "monte_carlo_error"):
        console.print(f"{name}: {figures[name]:.4f}")
    if arguments.json:
        with open(arguments.json, "w") as sink:
            json.dump(figures, sink, indent=2)


if __name__ == "__main__":
    main()

"""What is said of a comparison: against planted truths and closed forms; and that no sentence says too much."""

from __future__ import annotations

import html
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from raydistill.escaping import one_line
from raydistill.search.arms import Arm, training_seconds
from raydistill.search.page import comparison_page
from raydistill.search.significance import Answers, accuracy_interval, difference
from raydistill.search.verdict import Comparison, summarise

IMAGES = 500


def arm(name: str, seed: int, val: float, test: float, share: float = 1.0, images: int = IMAGES, **others) -> Arm:
    """Right on the easiest images, as many as `test` says, but for one of twenty, drawn by the arm and the seed."""
    epochs = [{"epoch": 1.0, "step": 10.0, "val_accuracy": val / 2}, {"epoch": 2.0, "step": 20.0, "val_accuracy": val}]
    others = {
        "num_labelled": round(800 * share), "adapt_seconds": 5.0, "generate_seconds": 0.0,
        "teach_seconds": 7.0, "train_seconds": 20.0,
        "steps": 20, "epochs": epochs, "seconds_by_epoch": [8.0, 20.0], **others,
    }  # fmt: skip
    luck = np.random.default_rng([seed, *name.encode()]).random(images)
    order = np.argsort(np.where(luck < 0.05, luck * 20, np.arange(images) / images))
    right = np.isin(np.arange(images), order[: round(test * images)])
    return Arm(name, seed, share, val_accuracy=val, test=Answers(np.arange(images), right), **others)


def three(name: str, val: float, tests: tuple[float, float, float], cost: float = 0.0, **others) -> list[Arm]:
    return [arm(name, seed, val, test, train_seconds=20.0 + cost, **others) for seed, test in enumerate(tests)]


def row(result: Comparison, name: str):
    return next(r for r in result.rows if r.arm == name)


def test_gains_are_over_the_cheapest_arm_and_corrected_for_the_number_of_arms() -> None:
    arms = [
        *three("scratch", 0.50, (0.9, 0.9, 0.9), cost=5),  # the best on test, and not by val
        *three("fine_tune", 0.60, (0.60, 0.70, 0.80)),
        *three("align_uniform", 0.65, (0.64, 0.73, 0.85), cost=9),
    ]
    result = summarise(arms, [], 3)
    assert (result.best, result.best_baseline, result.cheapest) == ("align_uniform", "fine_tune", "fine_tune")
    best, cheapest = (np.array([a.test.right for a in arms if a.arm == name], float)
                      for name in ("align_uniform", "fine_tune"))  # fmt: skip
    expected, found = difference(best, cheapest), row(result, "align_uniform")
    assert (found.val, found.test) == ([0.65] * 3, [0.64, 0.73, 0.85])
    assert found.gain == pytest.approx(0.04)
    assert found.p_value == pytest.approx(2 * expected.p_value())
    assert (found.gain_low, found.gain_high) == expected.interval(0.025)
    assert (found.test_low, found.test_high) == accuracy_interval(best)
    baseline = row(result, "fine_tune")
    assert (baseline.gain, baseline.p_value, baseline.is_better) == (None, None, False)


@settings(max_examples=20)
@given(st.lists(st.floats(0, 1), min_size=9, max_size=9))
def test_no_test_accuracy_moves_the_order_of_arms(tests) -> None:
    vals = {"scratch": 0.4, "kd": 0.5, "crd": 0.45}
    arms = [arm(name, seed, val, 0.5) for name, val in vals.items() for seed in range(3)]
    other = [replace(a, test=arm(a.arm, a.seed, 0, t).test) for a, t in zip(arms, tests, strict=True)]
    first, second = summarise(arms, [], 3), summarise(other, [], 3)
    assert [r.arm for r in first.rows] == [r.arm for r in second.rows]
    assert (first.best, first.best_baseline) == (second.best, second.best_baseline)


@given(
    st.integers(1, 3), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(0, 30)), min_size=2, max_size=4)
)
def test_nothing_ships_that_is_worse_or_cannot_be_told_from_something_cheaper(seeds, accuracies) -> None:
    arms = [
        arm(f"arm {number}", seed, val, test, images=60, train_seconds=10 + cost)
        for number, (val, test, cost) in enumerate(accuracies)
        for seed in range(seeds)
    ]
    result = summarise(arms, [], seeds)
    undecided = ("No arm is significantly better", "The results do not decide")
    assert result.verdict.startswith(f"Ship {result.ship} (" if result.ship else undecided)
    if result.ship is None:
        return
    shipped = row(result, result.ship)
    answers = {r.arm: np.array([a.test.right for a in arms if a.arm == r.arm], float) for r in result.rows}
    assert seeds > 1 or len(accuracies) == 1
    for other in result.rows:
        gain = difference(answers[shipped.arm], answers[other.arm])
        if other.seconds < shipped.seconds:
            assert gain.interval()[0] > 0
        elif other.arm != shipped.arm:
            assert gain.interval(0.05 / (len(accuracies) - 1))[1] > 0


SCRATCH = three("scratch", 0.5, (0.5, 0.51, 0.49))
PLANTED = {
    "worse on test, however good on val": (
        [*three("scratch", 0.5, (0.7, 0.71, 0.69)), *three("kd", 0.6, (0.66, 0.68, 0.65), cost=9)],
        "scratch", "Ship scratch (0.700 on test, 32 s), the cheapest arm: no other arm is",
        "The best other arm by val, kd, gains -3.7 points (",
    ),
    "better, and the dearest no better than that": (
        [*SCRATCH, *three("kd", 0.6, (0.7, 0.72, 0.7), cost=9), *three("crd", 0.7, (0.71, 0.71, 0.7), cost=20)],
        "kd", "Ship kd (0.707 on test, 41 s): it gains +20.7 points (",
        "No arm that takes longer is significantly better.",
    ),
    "an arm between is undecided": (
        [*three("probe", 0.5, (0.5, 0.5, 0.5)), *three("fine", 0.6, (0.52, 0.66, 0.58), cost=9),
         *three("kd", 0.7, (0.66, 0.67, 0.66), cost=20)],
        None, "The results do not decide which arm to ship: kd is significantly better than probe (+16",
        "but not than fine (",
    ),
    "one seed": (
        [arm("scratch", 0, 0.4, 0.4), arm("kd", 0, 0.5, 0.9, train_seconds=30)],
        None, "No arm is significantly better than scratch",
        "one seed cannot show a difference: set compare.seeds=3 or more.",
    ),
    "one arm": (three("kd", 0.5, (0.5, 0.6, 0.5)), "kd", "Ship kd", "it is the only arm"),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANTED)
def test_the_verdict_on_planted_truths(case) -> None:
    arms, ship, begins, holds = PLANTED[case]
    result = summarise(arms, [], len({run.seed for run in arms}))
    assert result.ship == ship
    assert result.verdict.startswith(begins)
    assert holds in result.verdict
    better = {"kd"} if case.startswith("better") else set()
    assert {r.arm for r in result.rows if r.is_better} == better
    assert all(r.p_value is None for r in result.rows) == case.startswith("one")


def test_what_would_tell_a_gain_from_chance_is_said() -> None:
    result = summarise([*three("scratch", 0.4, (0.5, 0.5, 0.5)), *three("kd", 0.5, (0.53, 0.5, 0.53), cost=9)], [], 3)
    assert result.ship is None
    assert "would make a true difference of that size significant (power 80%)" in result.verdict
    gain = difference(*(np.array([a.test.right for a in arms], float) for arms in (
        three("kd", 0.5, (0.53, 0.5, 0.53)), three("scratch", 0.4, (0.5, 0.5, 0.5)))))  # fmt: skip
    assert f"compare.seeds={gain.needed(gain.mean)[0][0]}" in result.verdict


def test_seconds_add_up_and_stop_at_the_baseline() -> None:
    arms = [arm("scratch", 0, 0.3, 0.3, adapt_seconds=0.0, teach_seconds=0.0), arm("kd", 0, 0.7, 0.5)]
    kd, scratch = summarise(arms, [], 1).rows
    assert kd.seconds == 5 + 7 + 20
    assert kd.seconds_to_baseline == 5 + 7 + 8  # 0.35 after the first epoch is above scratch's 0.3
    assert scratch.seconds_to_baseline == 20
    slow = summarise([arm("scratch", 0, 0.9, 0.3), arm("kd", 0, 0.7, 0.5)], [], 1)
    assert next(r for r in slow.rows if r.arm == "kd").seconds_to_baseline is None


def test_each_seed_is_timed_against_the_baseline_of_its_own_seed() -> None:
    """A hard split's baseline is low, and reaching it counts, although the mean over seeds is higher."""
    arms = [arm("scratch", 0, 0.2, 0.2), arm("scratch", 1, 0.8, 0.8), arm("kd", 0, 0.3, 0.3), arm("kd", 1, 0.9, 0.9)]
    kd, scratch = summarise(arms, [], 2).rows
    assert kd.seconds_to_baseline == 5 + 7 + 20
    assert scratch.seconds_to_baseline == 5 + 7 + 20


def test_training_seconds_follow_from_the_rates() -> None:
    epochs = [{"step": 10.0, "images_per_second": 32.0}, {"step": 20.0, "images_per_second": 64.0}]
    assert training_seconds(epochs, 16) == pytest.approx([5.0, 7.5])


@pytest.mark.parametrize(
    ("accuracies", "advice"),
    [
        ({"scratch": (0.2, 0.5), "kd": (0.3, 0.6)}, "Collect more labels"),
        ({"scratch": (0.4, 0.4), "kd": (0.6, 0.6)}, "Collect unlabelled"),
        ({"scratch": (0.6, 0.6), "kd": (0.6, 0.6)}, "The results do not decide"),
        ({"scratch": (0.6, 0.6), "kd": (0.59, 0.6)}, "The results do not decide"),
    ],
)
def test_the_curve_says_what_is_short(accuracies, advice) -> None:
    curve = [
        arm(name, seed, value, value, share)
        for name, values in accuracies.items()
        for value, share in zip(values, (0.5, 1.0), strict=True)
        for seed in range(3)
    ]
    result = summarise([arm("scratch", 0, 0.5, 0.5), arm("kd", 0, 0.6, 0.6)], curve, 3)
    assert result.curve_verdict.startswith(advice)
    assert [p["num_labelled"] for p in result.curve if p["arm"] == "kd"] == [400, 800]
    page = comparison_page(result, "a job").decode()
    assert page.count("<svg") == 2
    assert result.curve_verdict in html.unescape(page)
    once = summarise([arm("scratch", 0, 0.5, 0.5)], [run for run in curve if run.seed == 0], 1)
    assert once.curve_verdict.startswith("The results do not decide")


def test_labels_that_surely_add_nothing_are_not_asked_for() -> None:
    """Ten seeds and 4,000 images, on which all arms are equal, rule two points out."""
    curve = [arm(name, seed, 0.6, 0.6, share, 4000) for name in ("scratch", "kd") for share in (0.5, 1.0)
             for seed in range(10)]  # fmt: skip
    result = summarise([arm("scratch", 0, 0.5, 0.5)], curve, 10)
    assert result.curve_verdict.startswith("More data of this kind is not worth it")


@pytest.mark.parametrize("seeds", [1, 3])
def test_tables_and_figures_have_every_arm(seeds) -> None:
    arms = [arm(name, seed, 0.5, 0.5 + seed / 10) for name in ("scratch", "kd", "crd") for seed in range(seeds)]
    result = summarise(arms, [], seeds)
    titles, cells = result.table()
    assert {row[0] for row in cells} == {"scratch", "kd", "crd"}
    assert all(len(row) == len(titles) for row in cells)
    lines = [line for line in result.markdown("x").splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    page = html.unescape(comparison_page(result, "<i>a job").decode())
    for words in (*titles, *itertools.chain(*cells), result.verdict):
        assert words in page
    assert page.count("<svg") == 1


def test_arms_of_any_name_are_text_in_the_table_and_the_verdict() -> None:
    """By a parser of Markdown: as many cells as ever, nothing but text in them, and every name as it is."""
    names = ["a|b", "<img src=x onerror=alert(1)>", "[x](http://evil.example)", "**b**", "a\n\n# b", "scratch", "a"]
    result = summarise([arm(name, seed, 0.5, 0.5) for name in names for seed in range(3)], [], 3)
    tokens = MarkdownIt("commonmark").enable("table").parse(result.markdown("*n*\x1b[2J|"))
    assert [token.type for token in tokens].count("td_open") == len(names) * len(result.table()[0])
    kinds = {child.type for token in tokens if token.type == "inline" for child in token.children}
    assert kinds <= {"text", "text_special", "code_inline"}
    texts = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
    assert {one_line(name) for name in names} <= {text.replace("\\|", "|") for text in texts}

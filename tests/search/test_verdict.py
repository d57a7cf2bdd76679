"""What is said of a comparison: against scipy, closed forms, and a test split that must choose nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from raydistill.search.figures import draw_comparison, draw_curve
from raydistill.search.verdict import Arm, mean_interval, paired_p_value, summarise, training_seconds


def arm(name: str, seed: int, val: float, test: float, share: float = 1.0, **others) -> Arm:
    epochs = [{"epoch": 1.0, "step": 10.0, "val_accuracy": val / 2}, {"epoch": 2.0, "step": 20.0, "val_accuracy": val}]
    settings = {
        "num_labelled": round(800 * share), "adapt_seconds": 5.0, "generate_seconds": 0.0,
        "teach_seconds": 7.0, "train_seconds": 20.0,
        "steps": 20, "epochs": epochs, "seconds_by_epoch": [8.0, 20.0], **others,
    }  # fmt: skip
    return Arm(arm=name, seed=seed, label_share=share, val_accuracy=val, test_accuracy=test, **settings)


def three(name: str, val: float, tests: tuple[float, float, float], **others) -> list[Arm]:
    return [arm(name, seed, val, test, **others) for seed, test in enumerate(tests)]


def test_gains_are_paired_by_seed_with_the_best_baseline_by_val() -> None:
    arms = [
        *three("scratch", 0.50, (0.9, 0.9, 0.9)),  # better on test, where nobody may look
        *three("fine_tune", 0.60, (0.60, 0.70, 0.80)),
        *three("align_uniform", 0.65, (0.64, 0.73, 0.85)),
    ]
    result = summarise(arms, [], 3)
    assert (result.best, result.best_baseline) == ("align_uniform", "fine_tune")
    row = result.rows[0]
    gains = [0.04, 0.03, 0.05]
    expected = stats.ttest_rel([0.64, 0.73, 0.85], [0.60, 0.70, 0.80])
    assert (row.val, row.test) == ([0.65] * 3, [0.64, 0.73, 0.85])
    assert row.gain == pytest.approx(np.mean(gains))
    assert row.p_value == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (row.gain_low, row.gain_high) == pytest.approx((interval.low, interval.high))
    baseline = next(r for r in result.rows if r.arm == "fine_tune")
    assert (baseline.gain, baseline.p_value) == (None, None)


@given(st.lists(st.floats(0, 1), min_size=9, max_size=9))
def test_no_test_accuracy_moves_a_choice(tests) -> None:
    vals = {"scratch": 0.4, "kd": 0.5, "crd": 0.45}
    arms = [arm(name, seed, val, 0.5) for name, val in vals.items() for seed in range(3)]
    other = [replace(a, test_accuracy=t) for a, t in zip(arms, tests, strict=True)]
    first, second = summarise(arms, [], 3), summarise(other, [], 3)
    assert [r.arm for r in first.rows] == [r.arm for r in second.rows]
    assert (first.best, first.best_baseline) == (second.best, second.best_baseline)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6))
def test_intervals_and_p_values_are_students(values) -> None:
    low, high = mean_interval(values)
    if np.ptp(values) < 1e-6:
        return
    expected = stats.ttest_1samp(values, 0.0)
    assert paired_p_value(values) == pytest.approx(expected.pvalue)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_one_seed_has_no_interval_and_equal_differences_no_doubt() -> None:
    assert mean_interval([0.5]) == (None, None)
    assert paired_p_value([0.5]) is None
    assert paired_p_value([0.25, 0.25]) == 0.0
    assert paired_p_value([0.0, 0.0]) == 1.0
    result = summarise([arm("scratch", 0, 0.4, 0.4), arm("kd", 0, 0.5, 0.5)], [], 1)
    assert result.rows[0].p_value is None
    assert "seeds" in result.verdict


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


def test_an_arm_without_a_teacher_is_no_distilled_one() -> None:
    arms = [*three("fine_tune", 0.7, (0.7, 0.7, 0.7)), *three("scratch+generated", 0.6, (0.6, 0.6, 0.6)),
            *three("kd", 0.5, (0.5, 0.6, 0.5))]  # fmt: skip
    assert "the nearest, kd," in summarise(arms, [], 3).verdict


def test_training_seconds_follow_from_the_rates() -> None:
    epochs = [{"step": 10.0, "images_per_second": 32.0}, {"step": 20.0, "images_per_second": 64.0}]
    assert training_seconds(epochs, 16) == pytest.approx([5.0, 7.5])


def test_a_baseline_that_wins_is_what_to_ship() -> None:
    result = summarise([*three("fine_tune", 0.7, (0.7, 0.7, 0.7)), *three("kd", 0.5, (0.5, 0.6, 0.5))], [], 3)
    assert result.best == "fine_tune"
    assert result.verdict.startswith("Ship fine_tune")
    assert "kd" in result.verdict


@pytest.mark.parametrize(
    ("accuracies", "advice"),
    [
        ({"scratch": (0.2, 0.5), "kd": (0.3, 0.6)}, "More labels"),
        ({"scratch": (0.4, 0.5), "kd": (0.6, 0.6)}, "More unlabelled"),
        ({"scratch": (0.6, 0.6), "kd": (0.6, 0.6)}, "Nothing more"),
    ],
)
def test_the_curve_says_what_is_short(accuracies, advice) -> None:
    curve = [
        arm(name, seed, value, value, share)
        for name, values in accuracies.items()
        for value, share in zip(values, (0.5, 1.0), strict=True)
        for seed in range(2)
    ]
    result = summarise([arm("scratch", 0, 0.5, 0.5), arm("kd", 0, 0.6, 0.6)], curve, 2)
    assert result.curve_verdict.startswith(advice)
    assert [p["num_labelled"] for p in result.curve if p["arm"] == "kd"] == [400, 800]
    assert draw_curve(result).startswith(b"\x89PNG")


@pytest.mark.parametrize("seeds", [1, 3])
def test_tables_and_figures_have_every_arm(seeds) -> None:
    arms = [arm(name, seed, 0.5, 0.5 + seed / 10) for name in ("scratch", "kd", "crd") for seed in range(seeds)]
    result = summarise(arms, [], seeds)
    titles, cells = result.table()
    assert {row[0] for row in cells} == {"scratch", "kd", "crd"}
    assert all(len(row) == len(titles) for row in cells)
    lines = [line for line in result.markdown("x").splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert draw_comparison(result).startswith(b"\x89PNG")

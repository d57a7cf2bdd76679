"""Images and seeds both count: against closed forms, the analysis of variance, planted truths, and simulation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pyarrow import parquet as pq
from scipy import stats

from benchmarks.verdict import SEEDS, Setting, measure
from raydistill.search.significance import Answers, accuracy_interval, align, difference, read_answers, spread

TABLES = st.tuples(st.integers(1, 4), st.integers(1, 12)).flatmap(
    lambda shape: st.tuples(*(arrays(float, shape, elements=st.sampled_from([0.0, 1.0])) for _ in range(2)))
)


def table(seeds: int = 3, images: int = 200, seed: int = 0, threshold: float = -0.7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=images)
    return (difficulty + 0.5 * rng.normal(size=(seeds, images)) + rng.normal(size=(seeds, 1)) / 5 > threshold).astype(
        float
    )


def test_the_variance_is_that_of_the_two_way_analysis_of_variance() -> None:
    values_SN = table()
    seeds, images = values_SN.shape
    rows, columns, mean = values_SN.mean(1), values_SN.mean(0), values_SN.mean()
    ms_seeds = images * ((rows - mean) ** 2).sum() / (seeds - 1)
    ms_images = seeds * ((columns - mean) ** 2).sum() / (images - 1)
    rest = values_SN - rows[:, None] - columns + mean
    ms_error = (rest**2).sum() / ((seeds - 1) * (images - 1))
    found = spread(values_SN)
    assert found.between == pytest.approx(ms_seeds / images)
    assert found.shared == pytest.approx((ms_images - ms_error) / (seeds * images))
    assert found.alone - found.shared == pytest.approx(ms_error / images)


def test_seeds_whose_images_are_all_others_are_a_t_test_of_their_means() -> None:
    """With disjoint test splits, what the images scatter is in the seeds' means already."""
    values_SN = np.full((4, 400), np.nan)
    for s, row in enumerate(table(4, 100) * [[1], [0], [1], [1]]):
        values_SN[s, 100 * s : 100 * (s + 1)] = row
    found = spread(values_SN)
    assert (found.shared, found.images, found.each) == (0, 400, 100)
    low, high = stats.ttest_1samp(np.nanmean(values_SN, 1), 0).confidence_interval(0.95)
    assert found.interval() == pytest.approx((max(low, -1), min(high, 1)))


def test_seeds_that_all_agree_are_as_sure_as_one_and_no_surer() -> None:
    """Three students that answer alike are one student, whose images alone are uncertain, and their own agreement is no
    proof that a fourth would agree."""
    once = table(1)
    alone, thrice = spread(once), spread(np.repeat(once, 3, axis=0))
    assert thrice.margin() >= 0.99 * alone.margin()
    assert thrice.margin() == pytest.approx(1.972 * once.std(ddof=1) / np.sqrt(200), rel=1e-3)


def test_equal_differences_are_not_without_doubt() -> None:
    """Each seed gains two images of a hundred, others each time: of no seed would anybody be sure."""
    other_SN = np.zeros((3, 100))
    one_SN = other_SN.copy()
    for s in range(3):
        one_SN[s, 2 * s : 2 * s + 2] = 1
    gain = difference(one_SN, other_SN)
    assert gain.mean == pytest.approx(0.02)
    assert gain.p_value() > 0.05


@pytest.mark.parametrize("seeds", [1, 2, 3, 10])
def test_a_copy_is_exactly_as_good_and_never_another(seeds) -> None:
    values_SN = table(seeds)
    gain = difference(values_SN, values_SN.copy())
    low, high = gain.interval()
    assert gain.mean == 0
    assert low == -high
    assert 1 / 200 < high < 0.05  # what nobody saw in 200 images may be there in one of some hundred
    assert gain.p_value() == (None if seeds == 1 else 1.0)


@given(TABLES)
def test_intervals_stay_where_the_truth_can_be_and_swapped_arms_change_sign(pair) -> None:
    one_SN, other_SN = pair
    low, high = accuracy_interval(one_SN)
    assert 0 <= low <= one_SN.mean() <= high <= 1
    assert low < high
    there, back = difference(one_SN, other_SN), difference(other_SN, one_SN)
    assert -1 <= there.interval()[0] <= there.mean <= there.interval()[1] <= 1
    assert there.interval() == pytest.approx([-x for x in back.interval()[::-1]])
    assert there.p_value() == back.p_value()


@given(TABLES, st.sampled_from([0.05, 0.01]))
def test_the_p_value_and_the_interval_say_the_same(pair, level) -> None:
    gain = difference(*pair)
    p, (low, high) = gain.p_value(), gain.interval(level)
    if p is None:
        assert gain.seeds == 1
    elif abs(p - level) > 1e-6 and low > -1 and high < 1:
        assert (p < level) == (low > 0 or high < 0)


@pytest.mark.parametrize(("right", "of"), [(0, 50), (3, 50), (50, 50)])
def test_one_seed_is_wilson(right, of) -> None:
    answers = np.arange(of)[None] < right
    wilson = stats.binomtest(right, of).proportion_ci(method="wilson")
    assert accuracy_interval(answers.astype(float)) == pytest.approx((wilson.low, wilson.high), abs=0.005)


def test_images_are_matched_by_id_and_not_by_place() -> None:
    rng = np.random.default_rng(0)
    truth = dict(zip("abcdefgh", rng.random(8) < 0.5, strict=True))

    def answers(names: str) -> Answers:
        return Answers(np.array(list(names)), np.array([truth[name] for name in names]))

    one, other = align([[answers("abcdef"), answers("hgfe")], [answers("fedcba"), answers("efgh")]])
    assert one.shape == (2, 8)
    np.testing.assert_array_equal(one, other)
    assert np.isnan(one).sum(1).tolist() == [2, 4]


def test_answers_come_from_the_predictions_of_labelled_images(tmp_path) -> None:
    columns = {"sample_id": ["a", "b", "c"], "label": pa.array([0, 0, 1], pa.int32()), "split": ["test", "test", "val"],
               "student_class": pa.array([0, 1, 0], pa.int32())}  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "predictions.parquet")
    found = read_answers(str(tmp_path), "test")
    assert (found.ids.tolist(), found.right.tolist()) == (["a", "b"], [True, False])
    assert read_answers(str(tmp_path), "val").right.tolist() == [False]


def test_planning_what_there_is_changes_nothing_and_more_helps() -> None:
    gain = difference(table(3, seed=3), table(3, seed=4))
    assert dataclasses.astuple(gain.planned(3)) == pytest.approx(dataclasses.astuple(gain))
    powers = [gain.planned(n).power(0.1) for n in (2, 3, 5, 20)]
    assert powers == sorted(powers)
    assert gain.planned(3, 10).power(0.1) > gain.power(0.1)
    seeds, times = gain.needed(0.1)[0]
    assert times == 1
    assert gain.planned(seeds).power(0.1) >= 0.8 > gain.planned(seeds - 1).power(0.1)
    (seeds, times), *others = gain.needed(0.02)
    assert not others
    assert min(seeds / 3, times) > 1
    assert gain.planned(seeds, times).power(0.02) >= 0.8
    assert gain.needed(1e-6) == []
    steady = difference(table(1, seed=3).repeat(3, 0), table(1, seed=4).repeat(3, 0))  # only images are uncertain
    (seeds, times), *_ = steady.needed(0.05)
    assert seeds == 3
    assert steady.planned(3, times).power(0.05) == pytest.approx(0.8, abs=0.05)


def test_the_power_that_is_promised_is_the_power_there_is() -> None:
    rng, true = np.random.default_rng(0), 0.06

    def drawn(seeds: int, images: int) -> np.ndarray:
        of_seed, of_image = 0.02 * rng.normal(size=(seeds, 1)), 0.3 * rng.normal(size=images)
        return true + of_seed + of_image + 0.2 * rng.normal(size=(seeds, images))

    zeros = np.zeros((5, 300))
    found = np.mean([difference(drawn(5, 300), zeros).p_value() < 0.05 for _ in range(400)])
    promised = difference(drawn(200, 3000), np.zeros((200, 3000))).planned(5, 0.1).power(true)
    assert 0.3 < promised < 0.95
    assert found == pytest.approx(promised, abs=0.09)


@pytest.mark.parametrize("split", ["fixed", "new"])
@pytest.mark.parametrize(("seeds", "arms"), [(1, 2), (3, 2), (3, 5), (10, 2)])
def test_equal_arms_are_seldom_called_different(split, seeds, arms) -> None:
    """The benchmark's own simulation in small; three standard errors above 5 %. A t-test over three seeds of one split
    has a third here."""
    rates = measure(Setting(split, seeds, arms, 100, SEEDS[0]), 160)
    assert rates["false_alarms"] <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 160)
    assert rates["coverage_of_gain"] >= 0.9
    assert rates["coverage_of_accuracy"] >= 0.85

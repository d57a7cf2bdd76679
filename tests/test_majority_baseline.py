"""Whether a student is of use: cases done by hand, and how often the tests err on students that are known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from raydistill.majority_baseline import compare_with_majority


def measured(labels: Sequence[int], answers: Sequence[int], num_classes: int) -> dict[str, Any]:
    """What `compare_with_majority` reads of `evaluate.measures`."""
    truth, named = np.array(labels), np.array(answers)
    images, counts = (np.bincount(values, minlength=num_classes) for values in (truth, named))
    right = np.bincount(truth[truth == named], minlength=num_classes)
    recalls = [float(r / n) if n else None for r, n in zip(right, images, strict=True)]
    rows = zip("abcdefghijklmnop"[:num_classes], images.tolist(), counts.tolist(), recalls, strict=True)
    return {"per_class": {name: {"images": n, "answers": m, "recall": r} for name, n, m, r in rows}}


def shares(counts: list[int], right: int) -> tuple[list[int], list[int]]:
    """Labels with so many images by class, and answers of which `right` are right, spread over all classes."""
    labels = [k for k, count in enumerate(counts) for _ in range(count)]
    order = np.random.default_rng(0).permutation(len(labels))
    answers = [(label + 1) % len(counts) for label in labels]
    for n in order[:right]:
        answers[n] = labels[n]
    return labels, answers


@pytest.mark.parametrize(
    ("counts", "right", "state"),
    [
        ([11, 9, 8, 7, 7], 12, "at chance"),  # 0.286 beside 0.262
        ([11, 9, 8, 7, 7], 30, "better"),
        ([11, 9, 8, 7, 7], 17, "better"),  # the fewest that luck explains in less than one case of twenty
        ([11, 9, 8, 7, 7], 16, "unknown"),
        ([2, 1, 1], 2, "unknown"),
        ([3, 3, 3], 9, "better"),
        ([3, 3], 2, "unknown"),
        ([1000] * 2, 1020, "at chance"),
        ([30], 30, "unknown"),  # there is nothing to tell apart
        ([1] * 12, 1, "unknown"),
        ([2] * 4, 1, "unknown"),  # 8 images: 0.022 to 0.471 beside 0.250
        ([4] * 4, 2, "unknown"),
        ([10] * 4, 10, "at chance"),
    ],
)
def test_states(counts, right, state):
    labels, answers = shares(counts, right)
    assert compare_with_majority({"test": measured(labels, answers, max(len(counts), 2))}).state == state


@pytest.mark.parametrize(("counts", "state"), [([20, 20], "at chance"), ([6, 5], "at chance"), ([95, 4], "unknown")])
def test_one_answer_to_all(counts, state):
    labels = [k for k, count in enumerate(counts) for _ in range(count)]
    found = compare_with_majority({"val": measured(labels, [0] * len(labels), 3)})
    assert found.state == state
    assert found.warnings[-1] == f"It never names 1 of the 2 classes of the val images: b ({counts[1]} images)."
    assert f"always naming a would be right for {counts[0]}" in found.warnings[0]
    assert ("it answers a to all" in found.warnings[0]) == (state == "at chance")


def test_a_student_that_finds_a_rare_class_is_of_use():
    """It is right less often than one that never names the rare class."""
    labels = [0] * 1900 + [1] * 100
    answers = [0] * 1800 + [1] * 100 + [1] * 85 + [0] * 15
    assert compare_with_majority({"test": measured(labels, answers, 2)}).state == "better"
    guesses = np.random.default_rng(0).permutation(answers).tolist()
    assert compare_with_majority({"test": measured(labels, guesses, 2)}).state == "at chance"


def test_the_test_images_decide_where_they_can():
    good, bad = measured(*shares([50, 50], 100), 2), measured(*shares([50, 50], 50), 2)
    few = measured(*shares([2, 2], 2), 2)
    assert compare_with_majority({"val": good, "test": bad}).state == "at chance"
    assert compare_with_majority({"val": bad, "test": good}).state == "better"
    assert compare_with_majority({"val": good, "test": few}).state == "better"
    assert "104 val and test images" in compare_with_majority({"val": bad, "test": few}).warnings[0]
    few_say = compare_with_majority({"val": good, "test": few}).warnings[0]
    assert "(test 4)" in few_say
    assert "raise images.test_share" in few_say
    nothing = compare_with_majority({})
    assert nothing.state == "unknown"
    assert "no labelled val or test images" in nothing.warnings[0]


@pytest.mark.parametrize("counts", [[2] * 4, [5, 3], [1] * 12])
def test_the_number_that_would_tell_does(counts):
    """Of students that are right as often as chance, and as one of some use, with this many images."""
    labels, answers = shares(counts, sum(counts) // 6)
    (words, *_) = compare_with_majority({"test": measured(labels, answers, len(counts))}).warnings
    assert "too few to tell" in words
    assert "images.test_share" in words
    enough = int(re.search(r"Some (\d+) would tell", words)[1])
    chance = max(counts) / sum(counts)
    states = []
    for share in (chance, chance + (1 - chance) / 3):
        many = [-(-enough * count // sum(counts)) for count in counts]
        labels, answers = shares(many, round(share * sum(many)))
        states.append(compare_with_majority({"test": measured(labels, answers, len(counts))}).state)
    assert states == ["at chance", "better"]


def test_classes_that_are_never_named_are_named():
    labels = [k for k in range(12) for _ in range(k + 1)]
    answers = [label if label == 11 or label % 4 == 0 else 11 for label in labels]
    found = compare_with_majority({"val": measured(labels, answers, 12), "test": measured(labels, labels[:1] * 78, 12)})
    assert found.warnings[-1].startswith(
        "It never names 8 of the 12 classes of the val and test images: k (22 images), j (20 images), h (16 images)"
    )
    answers[1] = 1
    assert "7 of the 12" in compare_with_majority({"val": measured(labels, answers, 12)}).warnings[-1]
    assert compare_with_majority({"val": measured(labels, labels, 12)}).warnings == ()


@pytest.mark.parametrize("counts", [[10, 10], [40, 40, 40], [16] * 8, [60, 20, 10, 10], [95, 5], [3] * 8])
def test_how_often_known_students_are_misjudged(counts):
    """A student whose answers know nothing passes in 5 % of cases at most; one at a third of the way is refused in no
    more."""
    rng, labels = np.random.default_rng(7), np.repeat(np.arange(len(counts)), counts)
    chance, states = max(counts) / len(labels), {}
    for name, knows in (("guesses", 0.0), ("some use", chance + (1 - chance) / 3)):
        found = []
        for _ in range(300):
            others = (labels + rng.integers(1, len(counts), len(labels))) % len(counts)
            answers = np.where(rng.random(len(labels)) < knows, labels, others)
            if not knows:
                answers = rng.permutation(labels)
            found.append(compare_with_majority({"test": measured(labels, answers, len(counts))}).state)
        states[name] = found
    assert states["guesses"].count("better") <= 300 * 0.08  # 5 %, and three standard errors
    assert states["some use"].count("at chance") <= 300 * 0.08

"""The measures against hand-made cases and slow definitions."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from raydistill.errors import CheckpointError
from raydistill.models.student import build_student, split_logits
from raydistill.results import Exported, Report
from raydistill.stages import evaluate
from raydistill.stages.evaluate import agreement, fitted_temperature, measures
from raydistill.storage.state import result_of


def slow_ece(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Sum over bins of (share of images in it) * |accuracy - mean confidence| (Guo et al. 2017)."""
    total = 0.0
    sure, right = probabilities.max(1), probabilities.argmax(1) == labels
    for b in range(bins):
        inside = [i for i in range(len(labels)) if b / bins < sure[i] <= (b + 1) / bins]
        if inside:
            total += len(inside) / len(labels) * abs(np.mean([right[i] for i in inside]) - np.mean(sure[inside]))
    return total


def test_measures_of_a_case_done_by_hand() -> None:
    logits = np.array([[3, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 3], [0, 3, 0]], np.float32)
    labels = np.array([0, 1, 1, 1, 0])
    result = measures(logits, labels, ("a", "b", "c"), bins=10)
    assert result["accuracy"] == 2 / 5
    assert {(p["true"], p["taken_for"], p["images"]) for p in result["confused"]} == {
        ("a", "b", 1), ("b", "a", 1), ("b", "c", 1),
    }  # fmt: skip
    assert result["per_class"]["a"] == {"images": 2, "answers": 2, "recall": 0.5, "precision": 0.5}
    assert result["per_class"]["b"]["recall"] == pytest.approx(1 / 3)
    assert result["per_class"]["c"] == {"images": 0, "answers": 1, "recall": None, "precision": 0.0}
    assert result["balanced_accuracy"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert result["top5"] == 1.0


def test_interval_is_wilson() -> None:
    logits = np.zeros((50, 2), np.float32)
    logits[:40, 0], logits[40:, 1] = 1, 1
    low, high = measures(logits, np.zeros(50, int), ("a", "b"), 15)["interval"]
    z, p, n = 1.959963984540054, 0.8, 50
    centre, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert low == pytest.approx((centre - half) / (1 + z * z / n))
    assert high == pytest.approx((centre + half) / (1 + z * z / n))


def test_ece_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 2, (300, 7)).astype(np.float32), rng.integers(0, 7, 300)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    result = measures(logits, labels, tuple("abcdefg"), bins=15)
    assert result["ece"] == pytest.approx(slow_ece(probabilities, labels, 15), abs=1e-6)


def test_top5_counts_the_true_class_among_the_five_best() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(0, 1, (200, 9)).astype(np.float32), rng.integers(0, 9, 200)
    expected = np.mean([label in np.argsort(row)[-5:] for row, label in zip(logits, labels, strict=True)])
    assert measures(logits, labels, tuple("abcdefghi"), 15)["top5"] == pytest.approx(expected)


def test_agreement() -> None:
    assert agreement(np.eye(4), np.eye(4)[[0, 1, 3, 2]]) == 0.5


def test_student_logits_do_not_depend_on_the_batch_size(tiny_set) -> None:
    student = build_student(tiny_set.job("j").config.student, 3)
    student.train()
    cpu = torch.device("cpu")
    runs = [split_logits(student, tiny_set.samples, "train", cpu, size)[0] for size in (1, 7, 64)]
    assert student.training
    for run in runs[1:]:
        np.testing.assert_allclose(run, runs[0], atol=1e-5)


def test_the_fitted_temperature_undoes_a_scaling() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 1.5, (4000, 5)).astype(np.float32)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(5, p=row / row.sum()) for row in chances.astype(float)])
    assert fitted_temperature(logits, labels) == pytest.approx(1, abs=0.06)
    assert fitted_temperature(3 * logits, labels) == pytest.approx(3 * fitted_temperature(logits, labels), rel=1e-3)


def test_the_fitted_temperature_is_finite_where_every_answer_is_right() -> None:
    assert 0.009 < fitted_temperature(np.eye(4, dtype=np.float32) * 9, np.arange(4)) < 0.1


def test_confused_pairs_are_the_confusion_matrix_without_its_diagonal() -> None:
    rng = np.random.default_rng(4)
    logits, labels = rng.normal(0, 1, (300, 6)).astype(np.float32), rng.integers(0, 6, 300)
    expected = confusion_matrix(labels, logits.argmax(1))
    np.fill_diagonal(expected, 0)
    pairs = measures(logits, labels, tuple("abcdef"), 15)["confused"]
    assert [pair["images"] for pair in pairs] == sorted(expected[expected > 0], reverse=True)
    for pair in pairs:
        assert expected["abcdef".index(pair["true"]), "abcdef".index(pair["taken_for"])] == pair["images"]


@pytest.mark.parametrize("num_classes", [2, 5000])
def test_nothing_grows_with_the_square_of_the_classes(num_classes) -> None:
    rng = np.random.default_rng(5)
    logits, labels = rng.normal(0, 1, (60, num_classes)).astype(np.float32), rng.integers(0, num_classes, 60)
    names = tuple(f"kind {k}" for k in range(num_classes))
    tracemalloc.start()
    found = measures(logits, labels, names, 15)
    assert 0 < fitted_temperature(logits, labels) < 1000
    evaluate._columns(logits, 60, num_classes)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20e6  # a table of all pairs has 25 million entries
    assert len(json.dumps(found)) < 130 * num_classes + 10_000


def test_predictions_keep_the_likeliest_of_very_many_classes(monkeypatch) -> None:
    logits = np.random.default_rng(6).normal(0, 1, (7, 300)).astype(np.float32)
    whole = evaluate._columns(logits, 7, 300)
    monkeypatch.setattr(evaluate, "_MOST_WHOLE", 299)
    kept, without = evaluate._columns(logits, 7, 300), evaluate._columns(None, 7, 300)
    np.testing.assert_array_equal(np.stack(whole["logits"].to_numpy(zero_copy_only=False)), logits)
    for n, (values, classes) in enumerate(zip(kept["logits"].to_pylist(), kept["classes"].to_pylist(), strict=True)):
        assert classes == np.argsort(-logits[n], kind="stable")[:100].tolist()
        np.testing.assert_array_equal(values, logits[n][classes])
        assert kept["class"][n].as_py() == whole["class"][n].as_py() == classes[0]
        expected = np.exp(logits[n].max()) / np.exp(logits[n]).sum()
        assert kept["probability"][n].as_py() == pytest.approx(expected, rel=1e-5)
    assert {name: column.type for name, column in without.items()} == {n: c.type for n, c in kept.items()}
    assert all(column.null_count == 7 for column in without.values())


def of_a_stranger(change) -> dict[str, object]:
    """The result of `evaluate` as its DONE holds it, with a change."""
    found = measures(np.eye(3, dtype=np.float32)[[0, 1, 1]], np.array([0, 1, 2]), ("a", "b", "c"), bins=10)
    report = Report("ws/evaluate-0", {"val": found}, {"val": found}, {"val": 1.0}, 1.0, 1, 1, 1.0, None, "CPU")
    done = json.loads(json.dumps(asdict(report)))
    change(done)
    return done


ELSEWHERE = "x/../../../private"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda done: done["student"].update({ELSEWHERE: done["student"]["val"]}), "has to be 'val' or 'test'"),
        (lambda done: done.update(student={"val": 5}), "student.val has to be a mapping"),
        (lambda done: done["student"]["val"].pop("accuracy"), "student.val.accuracy is missing"),
        (lambda done: done["student"]["val"].update(ece="<b>"), "student.val.ece has to be a valid number"),
        (lambda done: done["student"]["val"]["per_class"]["a"].pop("recall"), "student.val.per_class.a is missing"),
        (lambda done: done["student"]["val"]["confused"][0].update(true="z"), "confused on val is none of its classes"),
        (lambda done: done["teacher"].clear(), "measured on different splits"),
        (lambda done: done["agreement"].update(val=2.0), "agreement.val has to be less than or equal to 1"),
    ],
)  # fmt: skip
def test_a_report_of_a_stranger_names_no_other_files_and_has_what_the_page_shows(change, said) -> None:
    """The names of splits are part of the names of figures, which the page shows."""
    assert result_of(of_a_stranger(lambda done: None), "ws/evaluate-0", Report).student["val"]["accuracy"] == 2 / 3
    with pytest.raises(CheckpointError, match=f"ws/evaluate-0/DONE is not what raydistill writes .*({said})"):
        result_of(of_a_stranger(change), "ws/evaluate-0", Report)


@pytest.mark.parametrize("odd", [{"int8": {"kept": 1.0}}, {"speed": {"student, onnx": {}}}])
def test_an_export_of_a_stranger_has_what_the_page_shows(odd) -> None:
    done = {"path": "ws/export-0", "files": {}, "differences": {}, "int8": None, "speed": {}}
    assert result_of(done, "ws/export-0", Exported).int8 is None
    with pytest.raises(CheckpointError, match="ws/export-0/DONE is not what raydistill writes"):
        result_of({**done, **odd}, "ws/export-0", Exported)

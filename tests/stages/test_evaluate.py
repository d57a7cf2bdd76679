"""The measures against hand-made cases and slow definitions."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_calibration_error

from raydistill.engine import measures as measured
from raydistill.engine import predictions
from raydistill.engine.measures import Answers, agreement, fitted_temperature
from raydistill.errors import CheckpointError
from raydistill.models.student import build_student, split_logits
from raydistill.results import Exported, Report
from raydistill.storage.state import result_of


def measures(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], bins: int) -> dict[str, object]:
    return measured.measures(Answers.of(logits, labels), labels, classes, bins)


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


def test_measures_of_parts_are_those_of_libraries_on_all_logits() -> None:
    rng = np.random.default_rng(8)
    logits, labels = rng.normal(0, 3, (900, 40)).astype(np.float32), rng.integers(0, 40, 900)
    parts = [Answers.of(logits[n : n + 250], labels[n : n + 250]) for n in range(0, 900, 250)]
    names = ("class_N", "probability_N", "in_top5_N")
    answers = Answers(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
    found = measured.measures(answers, labels, tuple(map(str, range(40))), 15)
    scores = torch.from_numpy(logits).softmax(1)
    assert found["accuracy"] == accuracy_score(labels, logits.argmax(1))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, scores.numpy(), k=5), abs=1e-12)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)), abs=1e-12)
    expected = multiclass_calibration_error(scores, torch.from_numpy(labels), 40, n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(float(expected), abs=1e-6)
    scaled = torch.from_numpy(logits / 1.7).softmax(1).amax(1)
    np.testing.assert_allclose(measured.probability_at(logits, 1.7), scaled, atol=1e-7)


def test_agreement() -> None:
    assert agreement(np.arange(4), np.array([0, 1, 3, 2])) == 0.5


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
    predictions.table_of(rows_of_images(labels), {"student": logits}, num_classes)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20e6  # a table of all pairs has 25 million entries
    assert len(json.dumps(found)) < 130 * num_classes + 10_000


def rows_of_images(labels: np.ndarray) -> pa.Table:
    ids = [f"{n:032x}" for n in range(len(labels))]
    return pa.table({"sample_id": ids, "label": pa.array(labels, pa.int32()), "split": ["val"] * len(ids)})


def test_predictions_keep_the_likeliest_of_very_many_classes(monkeypatch) -> None:
    rng = np.random.default_rng(6)
    logits, rows = rng.normal(0, 1, (7, 300)).astype(np.float32), rows_of_images(rng.integers(0, 300, 7))
    whole = predictions.table_of(rows, {"student": logits}, 300)
    monkeypatch.setattr(predictions, "_MOST_WHOLE", 299)
    kept = predictions.table_of(rows, {"student": logits}, 300)
    np.testing.assert_array_equal(np.stack(whole["student_logits"].to_numpy()), logits)
    for table in (whole, kept, whole.slice(2, 3), kept.slice(2, 3)):
        start = int(table["sample_id"][0].as_py(), 16)
        np.testing.assert_array_equal(predictions.student_logits(table), logits[start : start + len(table)])
    lists = zip(kept["student_logits"].to_pylist(), kept["student_classes"].to_pylist(), strict=True)
    for n, (values, classes) in enumerate(lists):
        assert classes == np.argsort(-logits[n], kind="stable")[:100].tolist()
        np.testing.assert_array_equal(values, logits[n][classes])
        assert kept["student_class"][n].as_py() == whole["student_class"][n].as_py() == classes[0]
        expected = np.exp(logits[n].max()) / np.exp(logits[n]).sum()
        assert kept["student_probability"][n].as_py() == pytest.approx(expected, rel=1e-5)
    written = predictions.kept_columns(kept)
    for name in ("class", "probability", "logits", "classes"):
        assert written[f"teacher_{name}"].type == written[f"student_{name}"].type
        assert written[f"teacher_{name}"].null_count == 7
    assert written.num_columns == 3 + 2 * 4


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

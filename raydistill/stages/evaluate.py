"""evaluate: measure the student and its teacher.

Shapes: N images, C classes, K classes whose logits are kept, P images of a part.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet as pq
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_fscore_support
from torchmetrics.functional.classification import multiclass_calibration_error

from raydistill.config import RunConfig
from raydistill.data.sample import SampleSet
from raydistill.data.targets import read_columns
from raydistill.engine.speed import images_per_second
from raydistill.execution import Execution
from raydistill.identity import evaluate_directory, held_out_directory
from raydistill.models.heads import load_head
from raydistill.models.student import read_student, split_logits
from raydistill.models.teacher import load_teacher
from raydistill.results import PREDICTIONS_FILE, AdaptedTeacher, Report, StudentCheckpoint
from raydistill.runtime.progress import Progress
from raydistill.stages.adapt import split_features
from raydistill.storage.directory import StageDirectory
from raydistill.storage.state import result_of

# Results grow with the number of images and of classes, never with their product: they hold this many pairs of
# confused classes and, above this many classes, the logits of the likeliest classes only.
_MOST_PAIRS, _MOST_WHOLE, _LIKELIEST = 1000, 1000, 100
_PART = 512


def evaluate_student(
    config: RunConfig,
    samples: SampleSet,
    adapted: AdaptedTeacher | None,
    student: StudentCheckpoint,
    directory: StageDirectory,
    progress: Progress,
) -> Report:
    """Measure student and teacher on val and on test."""
    directory.begin()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = read_student(student.path, config.student)[0].to(device)
    splits = [split for split in ("val", "test") if samples.num_rows(split)]
    measured: dict[str, dict[str, Any]] = {"student": {}, "teacher": {}}
    agreements, temperature, predictions = {}, None, []
    with progress.task("evaluate", sum(map(samples.num_rows, splits)), "images") as advance:
        for split in splits:  # one split at a time: with many classes the logits are large
            all_logits, all_labels = split_logits(network, samples, split, device, config.evaluate.batch_size)
            labels_N = all_labels[all_labels >= 0]
            logits = {"student": all_logits[all_labels >= 0]}
            if adapted is not None:
                where = adapted.features if split == "val" else held_out_directory(config, samples).path
                logits["teacher"] = load_head(adapted.path).logits(split_features(samples, where, split)[0])
                agreements[split] = agreement(logits["student"], logits["teacher"])
            for who, logits_NC in logits.items():
                measured[who][split] = measures(logits_NC, labels_N, samples.classes, config.evaluate.calibration_bins)
            if split == "val":
                temperature = fitted_temperature(logits["student"], labels_N)
            if temperature is not None:
                measured["student"][split]["ece_calibrated"] = _calibration_error(
                    logits["student"] / temperature, labels_N, config.evaluate.calibration_bins
                )
            predictions.append(_predictions(samples, split, logits))
            advance(len(all_labels))
    teacher_parameters, teacher_speed = (None, None) if adapted is None else _teacher_cost(config, device)
    report = Report(
        path=directory.path,
        student=measured["student"],
        teacher=measured["teacher"] or None,
        agreement=agreements or None,
        temperature=temperature,
        student_parameters=student.num_parameters,
        teacher_parameters=teacher_parameters,
        student_images_per_second=images_per_second(network, network.preprocessing.size, device),
        teacher_images_per_second=teacher_speed,
        device=torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        kept=student.kept,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(predictions) if predictions else pa.table({}), sink)
    directory.write(PREDICTIONS_FILE, bytes(sink.getvalue().to_pybytes()))
    directory.write_json("report.json", asdict(report))
    directory.finish(asdict(report))
    return report


def _teacher_cost(config: RunConfig, device: torch.device) -> tuple[int, float | None]:
    """The backbone's parameters, and its images a second with evaluate.time_teacher."""
    assert config.teacher is not None
    teacher = load_teacher(config.teacher).backbone.to(device)
    is_timed = config.evaluate.time_teacher
    speed = images_per_second(teacher, teacher.preprocessing.size, device) if is_timed else None
    return sum(parameter.numel() for parameter in teacher.parameters()), speed


def measures(logits_NC: np.ndarray, labels_N: np.ndarray, classes: tuple[str, ...], bins: int) -> dict[str, Any]:
    """Accuracy with its 95 % Wilson interval, top-5, expected calibration error; images, answers, precision and recall
    by class; and the pairs of classes that are confused, the most frequent first."""
    num_classes, predicted_N = len(classes), logits_NC.argmax(1)
    correct = int((predicted_N == labels_N).sum())
    interval = binomtest(correct, len(labels_N)).proportion_ci(method="wilson")
    best_NK = torch.from_numpy(logits_NC).topk(min(5, num_classes), dim=1).indices.numpy()
    precision, recall, _, support = precision_recall_fscore_support(
        labels_N, predicted_N, labels=range(num_classes), zero_division=0.0
    )
    answers = np.bincount(predicted_N, minlength=num_classes)
    table = {
        name: {
            "images": int(support[k]), "answers": int(answers[k]), "recall": _of_any(recall[k], support[k]),
            "precision": float(precision[k]),
        }
        for k, name in enumerate(classes)
    }  # fmt: skip
    return {
        "images": len(labels_N),
        "accuracy": correct / len(labels_N),
        "interval": [float(interval.low), float(interval.high)],
        "top5": float((best_NK == labels_N[:, None]).any(axis=1).mean()),
        "ece": _calibration_error(logits_NC, labels_N, bins),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "per_class": table,
        "confused": [
            {"true": classes[k], "taken_for": classes[j], "images": count}
            for k, j, count in confused_pairs(predicted_N, labels_N)[:_MOST_PAIRS]
        ],
    }


def confused_pairs(answers_N: np.ndarray, labels_N: np.ndarray) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images), the most frequent first."""
    wrong_N = answers_N != labels_N
    pairs, counts = np.unique(np.stack([labels_N, answers_N])[:, wrong_N], axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(pairs[0, n]), int(pairs[1, n]), int(counts[n])) for n in order]


def _calibration_error(logits_NC: np.ndarray, labels_N: np.ndarray, bins: int) -> float:
    scores_NC, truth_N = torch.from_numpy(logits_NC).softmax(dim=1), torch.from_numpy(labels_N)
    return float(multiclass_calibration_error(scores_NC, truth_N, logits_NC.shape[1], n_bins=bins, norm="l1"))


def _of_any(value: float, count: int) -> float | None:
    """None for a class without images: that is not a recall of 0."""
    return float(value) if count else None


def fitted_temperature(logits_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """The temperature that minimises the cross-entropy (temperature scaling, Guo et al. 2017, section 4.2). It lies
    between 0.01 and 100: if every answer is right, the optimum is 0."""

    parts = [
        (torch.from_numpy(logits_NC[n : n + _PART]), torch.from_numpy(labels_N[n : n + _PART]))
        for n in range(0, len(labels_N), _PART)
    ]

    def loss(exponent: float) -> float:
        scaled = ((part_PC.double() / 10**exponent, truth_P) for part_PC, truth_P in parts)
        return sum(float(torch.nn.functional.cross_entropy(*part, reduction="sum")) for part in scaled)

    return float(10 ** minimize_scalar(loss, bounds=(-2, 2), method="bounded").x)


def _predictions(samples: SampleSet, split: str, logits: dict[str, np.ndarray]) -> pa.Table:
    """One row for each labelled image of a split: its class, and of student and teacher (null without one) the
    predicted class, its probability and the logits. With very many classes it holds the highest logits only, in
    descending order, and their classes in one more column."""
    rows = pa.concat_tables(
        read_columns(samples, split, shard, "sample_id", "label", "split")
        for shard in range(len(samples.shards[split]))
    )
    rows = rows.filter(rows["label"].is_valid())
    for who in ("student", "teacher"):
        for name, values in _columns(logits.get(who), rows.num_rows, len(samples.classes)).items():
            rows = rows.append_column(f"{who}_{name}", values)
    return rows


def _columns(logits_NC: np.ndarray | None, num_rows: int, num_classes: int) -> dict[str, pa.Array]:
    kinds = {"class": pa.int32(), "probability": pa.float32(), "logits": pa.list_(pa.float32())}
    if num_classes > _MOST_WHOLE:
        kinds["classes"] = pa.list_(pa.int32())
    if logits_NC is None:
        return {name: pa.nulls(num_rows, kind) for name, kind in kinds.items()}
    class_N = logits_NC.argmax(1)
    highest_N1 = np.take_along_axis(logits_NC, class_N[:, None], axis=1)
    sure_N = 1 / np.exp(logits_NC - highest_N1).sum(axis=1)
    found = {"class": class_N, "probability": sure_N, "logits": logits_NC}
    if "classes" in kinds:
        kept = torch.from_numpy(logits_NC).topk(_LIKELIEST, dim=1)
        found |= {"logits": kept.values.numpy(), "classes": kept.indices.numpy()}
    return {name: pa.array(list(found[name]), kind) for name, kind in kinds.items()}


def agreement(student_logits_NC: np.ndarray, teacher_logits_NC: np.ndarray) -> float:
    """Share of images for which both predict the same class."""
    return float((student_logits_NC.argmax(1) == teacher_logits_NC.argmax(1)).mean())


def evaluate(execution: Execution) -> None:
    config, samples, outcome = execution.config, execution.samples, execution.outcome
    directory = evaluate_directory(config, samples)

    def work(_: Any) -> None:
        assert outcome.student is not None
        evaluate_student(config, samples, outcome.adapted, outcome.student, directory, execution.progress)

    report = outcome.report = result_of(execution.result(directory, work), directory.path, Report)
    if config.generate is not None:
        without = evaluate_directory(config.model_copy(update={"generate": None}), samples).done()
        other = None if without is None else result_of(without, without["path"], Report)
        outcome.without_generated = other if other and other.student.keys() == report.student.keys() else None
    metrics = {
        f"{who}_{split}_{name}": float(values[split][name])
        for who, values in (("student", report.student), ("teacher", report.teacher or {}))
        for split in values for name in ("accuracy", "top5", "ece")
    }  # fmt: skip
    metrics |= {f"agreement_{split}": share for split, share in (report.agreement or {}).items()}
    parent, student = execution.tracker.parent, outcome.directories["distill"]
    parent.log(metrics)
    parent.note({stage: path.rpartition("/")[2] for stage, path in outcome.directories.items()})
    assert outcome.student is not None
    parent.note({"student_precision": outcome.student.precision})
    if outcome.adapted is not None:
        parent.note({"teacher_precision": outcome.adapted.precision})
    if "://" not in report.path:
        parent.files([report.path], "evaluate")
        parent.files([f"{student}/student.safetensors", f"{student}/student.json"], "student")

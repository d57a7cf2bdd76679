"""evaluate: what the student can do, beside its teacher, in numbers and pictures.

Shapes: N images, C classes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet as pq
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from raydistill.config import RunConfig
from raydistill.data.sample import SampleSet
from raydistill.data.targets import read_samples
from raydistill.infra.artifacts import StageDirectory, held_out_directory
from raydistill.infra.progress import Progress
from raydistill.models.student import read_student, split_logits
from raydistill.models.teacher import load_head, load_teacher
from raydistill.stages.adapt import AdaptedTeacher, split_features
from raydistill.stages.distill import StudentCheckpoint, read_epochs
from raydistill.stages.figures import confusion_figure, curves_figure, per_class_figure, reliability_figure
from raydistill.stages.speed import images_per_second

PREDICTIONS_FILE = "predictions.parquet"


@dataclass(frozen=True)
class Report:
    """What `evaluate` leaves behind, also as `report.json`; the pictures lie beside it."""

    path: str
    student: dict[str, Any]  # split -> measures
    teacher: dict[str, Any] | None
    agreement: dict[str, float] | None  # split -> share of equal top-1
    temperature: float | None  # divides the student's logits so that it is as sure as it is right; fitted on val
    student_parameters: int
    teacher_parameters: int | None
    student_images_per_second: float
    teacher_images_per_second: float | None  # where evaluate.time_teacher asks for it
    device: str


def evaluate_student(
    config: RunConfig,
    samples: SampleSet,
    adapted: AdaptedTeacher | None,
    student: StudentCheckpoint,
    directory: StageDirectory,
    progress: Progress,
) -> Report:
    """Measure student and teacher on val and test, apart, and draw what the numbers do not show."""
    directory.begin()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = read_student(student.path)[0].to(device)
    logits: dict[str, dict[str, np.ndarray]] = {"student": {}, "teacher": {}}
    labels: dict[str, np.ndarray] = {}
    splits = [split for split in ("val", "test") if samples.num_rows(split)]
    where = {}
    if adapted is not None:
        where = {"val": adapted.features, "test": held_out_directory(config, samples).path}
    with progress.task("evaluate", sum(map(samples.num_rows, splits)), "images") as advance:
        for split in splits:
            all_logits, all_labels = split_logits(network, samples, split, device, config.evaluate.batch_size)
            labelled = all_labels >= 0
            logits["student"][split], labels[split] = all_logits[labelled], all_labels[labelled]
            if adapted is not None:
                features, _ = split_features(samples, where[split], split)
                logits["teacher"][split] = load_head(adapted.path).logits(features)
            advance(len(all_labels))
    teacher_network = None
    if adapted is not None and config.teacher is not None:
        teacher_network = load_teacher(config.teacher)[0].to(device)
    bins = config.evaluate.calibration_bins
    measured = {
        who: {s: measures(values, labels[s], samples.classes, bins) for s, values in of_split.items()}
        for who, of_split in logits.items()
    }
    temperature = fitted_temperature(logits["student"]["val"], labels["val"]) if "val" in labels else None
    if temperature is not None:
        for split, of_split in measured["student"].items():
            calibrated_NC = logits["student"][split] / temperature
            of_split["ece_calibrated"] = measures(calibrated_NC, labels[split], samples.classes, bins)["ece"]
    report = Report(
        path=directory.path,
        student=measured["student"],
        teacher=measured["teacher"] or None,
        agreement={s: agreement(logits["student"][s], v) for s, v in logits["teacher"].items()} or None,
        temperature=temperature,
        student_parameters=student.num_parameters,
        teacher_parameters=None if teacher_network is None else _count(teacher_network),
        student_images_per_second=images_per_second(network, network.preprocessing.size, device),
        teacher_images_per_second=None
        if teacher_network is None or not config.evaluate.time_teacher
        else images_per_second(teacher_network, teacher_network.preprocessing.size, device),
        device=torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
    )
    _draw(config, samples, directory, student, logits, labels)
    directory.write(PREDICTIONS_FILE, _predictions(samples, splits, logits))
    directory.write_json("report.json", asdict(report))
    directory.finish(asdict(report))
    return report


def measures(logits_NC: np.ndarray, labels_N: np.ndarray, classes: tuple[str, ...], bins: int) -> dict[str, Any]:
    """Accuracy with its 95 % Wilson interval, top-5, expected calibration error, and precision and recall by class."""
    scores, truth = torch.from_numpy(logits_NC).softmax(dim=1), torch.from_numpy(labels_N)
    num_classes, predicted = len(classes), logits_NC.argmax(1)
    correct = int((predicted == labels_N).sum())
    interval = binomtest(correct, len(labels_N)).proportion_ci(method="wilson")
    top5 = multiclass_accuracy(scores, truth, num_classes, top_k=min(5, num_classes), average="micro")
    ece = multiclass_calibration_error(scores, truth, num_classes, n_bins=bins, norm="l1")
    precision, recall, _, support = precision_recall_fscore_support(
        labels_N, predicted, labels=range(num_classes), zero_division=0.0
    )
    table = {
        name: {"images": int(support[k]), "recall": _of_any(recall[k], support[k]), "precision": float(precision[k])}
        for k, name in enumerate(classes)
    }
    return {
        "images": len(labels_N),
        "accuracy": correct / len(labels_N),
        "interval": [float(interval.low), float(interval.high)],
        "top5": float(top5),
        "ece": float(ece),
        "balanced_accuracy": float(np.mean([recall[k] for k in range(num_classes) if support[k]])),
        "per_class": table,
        "confusion": confusion_matrix(labels_N, predicted, labels=range(num_classes)).tolist(),
    }


def _of_any(value: float, count: int) -> float | None:
    """A class without images has no recall, which is not the same as a recall of 0."""
    return float(value) if count else None


def fitted_temperature(logits_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """The divisor of the logits at which the labels are likeliest (temperature scaling, Guo et al. 2017, section 4.2);
    within a hundredth and a hundred, since where every answer is right no logit is sure enough."""

    def mean_loss(exponent: float) -> float:
        scaled_NC = torch.from_numpy(logits_NC).double() / 10**exponent
        return float(torch.nn.functional.cross_entropy(scaled_NC, torch.from_numpy(labels_N)))

    return float(10 ** minimize_scalar(mean_loss, bounds=(-2, 2), method="bounded").x)


def _predictions(samples: SampleSet, splits: list[str], logits: dict[str, dict[str, np.ndarray]]) -> bytes:
    """Parquet bytes: each labelled val and test image with its class and both networks' logits."""
    tables = []
    for split in splits:
        rows = pa.concat_tables(
            read_samples(samples, split, shard).select(["sample_id", "label", "split"])
            for shard in range(len(samples.shards[split]))
        )
        rows = rows.filter(rows["label"].is_valid())
        for who in ("student", "teacher"):
            values = list(logits[who][split]) if split in logits[who] else [None] * rows.num_rows
            rows = rows.append_column(f"{who}_logits", pa.array(values, pa.list_(pa.float32())))
        tables.append(rows)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables), sink)
    return bytes(sink.getvalue().to_pybytes())


def agreement(student_logits_NC: np.ndarray, teacher_logits_NC: np.ndarray) -> float:
    """Share of images on which both name the same class first."""
    return float((student_logits_NC.argmax(1) == teacher_logits_NC.argmax(1)).mean())


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _draw(
    config: RunConfig,
    samples: SampleSet,
    directory: StageDirectory,
    student: StudentCheckpoint,
    logits: dict[str, dict[str, np.ndarray]],
    labels: dict[str, np.ndarray],
) -> None:
    directory.write("curves.png", curves_figure(read_epochs(student.path)))
    for split, truth in labels.items():
        of_split = {who: values[split] for who, values in logits.items() if split in values}
        directory.write(f"confusion_{split}.png", confusion_figure(of_split["student"], truth, samples.classes, split))
        directory.write(
            f"reliability_{split}.png", reliability_figure(of_split, truth, config.evaluate.calibration_bins, split)
        )
        directory.write(f"per_class_{split}.png", per_class_figure(of_split, truth, samples.classes, split))

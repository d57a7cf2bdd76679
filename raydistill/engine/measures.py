"""What is measured of a classifier's answers.

Shapes: N images, C classes, K likeliest classes, P images of a part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_fscore_support
from torchmetrics.functional.classification import binary_calibration_error

# Results grow with the number of images and of classes, never with their product.
_MOST_PAIRS, _PART = 1000, 512


@dataclass(frozen=True)
class Answers:
    """All that `measures` needs of N logits: the predicted class, its probability, and whether the true class is one of
    the five likeliest."""

    class_N: np.ndarray
    probability_N: np.ndarray
    in_top5_N: np.ndarray

    @staticmethod
    def of(logits_NC: np.ndarray, labels_N: np.ndarray) -> Answers:
        logits = torch.from_numpy(logits_NC)
        best_NK = logits.topk(min(5, logits.shape[1]), dim=1).indices.numpy()
        in_top5_N = (best_NK == labels_N[:, None]).any(axis=1)
        return Answers(logits_NC.argmax(1), logits.softmax(dim=1).amax(dim=1).numpy(), in_top5_N)


def measures(answers: Answers, labels_N: np.ndarray, classes: tuple[str, ...], bins: int) -> dict[str, Any]:
    """Accuracy with its 95 % Wilson interval, top-5, expected calibration error; images, answers, precision and recall
    by class; and the pairs of classes that are confused, the most frequent first."""
    num_classes, predicted_N = len(classes), answers.class_N
    right_N = predicted_N == labels_N
    correct = int(right_N.sum())
    interval = binomtest(correct, len(labels_N)).proportion_ci(method="wilson")
    precision, recall, _, support = precision_recall_fscore_support(
        labels_N, predicted_N, labels=range(num_classes), zero_division=0.0
    )
    counts = np.bincount(predicted_N, minlength=num_classes)
    table = {
        name: {
            "images": int(support[k]), "answers": int(counts[k]), "recall": _of_any(recall[k], support[k]),
            "precision": float(precision[k]),
        }
        for k, name in enumerate(classes)
    }  # fmt: skip
    return {
        "images": len(labels_N),
        "accuracy": correct / len(labels_N),
        "interval": [float(interval.low), float(interval.high)],
        "top5": float(answers.in_top5_N.mean()),
        "ece": calibration_error(answers.probability_N, right_N, bins),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "per_class": table,
        "confused": [
            {"true": classes[k], "taken_for": classes[j], "images": count}
            for k, j, count in _confused_pairs(predicted_N, labels_N)[:_MOST_PAIRS]
        ],
    }


def _confused_pairs(answers_N: np.ndarray, labels_N: np.ndarray) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images), the most frequent first."""
    wrong_N = answers_N != labels_N
    pairs, counts = np.unique(np.stack([labels_N, answers_N])[:, wrong_N], axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(pairs[0, n]), int(pairs[1, n]), int(counts[n])) for n in order]


def calibration_error(probability_N: np.ndarray, right_N: np.ndarray, bins: int) -> float:
    """The expected calibration error (Guo et al. 2017, equation 3) of answers with these probabilities. torchmetrics'
    measure for two classes takes them as they are; that for more would take all C probabilities, to find the highest.
    """
    found = binary_calibration_error(
        torch.from_numpy(probability_N), torch.from_numpy(right_N).int(), n_bins=bins, norm="l1"
    )
    return float(found)


def _of_any(value: float, count: int) -> float | None:
    """None for a class without images: that is not a recall of 0."""
    return float(value) if count else None


def fitted_temperature(logits_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """The temperature that minimises the cross-entropy (temperature scaling, Guo et al. 2017, section 4.2). It lies
    between 0.01 and 100: if every answer is right, the optimum is 0. The logits may be in a file: they are read in
    parts, some 30 times."""

    parts = [
        (torch.from_numpy(logits_NC[n : n + _PART]), torch.from_numpy(labels_N[n : n + _PART]))
        for n in range(0, len(labels_N), _PART)
    ]

    def loss(exponent: float) -> float:
        scaled = ((part_PC.double() / 10**exponent, truth_P) for part_PC, truth_P in parts)
        return sum(float(torch.nn.functional.cross_entropy(*part, reduction="sum")) for part in scaled)

    return float(10 ** minimize_scalar(loss, bounds=(-2, 2), method="bounded").x)


def probability_at(logits_NC: np.ndarray, temperature: float) -> np.ndarray:
    """(N,) probabilities of the predicted classes at a temperature, read in parts."""
    parts = (logits_NC[n : n + _PART] for n in range(0, len(logits_NC), _PART))
    return np.concatenate(
        [torch.from_numpy(part_PC / temperature).softmax(dim=1).amax(dim=1).numpy() for part_PC in parts]
    )


def agreement(student_class_N: np.ndarray, teacher_class_N: np.ndarray) -> float:
    """Share of images for which both predict the same class."""
    return float((student_class_N == teacher_class_N).mean())

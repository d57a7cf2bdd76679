"""The task's own loss: cross-entropy with the labels, by class weights and smoothed labels (Szegedy et al. 2016, arXiv
1512.00567) where they are asked for.

Shapes: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

UNLABELLED = -1


@dataclass(frozen=True)
class ClassWeights:
    """The weight of each class, and what the weighted sum over a batch is divided by: see `label_weight`."""

    weights_C: torch.Tensor
    divisor: torch.Tensor


def cross_entropy(
    logits_BC: torch.Tensor,
    labels_B: torch.Tensor,
    weights_B: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    classes: ClassWeights | None = None,
) -> torch.Tensor:
    """Mean cross-entropy in nats over the labelled images; 0 (with a gradient of 0) if none is labelled.

    `labels_B` holds class indices, or `UNLABELLED`. `weights_B` multiply the images' losses; the divisor stays the
    number of labelled images, so an image of weight 0 counts as one of loss 0. With class weights it is the labelled
    images' sum of those, as in torch's CrossEntropyLoss, which also says how weights and smoothing go together.
    """
    losses = functional.cross_entropy(
        logits_BC.float(),
        labels_B,
        None if classes is None else classes.weights_C,
        ignore_index=UNLABELLED,
        reduction="sum" if weights_B is None else "none",
        label_smoothing=label_smoothing,
    )
    total = losses if weights_B is None else (weights_B * losses).sum()
    if classes is not None:
        return total / classes.divisor.clamp(min=torch.finfo(torch.float32).tiny)
    return total / (labels_B != UNLABELLED).sum().clamp(min=1)


def label_weight(labels_B: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
    """The sum of the class weights of the labelled images."""
    return (weights_C[labels_B.clamp(min=0)] * (labels_B != UNLABELLED)).sum()


def class_weights(
    asked: Literal["balanced"] | Mapping[str, float], classes: Sequence[str], num_labelled_C: np.ndarray
) -> tuple[float, ...]:
    """The weight of each class. `balanced` is that of scikit-learn's `compute_class_weight`, after King & Zeng 2001:
    all classes with labelled images have the same sum of weights, and the mean weight of the labelled images is 1. A
    class without one has weight 1: no real image has its label, but generated ones may."""
    if asked != "balanced":
        return tuple(float(asked.get(name, 1.0)) for name in classes)
    present = np.count_nonzero(num_labelled_C)
    balanced_C = num_labelled_C.sum() / (max(present, 1) * np.maximum(num_labelled_C, 1))
    return tuple(np.where(num_labelled_C > 0, balanced_C, 1.0).tolist())

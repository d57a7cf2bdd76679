"""The task's own loss: cross-entropy with the labels.

Shapes: B images, C classes.
"""

import torch
from torch.nn import functional

UNLABELLED = -1


def cross_entropy(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats over the labelled images; 0 (with a gradient of 0) where none is labelled.

    `labels_B` holds class indices, `UNLABELLED` for images without one.
    """
    total = functional.cross_entropy(logits_BC.float(), labels_B, ignore_index=UNLABELLED, reduction="sum")
    return total / (labels_B != UNLABELLED).sum().clamp(min=1)

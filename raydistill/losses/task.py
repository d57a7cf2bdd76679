"""The task's own loss: cross-entropy with the labels.

Shapes: B images, C classes.
"""

import torch
from torch.nn import functional

UNLABELLED = -1


def cross_entropy(
    logits_BC: torch.Tensor, labels_B: torch.Tensor, weights_B: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean cross-entropy in nats over the labelled images; 0 (with a gradient of 0) if none is labelled.

    `labels_B` holds class indices, or `UNLABELLED`. `weights_B` multiply the images' losses; the divisor stays the
    number of labelled images, so an image of weight 0 counts as one of loss 0.
    """
    if weights_B is None:
        total = functional.cross_entropy(logits_BC.float(), labels_B, ignore_index=UNLABELLED, reduction="sum")
    else:
        each_B = functional.cross_entropy(logits_BC.float(), labels_B, ignore_index=UNLABELLED, reduction="none")
        total = (weights_B * each_B).sum()
    return total / (labels_B != UNLABELLED).sum().clamp(min=1)

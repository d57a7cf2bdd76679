"""The task's own loss: cross-entropy with the labels.

Shapes: B images, C classes.
"""

import torch
from torch.nn import functional

UNLABELLED = -1


def cross_entropy(
    logits_BC: torch.Tensor, labels_B: torch.Tensor, weights_B: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean cross-entropy in nats over the labelled images; 0 (with a gradient of 0) where none is labelled.

    `labels_B` holds class indices, `UNLABELLED` for images without one. With `weights_B` each image's is multiplied by
    its weight, and still divided by the number of labelled images: an image of weight 0 then counts as one of loss 0.
    """
    if weights_B is None:
        total = functional.cross_entropy(logits_BC.float(), labels_B, ignore_index=UNLABELLED, reduction="sum")
    else:
        each_B = functional.cross_entropy(logits_BC.float(), labels_B, ignore_index=UNLABELLED, reduction="none")
        total = (weights_B * each_B).sum()
    return total / (labels_B != UNLABELLED).sum().clamp(min=1)

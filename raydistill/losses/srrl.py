"""Softmax regression representation learning. Yang, Martinez, Bulat & Tzimiropoulos, ICLR 2021 ("Knowledge Distillation
via Softmax Regression Representation Learning").

Shapes: B images, D features of the teacher, C classes.
"""

import torch
from torch.nn import functional


def srrl(
    adapted_BD: torch.Tensor, adapted_logits_BC: torch.Tensor, teacher_BD: torch.Tensor, teacher_logits_BC: torch.Tensor
) -> torch.Tensor:
    """Mean squared error between the student's features, mapped into the teacher's space, and the teacher's, plus that
    between the logits of the teacher's head for both."""
    features = functional.mse_loss(adapted_BD.float(), teacher_BD.float())
    return features + functional.mse_loss(adapted_logits_BC.float(), teacher_logits_BC.float())

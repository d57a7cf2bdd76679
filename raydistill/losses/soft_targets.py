"""Distillation through soft targets. Hinton, Vinyals & Dean 2015, arXiv 1503.02531.

Shapes: B images, C classes.
"""

import torch
from torch.nn import functional


def soft_target_kl(
    student_logits_BC: torch.Tensor, teacher_logits_BC: torch.Tensor, temperature: float
) -> torch.Tensor:
    """T^2 * mean over images of KL(softmax(teacher / T) || softmax(student / T)), in nats.

    The factor T^2 keeps the gradient's size nearly independent of T (section 2 of the paper).
    """
    student_log_BC = functional.log_softmax(student_logits_BC.float() / temperature, dim=1)
    teacher_log_BC = functional.log_softmax(teacher_logits_BC.float() / temperature, dim=1)
    divergence = functional.kl_div(student_log_BC, teacher_log_BC, reduction="batchmean", log_target=True)
    return temperature**2 * divergence

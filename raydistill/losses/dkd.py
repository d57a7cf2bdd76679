"""Decoupled knowledge distillation. Zhao, Cui, Song, Qiu & Liang 2022, arXiv 2203.08679.

Shapes: B images, C classes.
"""

import torch

from raydistill.losses.soft_targets import soft_target_kl
from raydistill.losses.task import UNLABELLED


def dkd(
    student_logits_BC: torch.Tensor,
    teacher_logits_BC: torch.Tensor,
    labels_B: torch.Tensor,
    temperature: float,
    target_factor: float,
    other_factor: float,
) -> torch.Tensor:
    """target_factor * KL of "the target or not" + other_factor * KL among the other classes, both times T^2, in nats,
    mean over images (equation 7 of the paper, whose alpha and beta the factors are).

    The target is the label or, for an unlabelled image, the teacher's top class. With two classes there is only one
    other class, so the second term is 0.
    """
    student_BC, teacher_BC = student_logits_BC.float(), teacher_logits_BC.float()
    target_B = torch.where(labels_B == UNLABELLED, teacher_BC.argmax(dim=1), labels_B)
    of_target = soft_target_kl(
        _target_or_not(student_BC / temperature, target_B), _target_or_not(teacher_BC / temperature, target_B), 1.0
    )
    # By number, since a mask would make the step wait for the device.
    others_BC = torch.arange(student_BC.shape[1] - 1, device=target_B.device).repeat(len(target_B), 1)
    others_BC = others_BC + (others_BC >= target_B[:, None])
    among_others = soft_target_kl(student_BC.gather(1, others_BC), teacher_BC.gather(1, others_BC), temperature)
    return target_factor * temperature**2 * of_target + other_factor * among_others


def _target_or_not(scaled_BC: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
    """Two logits for each image: the target's, and the log-sum-exp of all others."""
    others_B = scaled_BC.scatter(1, target_B[:, None], -torch.inf).logsumexp(dim=1)
    return torch.stack([scaled_BC.gather(1, target_B[:, None])[:, 0], others_B], dim=1)

"""The weighted sum that a student minimises, every term under its own name.

Shapes: B images, C classes, D dimensions of the projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from raydistill.config import Loss
from raydistill.losses.alignment_uniformity import alignment, uniformity
from raydistill.losses.soft_targets import soft_target_kl
from raydistill.losses.task import cross_entropy


@dataclass(frozen=True)
class Outputs:
    """What one network says of a batch: logits, and features projected to the unit sphere (None where no term reads
    them)."""

    logits_BC: torch.Tensor
    projected_BD: torch.Tensor | None = None


def distillation_loss(
    config: Loss, student: Outputs, teacher: Outputs | None, labels_B: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum to minimise, and its unweighted terms by name; terms of weight 0 are left out.

    L = task * CE + kd * T^2 KL + alignment * L_align + uniformity * (L_unif(student) + L_unif(teacher)) / 2, the total
    of Farhat & Chen 2024 with all weights 1. Computed in fp32 whatever the autocast.
    """
    terms: dict[str, torch.Tensor] = {}
    if config.task_weight:
        terms["task"] = cross_entropy(student.logits_BC, labels_B)
    if teacher is not None and config.kd_weight:
        terms["kd"] = soft_target_kl(student.logits_BC, teacher.logits_BC, config.temperature)
    if teacher is not None and student.projected_BD is not None and teacher.projected_BD is not None:
        if config.alignment_weight:
            terms["alignment"] = alignment(student.projected_BD, teacher.projected_BD, config.alignment_alpha)
        if config.uniformity_weight:
            both = [uniformity(network.projected_BD, config.uniformity_t) for network in (student, teacher)]
            terms["uniformity"] = (both[0] + both[1]) / 2
    weights = config.model_dump()
    total = sum((weights[f"{name}_weight"] * value for name, value in terms.items()), student.logits_BC.new_zeros(()))
    return total.float(), terms

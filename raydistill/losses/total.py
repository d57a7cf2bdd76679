"""The weighted sum that a student minimises, every term under its own name.

Shapes: B images, C classes, E and D features of student and teacher, P dimensions of the projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from raydistill.config import Loss
from raydistill.losses.alignment_uniformity import alignment, uniformity
from raydistill.losses.crd import Negatives, crd
from raydistill.losses.dist import dist
from raydistill.losses.dkd import dkd
from raydistill.losses.features import feature_distance
from raydistill.losses.info_nce import info_nce
from raydistill.losses.relational import rkd_angle, rkd_distance
from raydistill.losses.soft_targets import soft_target_kl
from raydistill.losses.srrl import srrl
from raydistill.losses.standardised import standardised_kl
from raydistill.losses.task import ClassWeights, cross_entropy


@dataclass(frozen=True)
class Outputs:
    """One network's outputs for a batch; None for those that no loss term reads."""

    logits_BC: torch.Tensor
    features_BD: torch.Tensor | None = None  # pooled, of the network's own width
    projected_BP: torch.Tensor | None = None  # on the unit sphere
    adapted_BD: torch.Tensor | None = None  # the student's features in the teacher's space
    adapted_logits_BC: torch.Tensor | None = None  # of the teacher's head for them


def distillation_loss(
    config: Loss,
    student: Outputs,
    teacher: Outputs | None,
    labels_B: torch.Tensor,
    progress: float = 0.0,
    negatives: Negatives | None = None,
    weights_B: torch.Tensor | None = None,
    classes: ClassWeights | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum to minimise, and its unweighted terms by name, without terms whose weight is always 0.

    The default is the total of Farhat & Chen 2024 with all weights 1: L = CE + T^2 KL + L_align + (L_unif(student) +
    L_unif(teacher)) / 2. `progress` is the share of steps done, for weights that change. It computes in fp32 even under
    autocast. `weights_B` are the images' weights in the task term, `classes` those of their classes.
    """
    with torch.autocast(labels_B.device.type, enabled=False):
        terms = {
            name: cross_entropy(student.logits_BC, labels_B, weights_B, config.label_smoothing, classes)
            if name == "task"
            else _term(name, config, student, teacher, labels_B, negatives)
            for name in config.terms
        }
    total = sum(
        (config.weight(name, progress) * value for name, value in terms.items()), labels_B.new_zeros(()).float()
    )
    return total, terms


def _term(
    name: str,
    config: Loss,
    student: Outputs,
    teacher: Outputs | None,
    labels_B: torch.Tensor,
    negatives: Negatives | None,
) -> torch.Tensor:
    assert teacher is not None, "the config refuses such a term without a teacher"
    logits = (student.logits_BC, teacher.logits_BC)
    features = (student.features_BD, teacher.features_BD)
    projected = (student.projected_BP, teacher.projected_BP)
    temperature, contrastive_temperature = config.temperature, config.contrastive_temperature
    match name:
        case "kd":
            return soft_target_kl(*logits, temperature)
        case "dkd":
            return dkd(*logits, labels_B, temperature, config.dkd_target_factor, config.dkd_other_factor)
        case "dist":
            return dist(*logits, temperature)
        case "standardised_kd":
            return standardised_kl(*logits, temperature)
        case "alignment":
            return alignment(*projected, config.alignment_alpha)
        case "uniformity":
            spread = [uniformity(projected_BP, config.uniformity_t) for projected_BP in projected]
            return (spread[0] + spread[1]) / 2
        case "info_nce":
            return info_nce(*projected, contrastive_temperature)
        case "crd":
            assert negatives is not None
            return crd(*projected, negatives, contrastive_temperature)
        case "srrl":
            return srrl(student.adapted_BD, student.adapted_logits_BC, teacher.features_BD, teacher.logits_BC)
        case "feature":
            return feature_distance(student.adapted_BD, teacher.features_BD, config.feature_distance)
        case "rkd_distance":
            return rkd_distance(*features)
        case "rkd_angle":
            return rkd_angle(*features)
    raise AssertionError(f"the config has a term without a loss: {name}")

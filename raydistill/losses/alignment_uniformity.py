"""Alignment and uniformity on the unit sphere. Wang & Isola 2020, arXiv 2005.10242; for distillation: Farhat & Chen
2024, arXiv 2404.03263, where the positive pair is the student's and the teacher's embedding of one view.

Shapes: B images, D dimensions of the projection; rows are expected to have unit length.
"""

import math

import torch


def alignment(student_BD: torch.Tensor, teacher_BD: torch.Tensor, alpha: float) -> torch.Tensor:
    """Mean over images of ||z_student - z_teacher||_2^alpha."""
    squared_B = (student_BD.float() - teacher_BD.float()).square().sum(dim=1)
    if alpha == 2:
        return squared_B.mean()
    # The root's gradient is infinite at zero distance; the floor is far below fp32's resolution of a unit vector.
    return squared_B.clamp(min=1e-12).pow(alpha / 2).mean()


def uniformity(projected_BD: torch.Tensor, t: float) -> torch.Tensor:
    """log of the mean over pairs i < j of exp(-t ||z_i - z_j||_2^2); 0, its largest value, for a single image.

    A batch of one has no pair: the mean over none would be NaN and spoil the run.
    """
    if len(projected_BD) < 2:
        return projected_BD.sum() * 0.0
    squared_P = torch.pdist(projected_BD.float()).square()
    return squared_P.mul(-t).logsumexp(dim=0) - math.log(len(squared_P))

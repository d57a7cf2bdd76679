"""Relational knowledge distillation: distances and angles among the images of a batch. Park, Kim, Lu & Cho 2019, arXiv
1904.05068.

The resolution of the features' dtype (`torch.finfo(dtype).eps`) is the least distance: distances divide gradients, and
the dtype has to hold these.

Shapes: B images, E and D features of student and teacher, which may differ.
"""

import torch
from torch.nn import functional


def rkd_distance(student_BE: torch.Tensor, teacher_BD: torch.Tensor) -> torch.Tensor:
    """Mean Huber loss between the two networks' distances of pairs, each divided by its network's mean
    distance; 0 for a single image."""
    if len(student_BE) < 2:
        return student_BE.sum() * 0.0
    return functional.smooth_l1_loss(_relative_distances(student_BE), _relative_distances(teacher_BD))


def _relative_distances(features_BD: torch.Tensor) -> torch.Tensor:
    distances = torch.pdist(features_BD.float())
    return distances / distances.mean().clamp(min=torch.finfo(features_BD.dtype).eps)


def rkd_angle(student_BE: torch.Tensor, teacher_BD: torch.Tensor) -> torch.Tensor:
    """Mean Huber loss between the two networks' cosines of the angle at every image j between images i and k, over
    all B^3 triples as in the authors' code: those with i = j or k = j count 0. Between images with equal features there
    is no direction, so the cosine counts 0."""
    return functional.smooth_l1_loss(_angles(student_BE), _angles(teacher_BD))


def _angles(features_BD: torch.Tensor) -> torch.Tensor:
    difference_BBD = features_BD.float()[None] - features_BD.float()[:, None]
    length_BB1 = difference_BBD.norm(dim=2, keepdim=True)
    # Two equal rows have no direction: 0, without the gradient of 10^10 that a small floor would give.
    least = torch.finfo(features_BD.dtype).eps
    direction_BBD = difference_BBD / length_BB1.clamp(min=least).masked_fill(length_BB1 == 0, torch.inf)
    return direction_BBD @ direction_BBD.transpose(1, 2)

"""The distance between the teacher's features and the student's, which a trained adapter maps into the teacher's space:
the hints of Romero et al. 2015, arXiv 1412.6550, on pooled features.

Shapes: B images, D features of the teacher.
"""

import torch
from torch.nn import functional


def feature_distance(adapted_BD: torch.Tensor, teacher_BD: torch.Tensor, distance: str) -> torch.Tensor:
    """`mse`: mean squared difference over images and features; `cosine`: mean over images of 1 - cosine similarity. The
    resolution of the dtype is the least length, because the length divides the gradient."""
    if distance == "mse":
        return functional.mse_loss(adapted_BD.float(), teacher_BD.float())
    resolution = torch.finfo(adapted_BD.dtype).eps
    return 1 - torch.cosine_similarity(adapted_BD.float(), teacher_BD.float(), dim=1, eps=resolution).mean()

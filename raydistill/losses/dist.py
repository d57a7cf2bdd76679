"""Distillation from a stronger teacher: relations instead of exact values. Huang, You, Wang, Qian & Xu 2022, arXiv
2205.10536.

Shapes: B images, C classes.
"""

import torch


def dist(student_logits_BC: torch.Tensor, teacher_logits_BC: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * (mean over images of 1 - the correlation of the two networks' class probabilities, plus mean over classes
    of 1 - their correlation over the batch); Pearson's correlation, probabilities at the temperature.

    A row or column that is constant up to the rounding of fp32 has correlation 0 and counts 1. If its spread, relative
    to its size, is below the resolution of the student's dtype, its correlation shrinks in proportion: the spread
    divides the gradient, and the dtype has to hold it.
    """
    resolution = torch.finfo(student_logits_BC.dtype).eps
    student_BC = (student_logits_BC.float() / temperature).softmax(dim=1)
    teacher_BC = (teacher_logits_BC.float() / temperature).softmax(dim=1)
    between_classes = 1 - _correlation(student_BC, teacher_BC, resolution).mean()
    between_images = 1 - _correlation(student_BC.T, teacher_BC.T, resolution).mean()
    return temperature**2 * (between_classes + between_images)


def _correlation(first_RN: torch.Tensor, second_RN: torch.Tensor, resolution: float) -> torch.Tensor:
    (first_RN, flat_R), (second_RN, other_R) = (_standardised(x, resolution) for x in (first_RN, second_RN))
    return (first_RN * second_RN).sum(dim=1).masked_fill(flat_R | other_R, 0.0)


def _standardised(rows_RN: torch.Tensor, resolution: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of mean 0 and length 1, and which rows are constant: only rounding is left of those, and it would correlate
    with itself."""
    centred_RN = rows_RN - rows_RN.mean(dim=1, keepdim=True)
    spread_R1, size_R1 = (x.norm(dim=1, keepdim=True) for x in (centred_RN, rows_RN))
    flat_R1 = spread_R1 <= 1e-6 * size_R1
    return centred_RN / spread_R1.maximum(resolution * size_R1).masked_fill(flat_R1, torch.inf), flat_R1.squeeze(1)

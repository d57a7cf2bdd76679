"""Distillation from a stronger teacher: relations instead of exact values. Huang, You, Wang, Qian & Xu 2022, arXiv
2205.10536.

Shapes: B images, C classes.
"""

import torch


def dist(student_logits_BC: torch.Tensor, teacher_logits_BC: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * (mean over images of 1 - the correlation of the two networks' class probabilities, plus mean over classes
    of 1 - their correlation over the batch); Pearson's correlation, probabilities at the temperature.

    A column or row without any spread, but for the rounding of fp32, correlates with nothing and counts 1.
    """
    student_BC = (student_logits_BC.float() / temperature).softmax(dim=1)
    teacher_BC = (teacher_logits_BC.float() / temperature).softmax(dim=1)
    between_classes = 1 - _correlation(student_BC, teacher_BC).mean()
    between_images = 1 - _correlation(student_BC.T, teacher_BC.T).mean()
    return temperature**2 * (between_classes + between_images)


def _correlation(first_RN: torch.Tensor, second_RN: torch.Tensor) -> torch.Tensor:
    centred = [x - x.mean(dim=1, keepdim=True) for x in (first_RN, second_RN)]
    correlation_R = torch.cosine_similarity(*centred, dim=1, eps=1e-8)
    # What is left of equal numbers is their rounding, which would correlate with itself and has a gradient of 10^7.
    flat = [c.norm(dim=1) <= 1e-6 * x.norm(dim=1) for c, x in zip(centred, (first_RN, second_RN), strict=True)]
    return correlation_R.masked_fill(flat[0] | flat[1], 0.0)

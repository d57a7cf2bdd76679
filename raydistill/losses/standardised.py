"""Soft targets with standardised logits: they teach the shape of the logits, not their scale. Sun, Ren, Li, Wang & Cao
2024, arXiv 2403.01427.

Shapes: B images, C classes.
"""

import torch

from raydistill.losses.soft_targets import soft_target_kl


def standardised_kl(
    student_logits_BC: torch.Tensor, teacher_logits_BC: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The soft-target KL divergence, times T^2, of logits that have mean 0 and standard deviation 1 in each image.

    Two logits have only one shape, so with two classes the teacher's confidence is lost. Equal logits stay equal. The
    resolution of the dtype (`torch.finfo(dtype).eps`) is the least standard deviation, so that the dtype can hold the
    gradient, which it divides: at most T / eps for an image.
    """
    return soft_target_kl(_standardise(student_logits_BC), _standardise(teacher_logits_BC), temperature)


def _standardise(logits_BC: torch.Tensor) -> torch.Tensor:
    resolution = torch.finfo(logits_BC.dtype).eps
    logits_BC = logits_BC.float()
    centred_BC = logits_BC - logits_BC.mean(dim=1, keepdim=True)
    spread_B1 = logits_BC.std(dim=1, keepdim=True)
    # Equal logits stay equal: dividing their rounding by almost 0 would give a shape, with a gradient of 10^6.
    flat_B1 = spread_B1 <= 1e-6 * logits_BC.abs().amax(dim=1, keepdim=True)
    return centred_BC / spread_B1.clamp(min=resolution).masked_fill(flat_B1, torch.inf)

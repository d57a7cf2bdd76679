"""Soft targets with standardised logits: only the logits' shape is taught, not their scale. Sun, Ren, Li, Wang & Cao
2024, arXiv 2403.01427.

Shapes: B images, C classes.
"""

import torch

from raydistill.losses.soft_targets import soft_target_kl


def standardised_kl(
    student_logits_BC: torch.Tensor, teacher_logits_BC: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The soft-target KL divergence, times T^2, of logits that have mean 0 and standard deviation 1 in each image.

    Two logits have only one shape: with two classes the teacher's confidence is lost. Equal logits have none and stay
    equal. A standard deviation below the resolution of their dtype (`torch.finfo(dtype).eps`) counts as that, so that
    the gradient, which is divided by it, can be held by the dtype: at most T / eps for an image.
    """
    return soft_target_kl(_standardise(student_logits_BC), _standardise(teacher_logits_BC), temperature)


def _standardise(logits_BC: torch.Tensor) -> torch.Tensor:
    resolution = torch.finfo(logits_BC.dtype).eps
    logits_BC = logits_BC.float()
    centred_BC = logits_BC - logits_BC.mean(dim=1, keepdim=True)
    spread_B1 = logits_BC.std(dim=1, keepdim=True)
    # Equal logits have no shape: divided by next to nothing, their rounding would be one, with a gradient of 10^6.
    flat_B1 = spread_B1 <= 1e-6 * logits_BC.abs().amax(dim=1, keepdim=True)
    return centred_BC / spread_B1.clamp(min=resolution).masked_fill(flat_B1, torch.inf)

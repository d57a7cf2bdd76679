"""A student that takes a picture of any size and gives probabilities: Pillow's resampling as matrix products, so that
one ONNX file needs no other code.

Shapes: H x W pixels of the picture, S working pixels on a side, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from raydistill.data.decode import BACKGROUND
from raydistill.data.views import cubic

_GAP = 3.0  # `reducing_gap` of data.decode


class PictureClassifier(nn.Module):
    """(1, C) probabilities of one upright picture without transparency, (H, W, 3) uint8. `shipped` takes working
    images, (1, S, S, 3) uint8, and gives logits."""

    def __init__(self, shipped: nn.Module, size: int, fit: Literal["crop", "pad"]) -> None:
        super().__init__()
        self.shipped, self.size, self.fit = shipped, size, fit
        self.register_buffer("white", torch.tensor(BACKGROUND, dtype=torch.float32))
        self.eval()

    def forward(self, image_HW3: torch.Tensor) -> torch.Tensor:
        return self.shipped(self.working_image(image_HW3)[None]).softmax(1)

    def working_image(self, image_HW3: torch.Tensor) -> torch.Tensor:
        """(S, S, 3) uint8, as `data.decode` makes it: at most two levels apart, and more where a filter overshoots
        black or white in a tall picture, of which Pillow resizes the columns first."""
        rows_H, columns_W = (torch.arange(n, dtype=torch.float32) for n in image_HW3.shape[:2])
        height, width = rows_H[-1] + 1, columns_W[-1] + 1
        side = torch.minimum(height, width) if self.fit == "crop" else torch.maximum(height, width)
        vertical_SH, is_row_S = self._filter(rows_H, height, side)
        horizontal_SW, is_column_S = self._filter(columns_W, width, side)
        image_3HW = image_HW3.permute(2, 0, 1).float()
        image_3SS = _whole(vertical_SH @ _whole(image_3HW @ horizontal_SW.T))  # Pillow rounds after each of the two
        covered_SS1 = (is_row_S[:, None] & is_column_S)[:, :, None]
        return torch.where(covered_SS1, image_3SS.permute(1, 2, 0), self.white).to(torch.uint8)

    def _filter(
        self, pixels_N: torch.Tensor, length: torch.Tensor, side: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(S, N) weights that make S pixels of N, and (S,) whether the picture covers a pixel."""
        points_S = torch.arange(self.size, dtype=torch.float32)
        if self.fit == "crop":
            begin, extent, points = (length - side) / 2, side, torch.full_like(side, self.size)
        else:
            begin, extent = torch.zeros_like(side), length
            points = (self.size * length / side).round().clamp(min=1)
            points_S = points_S - ((self.size - points) / 2).floor()
        is_covered_S = (points_S >= 0) & (points_S < points)
        # Pillow first averages `step` pixels at a time, within what the filter reaches.
        scale = extent / points
        step = (scale / _GAP).floor().clamp(min=1)
        first = torch.where(step > 1, (begin - 1.5 * scale).trunc().clamp(min=0), torch.zeros_like(step))
        reach = torch.minimum((begin + extent + 1.5 * scale).ceil(), length)
        last = torch.where(step > 1, reach, length)
        averaged_N = ((pixels_N - first) / step).floor()
        share_N = 1 / torch.minimum(step, last - first - averaged_N * step).clamp(min=1)
        centres_S = ((begin - first) + (points_S + 0.5) * scale) / step
        distance_SN = (averaged_N + 0.5 - centres_S[:, None]).abs() / (scale / step).clamp(min=1)
        weights_SN = cubic(distance_SN) * torch.where((pixels_N >= first) & (pixels_N < last), share_N, 0.0)
        total_S1 = weights_SN.sum(1, keepdim=True)
        return weights_SN / torch.where(is_covered_S[:, None], total_S1, 1.0), is_covered_S


def _whole(image: torch.Tensor) -> torch.Tensor:
    return (image + 0.5).floor().clamp(0, 255)

"""What the parameters of a view change after crop, resize and flip: rotation, colour, blur, erasing.

Lengths are shares of the view's side and statistics are means, so that a teacher and a student see the same view at
different sizes. Of RandAugment's operations (Cubuk et al. 2020) sharpness, autocontrast and equalize are left out: they
look at a pixel's neighbours, at the extreme pixels and at the histogram, which shrinking an image changes. On clip art,
a view of 96 pixels shrunk to 32 differs from the view of 32 pixels by 96, 61 and 72 % of what these operations do;
with posterize it is 17 %, with solarize 3 to 8 %.

Shapes: B images, S pixels on a side, Q images of these that an operation changes, V numbers that it takes; T taps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from raydistill.data.device import to_device

LARGEST_SIGMA = 2 / 224  # of the view's side; SimCLR (Chen et al. 2020) draws 0.1 to 2 pixels of 224
_LUMA = (0.2989, 0.587, 0.114)
_ERASED = (0.485, 0.456, 0.406)  # ImageNet's mean, one of the fillings in Random Erasing (Zhong et al. 2020)


def changed(images_BCSS: torch.Tensor, parameters_BP: torch.Tensor) -> torch.Tensor:
    """Views with values in [0, 1], changed as their parameters say; the input is overwritten. An operation sees the
    views that it changes and no other."""
    # Asked of the CPU, where the parameters lie: a question to a device would wait for it.
    for operation, columns, off in _OPERATIONS:
        values_BV = parameters_BP[:, columns].float()  # no columns where nothing but crop, flip and colour is stored
        rows_Q = torch.from_numpy(np.flatnonzero((values_BV.numpy() != off).any(axis=1)))
        if not len(rows_Q):
            continue
        values_VQ = to_device(values_BV[rows_Q], images_BCSS.device).unbind(dim=1)
        if len(rows_Q) == len(images_BCSS):
            images_BCSS = operation(images_BCSS, *values_VQ)
        else:
            rows_Q = to_device(rows_Q, images_BCSS.device)
            images_BCSS.index_copy_(0, rows_Q, operation(images_BCSS[rows_Q], *values_VQ))
    return images_BCSS


@functools.cache
def channels(values: tuple[float, float, float], device: torch.device) -> torch.Tensor:
    """(3, 1, 1) float32. Kept, since the copy of numbers to a GPU waits for it."""
    return torch.tensor(values, device=device)[:, None, None]


def _each(*values_Q: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As (Q, 1, 1, 1)."""
    return tuple(one[:, None, None, None] for one in values_Q)


def rotated(images: torch.Tensor, degrees_Q: torch.Tensor) -> torch.Tensor:
    """Counter-clockwise about the centre, bilinear. The corners show the view mirrored at its edges: a single colour
    there would tell the angle."""
    radians_Q = degrees_Q * (math.pi / 180)
    cos_Q, sin_Q = radians_Q.cos(), radians_Q.sin()
    zero_Q = torch.zeros_like(cos_Q)
    where_Q23 = torch.stack([cos_Q, -sin_Q, zero_Q, sin_Q, cos_Q, zero_Q], dim=1).view(-1, 2, 3)
    grid_QSS2 = functional.affine_grid(where_Q23, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid_QSS2, "bilinear", "reflection", align_corners=False)


def coloured(
    images: torch.Tensor, brightness_Q: torch.Tensor, contrast_Q: torch.Tensor, saturation_Q: torch.Tensor
) -> torch.Tensor:
    """Brightness, contrast, saturation in this order, as torchvision defines each for images in [0, 1]."""
    brightness, contrast, saturation = _each(brightness_Q, contrast_Q, saturation_Q)
    luma = channels(_LUMA, images.device)
    images.mul_(brightness).clamp_(0, 1)
    mean_grey = (images * luma).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
    images.sub_(mean_grey).mul_(contrast).add_(mean_grey).clamp_(0, 1)
    grey = (images * luma).sum(dim=1, keepdim=True)
    return images.sub_(grey).mul_(saturation).add_(grey).clamp_(0, 1)


def hue_shifted(images: torch.Tensor, turns_Q: torch.Tensor) -> torch.Tensor:
    """Hue in HSV, shifted by a share of the circle: torchvision's `adjust_hue`."""
    (turns,) = _each(turns_Q)
    red, green, blue = images.split(1, dim=1)
    top = torch.maximum(torch.maximum(red, green), blue)
    chroma = top - torch.minimum(torch.minimum(red, green), blue)
    per_chroma = chroma.clamp(min=1e-20).reciprocal_()  # a grey stays what it is, whatever its hue
    sixths = torch.where(top == green, (blue - red).mul_(per_chroma).add_(2), (red - green).mul_(per_chroma).add_(4))
    sixths = torch.where(top == red, (green - blue).mul_(per_chroma), sixths).add_(6 * turns)
    # Each channel lies below the top by the chroma times a trapezium of the hue, in sixths of the circle.
    apart = (channels((5.0, 3.0, 1.0), images.device) + sixths).remainder_(6)
    return top - torch.minimum(apart, 4 - apart).clamp_(0, 1).mul_(chroma)


def posterized(images: torch.Tensor, bits_Q: torch.Tensor) -> torch.Tensor:
    """Only so many bits a channel: torchvision's `posterize` of floats."""
    (levels,) = _each(bits_Q.exp2())
    return images.mul_(levels).floor_().minimum(levels - 1).div_(levels)


def solarized(images: torch.Tensor, share_Q: torch.Tensor) -> torch.Tensor:
    """Values in this share of the range, from its top, inverted."""
    (share,) = _each(share_Q)
    return torch.where(images >= 1 - share, 1 - images, images)


def blurred(images: torch.Tensor, sigma_Q: torch.Tensor) -> torch.Tensor:
    """Gaussian, sigma as a share of the view's side, over at least 4 sigma to each side; edges are mirrored."""
    count, _, side, _ = images.shape
    reach = math.ceil(4 * LARGEST_SIGMA * side)  # not of these sigmas: a view is the same in any batch
    distances_T = torch.arange(-reach, reach + 1, device=images.device)
    weights_QT = (distances_T / (sigma_Q[:, None] * side)).square_().mul_(-0.5).exp_()
    weights_QT = weights_QT / weights_QT.sum(dim=1, keepdim=True)
    kernels = weights_QT.repeat_interleave(3, dim=0)[:, None, :, None]
    lines = functional.pad(images, (reach,) * 4, "reflect").flatten(0, 1)[None]
    lines = functional.conv2d(lines, kernels, groups=3 * count)
    return functional.conv2d(lines, kernels.transpose(2, 3), groups=3 * count).view(images.shape)


def erased(
    images: torch.Tensor, left_Q: torch.Tensor, top_Q: torch.Tensor, width_Q: torch.Tensor, height_Q: torch.Tensor
) -> torch.Tensor:
    """A rectangle in ImageNet's mean colour, the same for every network. Pixels at its edge are covered in part."""
    side = images.shape[2]
    edges_S = torch.arange(side, device=images.device) / side

    def covered(start_Q: torch.Tensor, extent_Q: torch.Tensor) -> torch.Tensor:
        """(Q, S): the share of each pixel's length that the interval covers."""
        end_Q1, start_Q1 = (start_Q + extent_Q)[:, None], start_Q[:, None]
        return ((edges_S + 1 / side).minimum(end_Q1) - edges_S.maximum(start_Q1)).clamp(min=0) * side

    share_QSS = covered(top_Q, height_Q)[:, :, None] * covered(left_Q, width_Q)[:, None, :]
    return torch.lerp(images, channels(_ERASED, images.device), share_QSS[:, None])


# In the order of their work: what changes, the columns of its parameters, and what these are when it is off.
_OPERATIONS: tuple[tuple[Callable[..., torch.Tensor], slice, int], ...] = (
    (rotated, slice(8, 9), 0),
    (coloured, slice(5, 8), 1),
    (hue_shifted, slice(9, 10), 0),
    (posterized, slice(10, 11), 0),
    (solarized, slice(11, 12), 0),
    (blurred, slice(12, 13), 0),
    (erased, slice(13, 17), 0),
)

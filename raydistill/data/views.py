"""Views: one seeded augmentation of one image, and the one function that renders it for teacher and student alike.

Shapes: B images, P parameters of a view, H x W working pixels, S pixels on a side of what a network sees;
T pixels that a point of a view depends on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

from raydistill.config import Changes, Views
from raydistill.data.device import to_device
from raydistill.data.photometric import LARGEST_SIGMA, changed, channels

# left, top, width, height of the crop as shares of the image; flip (0 or 1); brightness, contrast, saturation factors
NUM_PARAMETERS = 8
# And, where a job asks for any of these, 0 for none: degrees of rotation, counter-clockwise; shift of hue as a share of
# the circle; bits after posterizing; share of the range that solarizing inverts; sigma of the blur as a share of the
# view's side; left, top, width, height of the erased rectangle as shares of the view
MOST_PARAMETERS = 17
WHOLE_IMAGE = np.array([0, 0, 1, 1, 0, 1, 1, 1], np.float32)
_SUPPORT = {"bilinear": 1, "bicubic": 2}  # in pixels on either side of a point
_ATTEMPTS = 10  # RandomResizedCrop's number of tries for a crop that fits


@dataclass(frozen=True)
class Preprocessing:
    """How one network sees an image: `size` pixels on a side. With `resized`, a whole image is resized to that side,
    and the network sees its centre."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    resized: int | None = None


def view_parameters(
    views: Views, seed: int, sample_ids: Sequence[str], indices: Sequence[int] | np.ndarray
) -> np.ndarray:
    """(B, P) float32: view `indices[i]` of image `sample_ids[i]`, a function of only the seed and those two.

    The crop is that of torchvision's RandomResizedCrop: area uniform, aspect ratio log-uniform, the first of ten tries
    that fits, or the whole image if none does. To turn a change on alters no other number.
    """
    changes = views.changes
    keys_B = _keys(seed, sample_ids, indices)
    rows_BP = np.ones((len(keys_B), NUM_PARAMETERS))
    left_R = np.arange(len(keys_B))  # the rows that have no crop yet
    for attempt in range(_ATTEMPTS):
        area_R = views.min_scale + _draw(keys_B[left_R], 2 * attempt) * (1 - views.min_scale)
        ratio_R = np.exp((2 * _draw(keys_B[left_R], 2 * attempt + 1) - 1) * np.log(views.max_ratio))
        sides_2R = np.sqrt([area_R * ratio_R, area_R / ratio_R])
        fits_R = (sides_2R <= 1).all(axis=0)
        rows_BP[left_R[fits_R], 2:4] = sides_2R[:, fits_R].T
        left_R = left_R[~fits_R]
        if not len(left_R):
            break
    place, flip, jitter = (2 * _ATTEMPTS + first for first in (0, 2, 3))  # the numbers after those of the tries
    for axis in (0, 1):
        rows_BP[:, axis] = _draw(keys_B, place + axis) * (1 - rows_BP[:, axis + 2])
    rows_BP[:, 4] = _draw(keys_B, flip) < views.flip
    for k, strength in enumerate((changes.brightness, changes.contrast, changes.saturation)):
        rows_BP[:, 5 + k] += (2 * _draw(keys_B, jitter + k) - 1) * strength
    more = jitter + 3  # the numbers from here on came later, so those above stay what they were
    if changes.grey:
        rows_BP[:, 7] *= _draw(keys_B, more + 1) >= changes.grey  # no saturation
    if not changes.only_colour:
        rows_BP = np.concatenate([rows_BP, _more(changes, keys_B, more + 2)], axis=1)
    if changes.strong_share < 1:
        is_light_B = _draw(keys_B, more) >= changes.strong_share
        rows_BP[is_light_B, 5:8], rows_BP[is_light_B, 8:] = 1, 0
    return rows_BP.astype(np.float32)


def _more(changes: Changes, keys_B: np.ndarray, first: int) -> np.ndarray:
    """(B, P): the parameters beyond NUM_PARAMETERS, from the numbers that begin at `first`."""
    draws_NB = np.array([_draw(keys_B, first + k) for k in range(12)])
    angle, hue, is_posterized, bits, is_solarized, is_blurred, sigma, is_erased, area, ratio = draws_NB[:10]
    # As in Random Erasing (Zhong et al. 2020) and torchvision. A side too long for the view, which is rare, is cut.
    area, ratio = 0.02 + area * (0.33 - 0.02), np.exp((2 * ratio - 1) * np.log(3.3))
    sides_2B = np.sqrt([area * ratio, area / ratio]).clip(max=1)
    rectangle_4B = np.concatenate([draws_NB[10:] * (1 - sides_2B), sides_2B])
    few_bits = 4 + np.floor(4 * bits)  # RandAugment's 4 bits or more (Cubuk et al. 2020)
    columns = [
        (2 * angle - 1) * changes.rotate,
        (2 * hue - 1) * changes.hue,
        (is_posterized < changes.posterize) * few_bits,
        (is_solarized < changes.solarize) * 0.5,  # from one half up, as in BYOL (Grill et al. 2020)
        (is_blurred < changes.blur) * (0.05 + 0.95 * sigma) * LARGEST_SIGMA,  # SimCLR's (Chen et al. 2020)
        *((is_erased < changes.erase) * rectangle_4B),
    ]
    return np.stack(columns, axis=1)


def num_parameters(views: Views) -> int:
    """P of the job's views."""
    return NUM_PARAMETERS if views.changes.only_colour else MOST_PARAMETERS


def stored_views(views: Views, seed: int, sample_ids: Sequence[str]) -> np.ndarray:
    """(K, B, P) float32: all stored views of the images."""
    assert views.per_image != "fresh", "fresh views are not stored"
    count = len(sample_ids)
    rows = view_parameters(views, seed, [*sample_ids] * views.per_image, np.repeat(np.arange(views.per_image), count))
    return rows.reshape(views.per_image, count, rows.shape[1])


def _keys(seed: int, sample_ids: Sequence[str], indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """(B,) uint64: where the random numbers of each view begin."""
    views_B = np.asarray(indices).astype(np.uint64) | np.uint64(seed << 32)
    ids_B2 = np.frombuffer(bytes.fromhex("".join(sample_ids)), ">u8").reshape(-1, 2)
    return _mixed(_mixed(views_B) ^ ids_B2[:, 0].astype(np.uint64))


def _draw(keys_B: np.ndarray, number: int) -> np.ndarray:
    """(B,) uniform numbers in [0, 1): those of this number in the sequences of SplitMix64 (Steele, Lea and Flood 2014),
    a generator without state, so that a whole batch takes a few operations of numpy."""
    step = np.uint64((number + 1) * 0x9E3779B97F4A7C15 % 2**64)
    return (_mixed(keys_B + step) >> np.uint64(11)) * 2.0**-53


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, which changes half of the bits if one changes."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def render(images_BHWC: torch.Tensor, parameters_BP: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """(B, 3, S, S) float32, normalised: crop, antialiased resize, flip, and what `photometric` changes, in one batched
    pass on the images' device. The parameters lie on the CPU."""
    _, rows, columns, _ = images_BHWC.shape
    vertical, horizontal = view_filters(parameters_BP, rows, columns, preprocessing, images_BHWC.device)
    images_BSWC = resample(images_BHWC.float(), vertical)
    images_BSSC = resample(images_BSWC.transpose(1, 2), horizontal).transpose(1, 2)
    images_BCSS = images_BSSC.permute(0, 3, 1, 2).contiguous().div_(255).clamp_(0, 1)
    images_BCSS = changed(images_BCSS, parameters_BP)
    mean, std = (channels(values, images_BCSS.device) for values in (preprocessing.mean, preprocessing.std))
    return images_BCSS.sub_(mean).div_(std)


@dataclass(frozen=True)
class Filter:
    """How each image of a batch is resampled along one side: each of S points is a weighted sum of T pixels there."""

    pixels_BST: torch.Tensor  # int64 indices
    weights_BST: torch.Tensor

    def flipped(self, is_flipped_B: torch.Tensor) -> Filter:
        both = ((values, values.flip(1)) for values in (self.pixels_BST, self.weights_BST))
        return Filter(*(torch.where(is_flipped_B[:, None, None], mirrored, values) for values, mirrored in both))


def view_filters(
    parameters_BP: torch.Tensor, rows: int, columns: int, preprocessing: Preprocessing, device: torch.device
) -> tuple[Filter, Filter]:
    """The vertical and the horizontal filter that crop, resize and flip an image of that many pixels: those of Pillow's
    `resize(box=...)`."""
    size, kind = preprocessing.size, preprocessing.interpolation
    left, top, width, height, flip = parameters_BP[:, :5].float().unbind(dim=1)
    if preprocessing.resized is not None:
        is_whole = (width == 1) & (height == 1)
        # in whole pixels, like torchvision's CenterCrop
        start, extent = round((preprocessing.resized - size) / 2) / preprocessing.resized, size / preprocessing.resized
        left, top = (torch.where(is_whole, start, edge) for edge in (left, top))
        width, height = (torch.where(is_whole, extent, side) for side in (width, height))
    boxes_4B = torch.stack([top * rows, height * rows, left * columns, width * columns])
    taps = math.ceil(2 * _SUPPORT[kind] * boxes_4B[1::2].numpy().max(initial=size) / size) + 1
    top, height, left, width = to_device(boxes_4B, device)
    vertical, horizontal = _filter(top, height, rows, size, kind, taps), _filter(left, width, columns, size, kind, taps)
    return vertical, horizontal.flipped(to_device(flip, device) > 0.5)


def resample(lines_BNx: torch.Tensor, filter: Filter) -> torch.Tensor:
    """(B, S, ...): weighted sums of the lines (B, N, ...). It reads those alone that have a weight, which on CPUs is 3
    to 5 times as fast as products with matrices of weights."""
    images, lines = lines_BNx.shape[:2]
    first_B = torch.arange(images, device=lines_BNx.device) * lines
    pixels, weights = filter.pixels_BST + first_B[:, None, None], filter.weights_BST
    summed = functional.embedding_bag(
        pixels.flatten(0, 1), lines_BNx.flatten(0, 1).flatten(1), mode="sum", per_sample_weights=weights.flatten(0, 1)
    )
    return summed.view(*weights.shape[:2], *lines_BNx.shape[2:])


def _filter(start_B: torch.Tensor, extent_B: torch.Tensor, pixels: int, size: int, kind: str, taps: int) -> Filter:
    """Resamples [start, start + extent) of so many pixels to `size` points. A point's weights sum to 1."""
    scale_B = extent_B / size
    stretch_B11 = scale_B.clamp(min=1)[:, None, None]  # when shrinking, the filter widens: this is the antialiasing
    points_S, device = torch.arange(size, device=start_B.device) + 0.5, start_B.device
    centres_BS1 = (start_B[:, None] + points_S * scale_B[:, None])[:, :, None]
    first_BS1 = (centres_BS1 - _SUPPORT[kind] * stretch_B11).floor()
    positions_BST = first_BS1 + torch.arange(taps, device=device)
    distance_BST = ((positions_BST + 0.5 - centres_BS1) / stretch_B11).abs_()
    weights_BST = (1 - distance_BST).clamp_(min=0) if kind == "bilinear" else cubic(distance_BST)
    weights_BST = weights_BST * ((positions_BST >= 0) & (positions_BST < pixels))
    return Filter(positions_BST.clamp(0, pixels - 1).long(), weights_BST / weights_BST.sum(dim=2, keepdim=True))


def cubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' kernel with a = -0.5, Pillow's BICUBIC."""
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))

"""The rows of benchmarks/engine.py about data: drawing and rendering views, reading shards, the way to the device.

Shapes: B images, H working pixels, S pixels on a side of a view, P parameters of a view; A tries and N numbers drawn.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import InterpolationMode, resized_crop

from benchmarks.engine_bench import VIEWS, Bench, Row, apart
from raydistill.config import Views
from raydistill.data.device import to_device
from raydistill.data.sample import sample_id
from raydistill.data.views import Preprocessing, render, view_parameters


def reference_view_parameters(views: Views, seed: int, sample_ids: Sequence[str], indices: Sequence[int]) -> np.ndarray:
    """As views were drawn before they were drawn by the batch: a Philox generator for each image."""

    def draws(sample: str, view: int) -> np.ndarray:
        key = np.array([int(sample[:16], 16), (seed << 32) | view], np.uint64)
        return (np.random.Philox(key=key).random_raw(26) >> np.uint64(11)) * 2.0**-53

    draws_BN = np.stack([draws(s, int(v)) for s, v in zip(sample_ids, indices, strict=True)])
    area_BA = views.min_scale + draws_BN[:, :10] * (1 - views.min_scale)
    ratio_BA = np.exp((2 * draws_BN[:, 10:20] - 1) * np.log(views.max_ratio))
    width_BA, height_BA = np.sqrt(area_BA * ratio_BA), np.sqrt(area_BA / ratio_BA)
    fits_BA = (width_BA <= 1) & (height_BA <= 1)
    pick = (np.arange(len(draws_BN)), fits_BA.argmax(axis=1))
    width_B, height_B = (np.where(fits_BA.any(axis=1), side_BA[pick], 1) for side_BA in (width_BA, height_BA))
    place_BN, rest_BN, changes = draws_BN[:, 20:22], draws_BN[:, 22:], views.changes
    jitter_BN = 1 + (2 * rest_BN[:, 1:] - 1) * np.array([changes.brightness, changes.contrast, changes.saturation])
    columns = [place_BN[:, 0] * (1 - width_B), place_BN[:, 1] * (1 - height_B), width_B, height_B]
    return np.column_stack([*columns, rest_BN[:, 0] < views.flip, jitter_BN]).astype(np.float32)


def drawing_row(bench: Bench) -> Row:
    """`difference`: between the means over all views, since the two may draw other numbers."""
    ids, indices = [sample_id(bytes([k % 256, k // 256])) for k in range(4096)], [k % VIEWS for k in range(4096)]
    asked = (bench.data.config.views, 0, ids, indices)
    rates = bench.meter.rates(lambda: view_parameters(*asked), lambda: reference_view_parameters(*asked))
    means = [draw(*asked).mean(axis=0) for draw in (view_parameters, reference_view_parameters)]
    return Row("drawing views", "views", *(len(ids) * rate for rate in rates), difference=apart(*means))


@torch.inference_mode()
def rendering_row(bench: Bench) -> Row:
    """Against torchvision, an image at a time. Crops have whole pixels, as torchvision takes them. `difference` leaves
    out the edge, where torchvision does not see what lies beside the crop."""
    side, size, batch = bench.sizes.side, bench.sizes.student_side, bench.sizes.batch
    images = torch.from_numpy(bench.data.images()[:batch].copy()).to(bench.meter.device)
    drawn = view_parameters(bench.data.config.views, 0, bench.data.ids[:batch], [0] * batch)
    boxes = np.round(drawn[:, :4] * side)
    drawn[:, :4], boxes = boxes / side, boxes.astype(int).tolist()
    parameters, preprocessing = torch.from_numpy(drawn), Preprocessing(size, (0.0,) * 3, (1.0,) * 3)
    flips = parameters[:, 4].bool().to(images.device)[:, None, None, None]

    def ours() -> torch.Tensor:
        return render(images, parameters, preprocessing)

    def bare() -> torch.Tensor:
        views = []
        for image_HHC, (left, top, width, height) in zip(images, boxes, strict=True):
            scaled_CHH = image_HHC.permute(2, 0, 1).float() / 255
            views.append(resized_crop(scaled_CHH, top, left, height, width, [size] * 2, InterpolationMode.BICUBIC))
        views_BCSS = torch.stack(views).clamp(0, 1)
        return torch.where(flips, views_BCSS.flip(3), views_BCSS)

    rates, edge = bench.meter.rates(ours, bare), 2 + size // 8
    inner = [path()[..., edge:-edge, edge:-edge] for path in (ours, bare)]
    waits = bench.meter.waits(ours)
    return Row("rendering views", "views", *(batch * rate for rate in rates), waits=waits, difference=apart(*inner))


def reading_row(bench: Bench) -> Row:
    """A shard as the stages read it, against Pillow, which decodes the same images from PNG, both in one thread."""
    images, files = bench.data.images(), []
    for image in images:
        Image.fromarray(image).save(file := io.BytesIO(), "PNG", compress_level=3)
        files.append(file.getvalue())

    def bare() -> np.ndarray:
        return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])

    rates = bench.meter.rates(bench.data.images, bare)
    return Row("reading shards", "images", *(len(files) * rate for rate in rates), difference=apart(images, bare()))


def copying_row(bench: Bench) -> Row:
    """A batch of images as the loop brings it to the device, against a copy from pinned memory to memory that is
    there."""
    meter, batch = bench.meter, bench.sizes.batch
    if meter.device.type == "cpu":
        return Row("host to device", "images", note="a CPU's memory is the device's")
    images = torch.from_numpy(bench.data.images()[:batch].copy())
    pinned, place = images.pin_memory(), torch.empty_like(images, device=meter.device)
    rates = meter.rates(lambda: to_device(images, meter.device), lambda: place.copy_(pinned, non_blocking=True))
    waits = meter.waits(lambda: to_device(images, meter.device))
    return Row(
        "host to device", "images", *(batch * rate for rate in rates), waits=waits, difference=apart(images, place)
    )

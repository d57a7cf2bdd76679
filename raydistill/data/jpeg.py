"""Working images as JPEG in shards, for `images.store: jpeg`.

Pillow decodes them everywhere, so all stages see the same pixels, and readers need no torch. Torchvision's decoder,
which will be removed, takes as long once headers are checked first.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from PIL import Image

from raydistill.config import Images
from raydistill.errors import CheckpointError, damaged_file, reason_of
from raydistill.storage.tables import values


def stored(pixels: bytes, images: Images) -> bytes:
    """What a shard holds of a working image: its pixels, or a JPEG of quality 95 with colours at full size (4:4:4)."""
    if images.store == "pixels" or not pixels:  # a refused image has none
        return pixels
    sink = io.BytesIO()
    Image.frombytes("RGB", (images.size, images.size), pixels).save(sink, "JPEG", quality=95, subsampling=0)
    return sink.getvalue()


def decoded(files: Sequence[bytes], side: int) -> np.ndarray:
    """(R, H, H, 3) uint8 pixels of JPEGs that `stored` made. Raises ValueError: one is damaged, or not of them."""
    images_RHH3 = np.empty((len(files), side, side, 3), np.uint8)
    for image_HH3, data in zip(images_RHH3, files, strict=True):
        try:
            image_HH3[:] = np.asarray(_opened(data, side))
        except Exception as error:  # Pillow raises nearly every error on damaged files
            raise ValueError(reason_of(error)) from None
    return images_RHH3


def with_pixels(table: pa.Table, side: int, path: str) -> pa.Table:
    """The rows of a shard of JPEGs with pixels in the column `image`. Raises CheckpointError, which names the path."""
    try:
        images_RHH3 = decoded(values(table["image"]), side)
    except ValueError as error:
        raise _damaged(path, error) from None
    ends = np.arange(len(images_RHH3) + 1, dtype=np.int32) * (3 * side**2)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(images_RHH3)]
    place = table.schema.get_field_index("image")
    column = pa.Array.from_buffers(pa.binary(), len(images_RHH3), buffers)
    return table.set_column(place, table.schema.field(place), column)


def refuse_other_jpegs(table: pa.Table, side: int, path: str) -> None:
    """Raises CheckpointError if the header of an image of the table is not that of such a JPEG."""
    try:
        for data in values(table["image"]):
            _opened(data, side)
    except Exception as error:
        raise _damaged(path, error) from None


def _opened(data: bytes, side: int) -> Image.Image:
    """Pillow reads only the header here. Others could be large, or have thousands of scans."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
    except Image.UnidentifiedImageError:
        raise ValueError("an image is no JPEG") from None
    if image.size != (side, side) or image.mode != "RGB" or "progressive" in image.info:
        raise ValueError(f"an image is not a plain JPEG of {side} x {side} pixels")
    return image


def _damaged(path: str, error: Exception) -> CheckpointError:
    return damaged_file(path, reason_of(error))

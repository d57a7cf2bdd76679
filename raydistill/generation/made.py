"""Generated images: the files that hold them, and what is known of them without their pixels.

Tasks read the files on all nodes, so this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from raydistill.cluster.plan import Plan
from raydistill.cluster.tasks import in_tasks
from raydistill.config import Images
from raydistill.data.decode import decode
from raydistill.data.jpeg import decoded, stored
from raydistill.data.near_duplicates import difference_hash
from raydistill.storage.tables import read_table, rows_of, values

FILES_OF_A_TASK = 64
MADE = pa.schema(
    [
        pa.field("index", pa.int32()),
        pa.field("attempt", pa.int32()),
        pa.field("seed", pa.int64()),
        pa.field("prompt", pa.string()),
        pa.field("source", pa.string()),  # id of the train image that image-to-image started from
        pa.field("image", pa.binary()),  # PNG as the pipeline made it; null after a failure
        pa.field("id", pa.string()),  # of the PNG's bytes
        pa.field("reason", pa.string()),  # of a failure
        pa.field("contrast", pa.float32()),
        pa.field("hash", pa.binary()),  # 256 bits
        pa.field("seconds", pa.float32()),
    ]
)
FACTS = pa.schema([field for field in MADE if field.name != "image"])


@dataclass(frozen=True, slots=True)
class Made:
    """One attempt at an image."""

    file: str
    row: int
    id: str  # "" after a failure
    seed: int
    prompt: str
    source: str
    reason: str
    contrast: float
    hash: bytes
    seconds: float
    shown: bytes = b""  # the hash of the working image, if it was asked for


Key = tuple[str, int, int]  # class, index, attempt


def look_at(files: Mapping[str, str], images: Images | None, plan: Plan) -> Iterator[tuple[Key, Made]]:
    """What is known of each attempt in files, which have the names of their classes. With `images`, the hash of each
    working image too."""
    units = [{"file": file} for file in files]
    for table in in_tasks(partial(_look, images), units, FILES_OF_A_TASK, plan):
        for r in rows_of(table):
            yield (files[r["file"]], r.pop("index"), r.pop("attempt")), Made(**r)


def _look(images: Images | None, batch: dict[str, np.ndarray]) -> pa.Table:
    return pa.concat_tables([_look_into(str(file), images) for file in batch["file"]])


def _look_into(file: str, images: Images | None) -> pa.Table:
    table = read_table(file, FACTS if images is None else MADE)
    shown = [b""] * len(table)
    if images is not None:
        raw = values(table["image"])
        shown = [b"" if image is None else difference_hash(working_image(image, images)) for image in raw]
    return (
        table.select(FACTS.names)
        .append_column("file", pa.array([file] * len(table), pa.string()))
        .append_column("row", pa.array(range(len(table)), pa.int32()))
        .append_column("shown", pa.array(shown, pa.binary()))
    )


def images_in(file: str) -> list[Any]:
    """The picture in each row of a file of generated images, None after a failure."""
    return values(read_table(file, pa.schema([MADE.field("image")]))["image"])


def made_images(file: str) -> list[bytes]:
    """The pictures in one file, without failed attempts."""
    return [image for image in images_in(file) if image]


def working_image(image: bytes, images: Images) -> Image.Image:
    """The working image as it is read from a shard of `prepare`."""
    picture = square_image(image, images)
    if images.store == "jpeg":
        return Image.fromarray(decoded([stored(picture.tobytes(), images)], images.size)[0])
    return picture


def square_image(image: bytes, images: Images) -> Image.Image:
    """The working image before it is stored."""
    return decode(image, images.size, images.fit, images.max_pixels)

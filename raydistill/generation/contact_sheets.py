"""Contact sheets of generated images."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence

from PIL import Image

from raydistill.config import Images
from raydistill.generation.made import Key, Made, images_in, square_image
from raydistill.generation.selection import Chosen
from raydistill.pages.figures import contact_sheet
from raydistill.storage.directory import StageDirectory

# The most images on one contact sheet, kept and rejected each; and on all sheets together, with many classes.
_MOST_PICTURES, _FEWEST_PICTURES, _PICTURES_IN_ALL = 24, 4, 2400


def draw_sheets(
    directory: StageDirectory,
    names: Sequence[str],
    made: Mapping[Key, Made],
    chosen: Chosen,
    images: Images,
) -> None:
    """A contact sheet for each class: kept images, and rejected ones with the reason."""
    most = min(max(_PICTURES_IN_ALL // len(names), _FEWEST_PICTURES), _MOST_PICTURES)
    kept: dict[str, list[Key]] = defaultdict(list)
    rejected: dict[str, list[Key]] = defaultdict(list)
    for key, verdict in chosen.verdicts.items():
        shown = kept if verdict == "kept" else rejected
        if len(shown[key[0]]) < most:
            shown[key[0]].append(key)
    for number, name in enumerate(names):
        good = [square_image(raw, images) for raw in _raw_images([made[key] for key in kept[name]]) if raw]
        raw = _raw_images([made[key] for key in rejected[name]])
        opened: list[Image.Image | None] = [None if image is None else Image.open(io.BytesIO(image)) for image in raw]
        bad = [(image, chosen.verdicts[key]) for key, image in zip(rejected[name], opened, strict=True)]
        if good or bad:
            directory.write(f"sheet-{number:03d}.png", contact_sheet(name or "no class", good, bad))


def _raw_images(wanted: Sequence[Made]) -> list[bytes | None]:
    """The pipeline's images; None after a failure. It reads each file once."""
    images = {file: images_in(file) for file in {one.file for one in wanted if one.id}}
    return [images[one.file][one.row] if one.id else None for one in wanted]

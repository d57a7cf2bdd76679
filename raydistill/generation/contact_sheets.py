"""Contact sheets of generated images, and the working images of the kept ones."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence

from PIL import Image

from raydistill.config import Images
from raydistill.generation.features import square_image
from raydistill.generation.recipes import Key, Made, images_in
from raydistill.generation.selection import Chosen
from raydistill.pages.figures import contact_sheet
from raydistill.storage.directory import StageDirectory

# The most images on one contact sheet, kept and rejected each; and on all sheets together, with many classes.
_MOST_PICTURES, _FEWEST_PICTURES, _PICTURES_IN_ALL = 24, 4, 2400


def kept_pictures(images: Images, made: Mapping[Key, Made], chosen: Chosen) -> dict[Key, Image.Image]:
    """Working images of the kept images, before they are stored. It reads each file once."""
    by_file: dict[str, list[Key]] = defaultdict(list)
    for key in chosen.kept:
        by_file[made[key].file].append(key)
    found: dict[Key, Image.Image] = {}
    for file, keys in by_file.items():
        raw = images_in(file)
        found |= {key: square_image(raw[made[key].row], images) for key in keys}
    return found


def draw_sheets(
    directory: StageDirectory,
    names: Sequence[str],
    made: Mapping[Key, Made],
    chosen: Chosen,
    pictures: Mapping[Key, Image.Image],
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
        good = [pictures[key] for key in kept[name]]
        raw = _raw_images([made[key] for key in rejected[name]])
        bad = [(image, chosen.verdicts[key]) for key, image in zip(rejected[name], raw, strict=True)]
        if good or bad:
            directory.write(f"sheet-{number:03d}.png", contact_sheet(name or "no class", good, bad))


def _raw_images(wanted: Sequence[Made]) -> list[Image.Image | None]:
    """The pipeline's images; None after a failure. It reads each file once."""
    images = {file: images_in(file) for file in {one.file for one in wanted if one.id}}
    return [Image.open(io.BytesIO(images[one.file][one.row])) if one.id else None for one in wanted]

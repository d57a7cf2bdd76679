"""From a picture to the input of an exported student's files, with only Pillow and NumPy.

`export` writes this module, after the code of `decode`, beside those files, so that the folder needs no raydistill.

Shapes: H working pixels on a side, S pixels on a side of the network's input.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from raydistill.data.decode import decode


class Preprocess:
    """The classes of the student in a folder, and pictures as its files take them, as in training."""

    def __init__(self, folder: str) -> None:
        about = json.loads(Path(folder, "raydistill.json").read_text(encoding="utf-8"))
        self.classes: list[str] = about["classes"]
        self._image, self._seen = about["image"], about["preprocessing"]

    def pixels(self, picture: str) -> np.ndarray:
        """(1, H, H, 3) uint8 of a file."""
        image = self._image
        square = decode(Path(picture).read_bytes(), image["size"], image["fit"], image["max_pixels"])
        return np.stack([np.asarray(square)])  # a copy, because torch warns of read-only arrays

    def normalised(self, picture: str) -> np.ndarray:
        """(1, 3, S, S) float32 of a file."""
        side, resample = self._seen["size"], Image.Resampling[self._seen["interpolation"].upper()]
        bands = np.moveaxis(self.pixels(picture)[0], -1, 0).astype(np.float32)
        resized = [np.asarray(Image.fromarray(band).resize((side, side), resample)) for band in bands]
        small = np.stack(resized).clip(0, 255) / 255
        mean, std = (np.reshape(self._seen[name], (3, 1, 1)) for name in ("mean", "std"))
        normal: np.ndarray = ((small - mean) / std).astype(np.float32)
        return normal[None]

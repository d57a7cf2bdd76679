"""An exported student as a torch module that takes pictures: from its folder, or from the Hugging Face hub."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from raydistill.config import Images
from raydistill.errors import ConfigError, DataError
from raydistill.inference.answers import best
from raydistill.inference.predict import Predictor, find_units
from raydistill.models.formats import network_inputs
from raydistill.storage.filesystems import read_file

_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_FILES = ("raydistill.json", "config.json", "*.safetensors", "*.safetensors.index.json")
Picture = str | os.PathLike[str] | Image.Image | np.ndarray
Pictures = Picture | Sequence[Picture]


@dataclass(frozen=True)
class Prediction:
    """What the student says of one picture: its likeliest class and the probability of each; or `error`, why it says
    nothing."""

    name: str
    label: str | None
    probability: float
    probabilities: dict[str, float]  # the likeliest first
    error: str = ""


class Student(nn.Module):
    """`student(inputs_B3SS)` gives logits (B, C) of normalised inputs; `preprocess` makes these of pictures; `predict`
    does both. `classes` are the names of the logits, in order."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._predictor = Predictor(folder, "torch")
        self.network = self._predictor.network
        self.classes = self._predictor.classes
        self.eval()

    def forward(self, inputs_B3SS: torch.Tensor) -> torch.Tensor:
        logits_BC: torch.Tensor = self.network(inputs_B3SS)
        return logits_BC

    def preprocess(self, picture: Picture) -> torch.Tensor:
        """(3, S, S) float32, as in training. Raises DataError where the picture cannot be used, OSError of its file."""
        image = self._predictor.working_image(_bytes_of(picture))
        return torch.from_numpy(network_inputs(image[None], self._predictor.preprocessing, False)[0])

    def predict(self, pictures: Pictures) -> list[Prediction]:
        """One for each picture, in order: of paths, folders and files of many images as `raydistill predict` reads
        them, of PIL images, and of uint8 arrays (H, W) or (H, W, 3 or 4)."""
        some = pictures if isinstance(pictures, Sequence) and not isinstance(pictures, str) else [pictures]
        return [prediction for number, picture in enumerate(some) for prediction in self._of(picture, number)]

    def _of(self, picture: Picture, number: int) -> list[Prediction]:
        if isinstance(picture, str | os.PathLike):
            answers = self._predictor.answer(find_units([os.fspath(picture)]))
        else:
            answers = self._predictor.answer_bytes([(f"picture {number}", _bytes_of(picture))])
        found = []
        for answer in answers:
            ranked = {name: probability for name, _, probability in best(answer, self.classes, 0)}
            label = next(iter(ranked), None)
            found.append(Prediction(answer.name, label, ranked.get(label or "", 0.0), ranked, answer.error))
        return found


def load_student(place: str) -> Student:
    """Raises ConfigError where the folder, or the hub's repository, is no exported student."""
    name = place.removeprefix("hf:")
    if os.path.exists(place) or not _REPOSITORY.fullmatch(name):
        return Student(place)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Student(snapshot_download(name, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{place}: no such folder, and none on the hub that can be read ({reason})") from None


def _bytes_of(picture: Picture) -> bytes:
    """A file's bytes; of a PIL image or an array those of a lossless file of it, so that all take one way."""
    if isinstance(picture, str | os.PathLike):
        return read_file(os.fspath(picture), Images.model_fields["max_bytes"].default)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise DataError(f"an array of {picture.dtype} and shape {picture.shape}: use uint8, (H, W) or (H, W, 3)")
        picture = Image.fromarray(picture)
    sink = io.BytesIO()
    lossless = "PNG" if picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16") else "TIFF"
    picture.save(sink, lossless, exif=picture.getexif())
    return sink.getvalue()

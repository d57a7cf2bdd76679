"""An exported student as a torch module for pictures, from its folder or from the Hugging Face hub."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from raydistill.errors import ConfigError, DataError, reason_of
from raydistill.inference.predict import Predictor, find_units, read_units
from raydistill.inference.predictions import Answer, best
from raydistill.models.formats import network_inputs
from raydistill.models.metadata import METADATA_FILE, read_metadata
from raydistill.models.weights import ask_hub, why_none
from raydistill.storage.filesystems import read_file

_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_FILES = ("raydistill.json", "config.json", "*.safetensors", "*.safetensors.index.json")
_PICTURE = (str, os.PathLike, Image.Image, np.ndarray, bytes)
Picture = str | os.PathLike[str] | Image.Image | np.ndarray | bytes
Pictures = Picture | Iterable[Picture]


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture: its class and the probability of each class; or `error`, the reason why there is
    none."""

    name: str
    label: str | None
    probability: float
    probabilities: dict[str, float]  # in descending order
    error: str = ""


class Student(nn.Module):
    """`student(inputs_B3SS)` gives logits (B, C) of normalised inputs; `preprocess` makes these from pictures;
    `predict` does both. `classes` are the names of the logits, in order."""

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
        """(3, S, S) float32, as in training. Raises DataError: the picture cannot be used; OSError: its file cannot."""
        if isinstance(picture, str | os.PathLike):
            data = read_file(os.fspath(picture), self._predictor.most_bytes)
        else:
            data = _bytes_of(picture)
        image = self._predictor.working_image(data)
        return torch.from_numpy(network_inputs(image[None], self._predictor.preprocessing, False)[0])

    def predict(self, pictures: Pictures) -> list[Prediction]:
        """One prediction for each picture, in order. Pictures are paths, folders and files of many images as in
        `raydistill predict`, PIL images, uint8 arrays (H, W) or (H, W, 3 or 4), and files' bytes. It runs in eval mode,
        on the network's device. Raises DataError: a path does not exist; TypeError: an item is not a picture."""
        some = [pictures] if isinstance(pictures, _PICTURE) else list(pictures)
        was_training = self.training
        self.eval()
        try:
            return list(map(self._prediction, self._predictor.answer_bytes(self._read(some))))
        finally:
            self.train(was_training)

    def _read(self, pictures: Sequence[Any]) -> Iterator[tuple[str, bytes | None, str]]:
        for number, picture in enumerate(pictures):
            if isinstance(picture, str | os.PathLike):
                yield from read_units(find_units([os.fspath(picture)]), self._predictor.most_bytes)
                continue
            try:
                yield f"picture {number}", _bytes_of(picture), ""
            except DataError as error:
                yield f"picture {number}", None, str(error)

    def _prediction(self, answer: Answer) -> Prediction:
        ranked = {name: probability for name, _, probability in best(answer, self.classes, 0)}
        label = next(iter(ranked), None)
        return Prediction(answer.name, label, ranked.get(label or "", 0.0), ranked, answer.error)


def load_student(place: str) -> Student:
    """Raises ConfigError: the folder, or the hub's repository, is not an exported student."""
    name = place.removeprefix("hf:")
    if os.path.exists(place) or not _REPOSITORY.fullmatch(name):
        return Student(place)
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    ask_hub()
    try:
        # First, or a wrong name would download any model's weights.
        read_metadata(os.path.dirname(hf_hub_download(name, METADATA_FILE)))
        return Student(snapshot_download(name, allow_patterns=list(_FILES)))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = f"no readable repository on the hub ({why_none(error)})"
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):  # the hub's answer
            reason = "the hub's repository is not an exported student"
        raise ConfigError(f"{place}: no such folder, and {reason}") from None


def _bytes_of(picture: Any) -> bytes:
    """The bytes of a lossless file of it, so that all pictures are decoded in one way. Raises DataError, TypeError."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,), (4,)):
            raise DataError(f"an array of {picture.dtype} and shape {picture.shape}: use uint8, (H, W) or (H, W, 3)")
    elif not isinstance(picture, Image.Image):
        raise TypeError(f"{type(picture).__name__}: use a path, a PIL image, a uint8 array, or a file's bytes")
    sink = io.BytesIO()
    try:
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            image.save(sink, "PNG", exif=image.getexif())
        else:
            image.save(sink, "TIFF", exif=image.getexif(), compression="raw")
    except Exception as error:  # Pillow raises many classes
        raise DataError(f"cannot be read: {reason_of(error)}") from None
    return sink.getvalue()

"""`student.json` and `raydistill.json`, which describe a student. They may come from others. Reading them does not load
torch, so that the command refuses a wrong folder at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt

from raydistill.config import Images
from raydistill.errors import ConfigError
from raydistill.escaping import quoted
from raydistill.storage.filesystems import read_file
from raydistill.storage.state import MOST_BYTES, parsed

Engine = Literal["onnx", "torch"]
METADATA_FILE = "raydistill.json"  # what a program needs to use the exported files
# Its required keys by section.
_SAID = {
    "": {"model", "library", "classes", "preprocessing", "image", "input"},
    "image": {"size", "fit", "max_pixels"},
    "preprocessing": {"size", "mean", "std", "interpolation"},
}
_Side = Annotated[int, Field(ge=1, le=2048)]  # as in a job


class NetworkInput(BaseModel):
    """How a working image becomes the network's input."""

    size: _Side
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    interpolation: Literal["bilinear", "bicubic"]


class WorkingImage(BaseModel):
    """How a picture becomes a working image."""

    size: _Side
    fit: Literal["crop", "pad"]
    max_pixels: PositiveInt = Images.model_fields["max_pixels"].default
    max_bytes: PositiveInt = Images.model_fields["max_bytes"].default


class StudentMetadata(BaseModel):
    """`student.json`."""

    model: str
    library: Literal["timm", "transformers"]
    classes: Annotated[list[str], Field(min_length=1, max_length=2**20)]
    preprocessing: NetworkInput
    image: WorkingImage
    training: dict[str, int | float | str | None] | None = None  # which epoch this is, and why

    def as_written(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


class ExportMetadata(StudentMetadata):
    """`raydistill.json`."""

    input: Literal["pixels", "normalised"]


def read_metadata(folder: str) -> dict[str, Any]:
    """Read the description of an exported folder. Raises ConfigError."""
    shown, advice = quoted(folder), "give the folder that `raydistill export` printed"
    if not os.path.isdir(folder):
        reason = "it is not a folder" if os.path.exists(folder) else "no such file or folder"
        if Path(folder).name == "export" and not os.path.exists(folder):  # a link that `run` makes at its end
            reason = "no job has finished there"
        raise ConfigError(f"{shown} is not an exported student: {reason}; {advice}")
    try:
        data = read_file(str(Path(folder, METADATA_FILE)), MOST_BYTES)
        about = parsed(data, dict[str, Any])
        for section, keys in _SAID.items():
            said = about[section] if section else about
            if isinstance(said, dict) and (lacking := keys - said.keys()):
                raise ConfigError(
                    f"{shown}/{METADATA_FILE} lacks {', '.join(sorted(lacking))}; export the student again"
                )
        return parsed(data, ExportMetadata).model_dump(exclude={"training"})
    except FileNotFoundError:
        raise ConfigError(f"{shown} is not an exported student: it has no {METADATA_FILE}; {advice}") from None
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error)
        raise ConfigError(
            f"{shown} is not an exported student: its {METADATA_FILE} is damaged ({reason}); export the student again"
        ) from None


def check_export(folder: str, engine: str) -> dict[str, Any]:
    """Read the description, and check that the folder has the files of the engine. Raises ConfigError."""
    if engine not in get_args(Engine):
        raise ConfigError(f"--engine {engine}: use {' or '.join(get_args(Engine))}")
    about, shown = read_metadata(folder), quoted(folder)
    advice = "export the student again"
    if engine == "onnx":
        advice = "use --engine torch, or export with onnx in export.formats"
    for pattern in ("config.json", "model*.safetensors") if engine == "torch" else ("model.onnx",):
        found = list(Path(folder).glob(pattern))
        if not any(file.is_file() for file in found):
            name = pattern.replace("*", "")
            raise ConfigError(f"{shown}{f'/{name} is not a regular file' if found else f' has no {name}'}; {advice}")
    return about

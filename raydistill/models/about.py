"""What a student's folder says of it, in `student.json` and `raydistill.json`, by anybody's hand."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt

from raydistill.config import Images

_Side = Annotated[int, Field(ge=1, le=2048)]  # as in a job


class Seen(BaseModel):
    """How a working image becomes what the network sees."""

    size: _Side
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    interpolation: Literal["bilinear", "bicubic"]


class Working(BaseModel):
    """How a picture becomes a working image."""

    size: _Side
    fit: Literal["crop", "pad"]
    max_pixels: PositiveInt = Images.model_fields["max_pixels"].default
    max_bytes: PositiveInt = Images.model_fields["max_bytes"].default


class StudentAbout(BaseModel):
    """`student.json`."""

    model: str
    library: Literal["timm", "transformers"]
    classes: Annotated[list[str], Field(min_length=1, max_length=2**20)]
    preprocessing: Seen
    image: Working

"""views: how an image is augmented."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raydistill.config.section import Count, Section, Share


class Views(Section):
    per_image: Count | Literal["fresh"] = 8
    """K views an image, whose soft targets are stored once and replayed; `fresh`: a new view in each epoch."""
    min_scale: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest share of the image's area that a random crop keeps (RandomResizedCrop)."""
    max_ratio: Annotated[float, Field(ge=1)] = 4 / 3
    """Widest aspect ratio of a random crop; the narrowest is its inverse."""
    flip: Share = 0.5
    """Chance of a left-right flip."""
    brightness: Share = 0.0
    """Largest relative change of brightness."""
    contrast: Share = 0.0
    """Largest relative change of contrast."""
    saturation: Share = 0.0
    """Largest relative change of saturation."""

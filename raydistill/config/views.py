"""views: how an image is augmented."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

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
    store: Literal["full", "compact"] = "full"
    """How soft targets are stored. `full`: the teacher's features in float16. `compact`: a byte for each of the
    components that the head reads, and of those that hold most of the rest's variance; about a twelfth of the size.
    `teach` says how much the head's answers change. A finished `full` directory is made compact without a teacher
    pass."""

    @model_validator(mode="after")
    def _stored(self) -> Views:
        if self.store == "compact" and self.per_image == "fresh":
            raise ValueError("views.store=compact is for stored views, and views.per_image=fresh stores none; drop one")
        return self

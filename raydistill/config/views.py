"""views: how an image is augmented."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raydistill.config.section import Count, Section, Share

BEYOND_COLOUR = ("hue", "rotate", "posterize", "solarize", "blur", "erase")


@dataclass(frozen=True)
class Changes:
    """What happens to a view beside crop and flip, in numbers. The defaults change nothing; the keys of `Views` with
    the same names say what each is."""

    strong_share: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    rotate: float = 0.0
    posterize: float = 0.0
    solarize: float = 0.0
    blur: float = 0.0
    erase: float = 0.0

    @property
    def only_colour(self) -> bool:
        """Whether factors of brightness, contrast and saturation say it all."""
        return not any(getattr(self, key) for key in BEYOND_COLOUR)


STRENGTHS = {
    "light": Changes(),
    "medium": Changes(
        strong_share=0.5, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05, grey=0.1, rotate=5.0, blur=0.25,
        erase=0.1,
    ),
    "strong": Changes(
        strong_share=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.2, rotate=15.0, blur=0.5,
        erase=0.25,
    ),
}  # fmt: skip


class Views(Section):
    per_image: Count | Literal["fresh"] = 8
    """K views an image, whose soft targets are stored once and replayed; `fresh`: a new view in each epoch."""
    min_scale: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest share of the image's area that a random crop keeps (RandomResizedCrop)."""
    max_ratio: Annotated[float, Field(ge=1)] = 4 / 3
    """Widest aspect ratio of a random crop; the narrowest is its inverse."""
    flip: Share = 0.5
    """Chance of a left-right flip."""
    strength: Literal["light", "medium", "strong"] = "light"
    """What the keys below are where they are null. `light`: none of them changes anything. `medium` and `strong`: half
    of the views are changed in colour, rotated, blurred and erased in part; the others stay light."""
    strong_share: Share | None = None
    """Share of the views that the keys below change; the others are only cropped and flipped. null: as `strength` says
    (1, 0.5, 0.5)."""
    brightness: Share | None = None
    """Largest relative change of brightness. null: as `strength` says (0, 0.2, 0.4)."""
    contrast: Share | None = None
    """Largest relative change of contrast. null: as `strength` says (0, 0.2, 0.4)."""
    saturation: Share | None = None
    """Largest relative change of saturation. null: as `strength` says (0, 0.2, 0.4)."""
    hue: Annotated[float, Field(ge=0, le=0.5)] | None = None
    """Largest shift of hue, as a share of the colour circle. null: as `strength` says (0, 0.05, 0.1)."""
    grey: Share | None = None
    """Chance of a view without colour. null: as `strength` says (0, 0.1, 0.2)."""
    rotate: Annotated[float, Field(ge=0, le=180)] | None = None
    """Largest rotation in degrees, to either side; 180 for images without an upright. The view is mirrored at its edges
    to fill the corners. null: as `strength` says (0, 5, 15)."""
    posterize: Share | None = None
    """Chance of 4 to 7 bits a colour instead of 8. null: as `strength` says (0)."""
    solarize: Share | None = None
    """Chance that colours from one half up are inverted. null: as `strength` says (0)."""
    blur: Share | None = None
    """Chance of a Gaussian blur, whose sigma is up to 0.9 % of the view's side (SimCLR's 2 pixels of 224). null: as
    `strength` says (0, 0.25, 0.5)."""
    erase: Share | None = None
    """Chance that a rectangle of 2 to 33 % of the view is painted over with ImageNet's mean colour (Random Erasing).
    null: as `strength` says (0, 0.1, 0.25)."""
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

    @property
    def changes(self) -> Changes:
        """The numbers of `strength`, and those that are given in their place."""
        preset, given = vars(STRENGTHS[self.strength]), vars(self)
        return Changes(**{key: number if given[key] is None else given[key] for key, number in preset.items()})

    @property
    def resolved(self) -> Views:
        """The same views, with every number written out."""
        return self.model_copy(update=asdict(self.changes))

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the views. What is off is left out unless older versions had it, so that their views
        keep their name."""
        older, off = ("brightness", "contrast", "saturation"), asdict(Changes())
        changes = asdict(self.changes)
        if not any(changes[key] for key in changes if key != "strong_share"):  # a share that nothing is done to
            changes = off
        kept = {key: value for key, value in changes.items() if key in older or value != off[key]}
        return self.model_dump(include={"per_image", "min_scale", "max_ratio", "flip"}) | kept

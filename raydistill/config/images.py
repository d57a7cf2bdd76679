"""images: which pictures, at which size, and how they are split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raydistill.config.section import Count, Place, PlaceOrNull, Section, Share

SHARD_BYTES = 64 * 1024**2


class Images(Section):
    path: Place
    """A folder of class folders, a .csv/.jsonl of path+label, a .parquet of image+label, or `example:NAME`."""
    size: Annotated[int, Field(ge=8, le=2048)] = 128
    """Side in pixels of the square working image that every later stage reads."""
    fit: Literal["crop", "pad"] = "crop"
    """How a picture becomes square: cut to its centre, or padded with white."""
    store: Literal["pixels", "jpeg"] = "pixels"
    """How shards hold working images: as `pixels` in LZ4, or as JPEGs of quality 95. On clip art at 128 pixels these
    take 8.4 kB instead of 12, on photographs at 224 32 kB instead of 135. Pixels change a little, and each reading of a
    shard decodes them: a core gives 6,000 and 2,600 a second."""
    classes: PlaceOrNull = None
    """A text file with one class name a line; null: the classes of the train split, sorted."""
    val_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of each class for validation, where the data has no validation split."""
    test_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of each class for the test, where the data has no test split."""
    max_per_class: Count | None = None
    """Images of a class in a split (and unlabelled ones) at most, chosen by name; null: all."""
    num_labelled: Count | None = None
    """Keep the labels of this many train images (stratified, seeded); the others become unlabelled."""
    num_unlabelled: Annotated[int, Field(ge=0)] | None = None
    """Keep this many of the train images without a label (seeded); null: all."""
    allow_missing_val: bool = False
    """Accept a class without a validation image. It is then never scored on val."""
    max_bad_share: Share = 0.05
    """The run stops above this share of unreadable files."""
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 178_956_970
    """A picture with more pixels is refused before it is decoded (Pillow's own limit for decompression bombs)."""
    max_bytes: Count = 256 * 1024**2
    """A picture whose file, row or tar member has more bytes is refused before it is read."""
    shard_size: Count = 256
    """Images in a shard, of 64 MiB of pixels at most: the unit of teaching, of loss to a dead node, of streaming."""

    @model_validator(mode="after")
    def _train_has_some(self) -> Images:
        if self.val_share + self.test_share >= 1:
            raise ValueError(
                f"images.val_share={self.val_share:g} and images.test_share={self.test_share:g} leave too little to "
                "train on; lower them until their sum is below 1"
            )
        return self

    @property
    def rows_per_shard(self) -> int:
        """`shard_size`, or less at a large `size`: a shard goes through a worker's memory in one piece."""
        return max(1, min(self.shard_size, SHARD_BYTES // (3 * self.size**2)))

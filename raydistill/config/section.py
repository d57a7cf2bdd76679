"""The base of every section of the job: frozen, closed, with a text for each key."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator


def with_slashes(place: str) -> str:
    """`s3://bucket` for `s3:bucket`, of any scheme that fsspec knows; empty if the place is right."""
    scheme, colon, rest = place.partition(":")
    if not colon or rest.startswith("//") or not re.fullmatch("[a-z][a-z0-9_]+", scheme) or os.path.lexists(place):
        return ""
    from fsspec.registry import known_implementations  # noqa: TID251 - names only; it takes a fifth of a second

    is_wrong = scheme in known_implementations and not (scheme in ("file", "local") and rest.startswith("/"))
    return f"{scheme}://{rest.lstrip('/')}" if is_wrong else ""


def _right_place(place: str | None) -> str | None:
    if place and (meant := with_slashes(place)):
        raise ValueError(f"an address has two slashes; did you mean {meant}?")
    return place


Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Place = Annotated[str, Field(min_length=1), AfterValidator(_right_place)]
PlaceOrNull = Annotated[str | None, AfterValidator(_right_place)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class Section(BaseModel):
    """A frozen part of the tree that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take `true` for 1."""
        kinds = str(cls.model_fields[str(info.field_name)].annotation)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        if any(isinstance(one, bool) for one in inner) and re.search(r"\b(int|float)\b", kinds) and "bool" not in kinds:
            raise ValueError("expected: a number, not true or false")
        return value

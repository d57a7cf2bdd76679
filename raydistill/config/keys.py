"""The job's keys as users type them: which there are, and which one a user meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

from pydantic import BaseModel

from raydistill.config.job import RunConfig


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree."""
    for name in model.model_fields:
        yield prefix + name
        if section := _section_of(model, name):
            yield from known_keys(section, f"{prefix}{name}.")


def _section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    annotation = model.model_fields[name].annotation
    if get_origin(annotation) is dict:  # its keys are the user's own
        return None
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def suggest_key(dotted: str) -> str:
    """The end of a sentence about an unknown key: the known key that it looks like."""
    section, _, leaf = dotted.rpartition(".")
    keys = [key.rpartition(".") for key in known_keys()]
    beside = {name: (place, name) for place, _, name in keys if place == section}
    anywhere = {name: (place, name) for place, _, name in reversed(keys)}  # the right word in the wrong section
    for names in (beside, anywhere):
        if near := difflib.get_close_matches(leaf, names, n=1, cutoff=0.75):
            return f"; did you mean {'.'.join(names[near[0]]).lstrip('.')}?"
    return "; `raydistill show` lists the keys there are"


def user_keys(location: tuple[int | str, ...]) -> list[str]:
    """The part of a pydantic location that names fields. The rest names members of unions."""
    keys: list[str] = []
    model: type[BaseModel] | None = RunConfig
    for part in map(str, location):
        keys.append(part)
        if model is None or part not in model.model_fields:
            break
        model = _section_of(model, part)
        if model is None:
            break
    return keys


def takes_text(dotted: str, or_null: bool = False) -> bool:
    """Whether a key's value is text alone or, with `or_null`, text or null."""
    model: type[BaseModel] | None = RunConfig
    *sections, leaf = dotted.split(".")
    for name in sections:
        model = _section_of(model, name) if model is not None and name in model.model_fields else None
    if model is None or leaf not in model.model_fields:
        return False
    annotation = model.model_fields[leaf].annotation
    kinds = [annotation] if get_origin(annotation) not in (Union, UnionType) else list(get_args(annotation))
    is_text = [
        kind is str or (get_origin(kind) is Literal and all(isinstance(word, str) for word in get_args(kind)))
        for kind in kinds
        if kind is not NoneType
    ]
    return all(is_text) and (NoneType in kinds or not or_null)

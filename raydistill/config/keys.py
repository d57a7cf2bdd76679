"""The job's keys as users type them: the list of keys, and the key that a user meant."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from raydistill.config.job import RunConfig


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree."""
    for name in model.model_fields:
        yield prefix + name
        if section := _section_of(model, name):
            yield from known_keys(section, f"{prefix}{name}.")


@dataclass(frozen=True)
class Key:
    """One setting of a job."""

    name: str
    default: Any  # `...` if it is required, as pydantic writes it
    values: str  # the type and the bounds, in words
    meaning: str

    @property
    def example(self) -> str:
        """A value that it takes."""
        return "./my_images" if self.default is ... else f"{self.default or 'null'}"

    @property
    def head(self) -> str:
        """The line without the meaning."""
        default = "required" if self.default is ... else json.dumps(self.default, default=str)
        return f"{self.name} = {default} ({self.values})"

    def __str__(self) -> str:
        return f"{self.head}. {self.meaning}"


def describe_keys(word: str = "") -> Iterator[Key]:
    """The settings whose name or meaning contains each part of `word`, in the order of the job."""
    parts = word.lower().split()
    return (key for key in _keys_of(RunConfig, "") if all(p in f"{key.name} {key.meaning}".lower() for p in parts))


def _keys_of(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        if section := _section_of(model, name):
            yield from _keys_of(section, f"{prefix}{name}.")
        else:
            default = ... if field.is_required() else field.get_default(call_default_factory=True)
            values = _bounded(_type_words(field.annotation), field.metadata)
            yield Key(prefix + name, default, values, " ".join((field.description or "").split()))


def _bounded(values: str, metadata: Iterable[Any]) -> str:
    """Of pydantic's `ge=1` and the like."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [part for entry in metadata for part in getattr(entry, "metadata", [entry])]
    words = [f"{signs[name]} {getattr(b, name):,}" for b in bounds for name in signs if hasattr(b, name)]
    return f"{values} {' and '.join(words)}" if words else values


def _type_words(annotation: Any) -> str:
    if annotation is NoneType:
        return "null"
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _bounded(_type_words(inside[0]), inside[1:])
    if origin is Literal:
        return " | ".join(map(str, inside))
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(_type_words, inside)))
    if origin is tuple and inside[-1] is not ...:
        return f"[{', '.join(map(_type_words, inside))}]"
    if origin in (list, tuple):
        return f"list of {_type_words(inside[0])}"
    if origin is dict:
        return f"{_type_words(inside[1])} by name"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true | false"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values, down to values that are not mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    annotation = model.model_fields[name].annotation
    if get_origin(annotation) is dict:  # its keys are the user's own
        return None
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


# What the field calls them.
_ALIASES = {
    "lr": "distill.learning_rate", "wd": "distill.weight_decay", "bs": "distill.batch_size",
    "batch": "distill.batch_size", "workers": "distill.num_workers", "ema": "distill.ema_decay",
    "amp": "distill.precision", "dtype": "distill.precision", "grad_clip": "distill.clip_norm",
    "optim": "distill.optimizer", "scheduler": "distill.schedule", "warmup": "distill.warmup_epochs",
    "temp": "loss.temperature", "tau": "loss.temperature", "imgsz": "images.size", "img_size": "images.size",
    "data": "images.path", "data_dir": "images.path", "out": "workspace", "output": "workspace",
    "output_dir": "workspace", "arch": "student.model", "backbone": "student.model",
}  # fmt: skip


def suggest_key(dotted: str) -> str:
    """The end of a sentence about an unknown key: the known key that it resembles."""
    section, _, leaf = dotted.rpartition(".")
    if leaf.lower() in _ALIASES:
        return f"; did you mean {_ALIASES[leaf.lower()]}?"
    keys = [key.rpartition(".") for key in known_keys()]
    beside = {name: (place, name) for place, _, name in keys if place == section}
    anywhere = {name: (place, name) for place, _, name in reversed(keys)}  # the right name in the wrong section
    for names in (beside, anywhere):
        if near := difflib.get_close_matches(leaf, names, n=1, cutoff=0.75):
            return f"; did you mean {'.'.join(names[near[0]]).lstrip('.')}?"
    return "; `raydistill keys` lists them"


def user_keys(location: tuple[int | str, ...]) -> list[str]:
    """The part of a pydantic location that names fields. The rest names members of unions."""
    parts = [str(part) for part in location]
    model: type[BaseModel] = RunConfig
    for depth, part in enumerate(parts, 1):
        section = _section_of(model, part) if part in model.model_fields else None
        if section is None:
            return parts[:depth]
        model = section
    return parts


def takes_text(dotted: str, or_null: bool = False) -> bool:
    """Whether a key takes only text or, with `or_null`, text or null. Lists of text aside."""
    kinds = [kind for kind in _kinds_of(dotted) if not _is_list(kind)]
    is_text = [
        kind is str or (get_origin(kind) is Literal and all(isinstance(word, str) for word in get_args(kind)))
        for kind in kinds
        if kind is not NoneType
    ]
    return bool(kinds) and all(is_text) and (NoneType in kinds or not or_null)


def takes_list(dotted: str) -> bool:
    """Whether a key takes a list, perhaps beside other values."""
    return any(map(_is_list, _kinds_of(dotted)))


def _kinds_of(dotted: str) -> list[Any]:
    model: type[BaseModel] | None = RunConfig
    *sections, leaf = dotted.split(".")
    for name in sections:
        model = _section_of(model, name) if model is not None and name in model.model_fields else None
    if model is None or leaf not in model.model_fields:
        return []
    annotation = model.model_fields[leaf].annotation
    return [annotation] if get_origin(annotation) not in (Union, UnionType) else list(get_args(annotation))


def _is_list(kind: Any) -> bool:
    return get_origin(get_args(kind)[0] if get_origin(kind) is Annotated else kind) in (list, tuple)

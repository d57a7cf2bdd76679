"""A search space: a YAML file from config keys to distributions, checked against the config before anything starts.

loss.temperature: {log: [1, 20]}
loss.projection_dim: {int: [32, 256], step: 32}
student.model: {categorical: ["timm:resnet10t", "timm:mobilenetv3_small_050"]}
loss:                                   # a section: each name stands for settings within it
  categorical:
    kd: {kd_weight: 1}
    dkd: {kd_weight: 0, dkd_weight: 1}
loss.dkd_other_factor: {float: [1, 10], when: {loss: dkd}}
distill.clip_norm: {fixed: 1.0}
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from raydistill.config import RunConfig, Section, known_keys, overlay, read_mapping, suggest_key
from raydistill.errors import ConfigError

# What a trial may differ in. Another split, seed or measure would make the trials' results incomparable.
_SECTIONS = ("teacher", "student", "views", "generate", "loss", "distill")
# Of these, what the stages before `distill` depend on.
_SHARED = ("teacher", "views", "generate")
_TRAINING_ALONE = ("generate.share", "generate.task_weight")

Bounds = tuple[float, float]
# What a study holds of a trial: the number drawn, or the label of the choice.
Choice = float | int | str | bool | None


class Distribution(Section):
    """One key's values: exactly one of the kinds, with `step` and `when` where they make sense."""

    float_range: Annotated[Bounds | None, Field(alias="float")] = None
    log_range: Annotated[Bounds | None, Field(alias="log")] = None
    int_range: Annotated[tuple[int, int] | None, Field(alias="int")] = None
    categorical: Annotated[tuple[Any, ...] | dict[str, Any] | None, Field(min_length=1)] = None
    fixed: Any = None
    step: Annotated[float, Field(gt=0)] | None = None
    when: Annotated[dict[str, Any], Field(default_factory=dict)]

    @model_validator(mode="after")
    def _one_kind(self) -> Distribution:
        kinds = self.model_fields_set - {"step", "when"}
        if len(kinds) != 1:
            raise ValueError("give one of float, log, int, categorical and fixed")
        limits = self.float_range or self.log_range or self.int_range
        if limits and limits[0] >= limits[1]:
            raise ValueError(f"[{limits[0]:g}, {limits[1]:g}] is empty; the lower bound comes first")
        if self.log_range and self.log_range[0] <= 0:
            raise ValueError("log needs bounds above 0")
        if self.step is not None and not (self.float_range or self.int_range):
            raise ValueError("step goes with float and int")
        if self.int_range and self.step is not None and self.step != int(self.step):
            raise ValueError("the step of an int is a whole number")
        return self

    @property
    def is_fixed(self) -> bool:
        return "fixed" in self.model_fields_set

    @property
    def choices(self) -> dict[Choice, Any]:
        """Values by label, of `categorical`. A value that is no plain one is labelled by its JSON."""
        if isinstance(self.categorical, dict):
            return dict(self.categorical.items())
        plain = (str, int, float, bool, type(None))
        return {v if isinstance(v, plain) else json.dumps(v): v for v in self.categorical or ()}

    def draw(self, key: str, trial: Any) -> Choice:
        """Ask Optuna's trial for a value, or for a label."""
        drawn: Choice
        if self.categorical is not None:
            drawn = trial.suggest_categorical(key, list(self.choices))
        elif self.int_range is not None:
            drawn = trial.suggest_int(key, *self.int_range, step=int(self.step or 1))
        elif self.log_range is not None:
            drawn = trial.suggest_float(key, *self.log_range, log=True)
        else:
            assert self.float_range is not None
            drawn = trial.suggest_float(key, *self.float_range, step=self.step)
        return drawn

    def ends(self) -> list[Choice]:
        """What has to be a value of the config for all between to be one."""
        if self.categorical is not None:
            return list(self.choices)
        return list(self.float_range or self.log_range or self.int_range or ())

    def values(self) -> list[Choice] | None:
        """All values or labels; None where there is no end of them."""
        if self.categorical is not None:
            return list(self.choices)
        limits = self.int_range or (self.float_range if self.step else None)
        if limits is None:
            return None
        step = self.step or 1
        count = math.floor((limits[1] - limits[0]) / step + 1e-9) + 1
        number = int if self.int_range else float
        return [number(limits[0] + k * step) for k in range(count)]

    def labels_of(self, value: Any) -> list[Choice]:
        """What stands for a config's own value in a study; empty where the distribution does not hold it."""
        if self.categorical is not None:
            return [label for label, choice in self.choices.items() if _says(choice, value)][:1]
        limits = self.float_range or self.log_range or self.int_range
        if limits is None or not isinstance(value, int | float) or isinstance(value, bool):
            return []
        if not limits[0] <= value <= limits[1] or (self.int_range and value != int(value)):
            return []
        steps = (value - limits[0]) / (self.step or 1) if self.step or self.int_range else 0.0
        return [value] if abs(steps - round(steps)) < 1e-9 else []


def _says(choice: Any, value: Any) -> bool:
    """Whether a choice is the value or, of a section, whether all that it sets is so already."""
    if isinstance(choice, dict):
        return isinstance(value, dict) and all(value.get(key) == inner for key, inner in choice.items())
    return bool(choice == value) and isinstance(choice, bool) == isinstance(value, bool)  # 4 is 4.0, and 1 is not true


@dataclass(frozen=True)
class Space:
    """The distributions by key, in the order of the file."""

    entries: Mapping[str, Distribution]

    def draw(self, trial: Any) -> dict[str, Choice]:
        """What a trial gets for each key that its other choices make active."""
        chosen: dict[str, Choice] = {}
        for key, entry in self.entries.items():
            if not entry.is_fixed and self._active(entry, chosen):
                chosen[key] = entry.draw(key, trial)
        return chosen

    def settings(self, chosen: Mapping[str, Choice]) -> dict[str, Any]:
        """The overlay that a trial's choices stand for."""
        tree: dict[str, Any] = {}
        for key, entry in self.entries.items():
            if entry.is_fixed:
                if self._active(entry, chosen):
                    _put(tree, key, entry.fixed)
            elif key in chosen:
                value = entry.choices[chosen[key]] if entry.categorical is not None else chosen[key]
                _put(tree, key, value)
        return tree

    def own(self, config: RunConfig) -> dict[str, Choice]:
        """The config's own values, as far as the space holds them."""
        tree = config.model_dump(mode="json")
        chosen: dict[str, Choice] = {}
        for key, entry in self.entries.items():
            value: Any = tree
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            labels = entry.labels_of(value)
            if labels and self._active(entry, chosen):
                chosen[key] = labels[0]
        return chosen

    def shared(self) -> list[dict[str, Choice]]:
        """Every combination of the keys that stages before `distill` depend on; [{}] where there are none.

        Raises ConfigError where they have no end of values.
        """
        keys = [k for k, e in self.entries.items() if not e.is_fixed and _is_shared(k)]
        for key in keys:
            if self.entries[key].values() is None:
                raise ConfigError(
                    f"{key} decides what the teacher sees, so each of its values costs a pass of the teacher: give it "
                    "as categorical, int, or float with a step"
                )
            if parents := [parent for parent in self.entries[key].when if not _is_shared(parent)]:
                raise ConfigError(
                    f"{key}: `when` names {parents[0]}, which the stages before training do not depend on"
                )
        found: dict[str, dict[str, Choice]] = {}
        for values in itertools.product(*(self.entries[key].values() or () for key in keys)):
            chosen: dict[str, Choice] = {}
            for key, value in zip(keys, values, strict=True):
                if self._active(self.entries[key], chosen):
                    chosen[key] = value
            found[json.dumps(chosen)] = chosen
        return list(found.values())

    def grid(self) -> dict[str, list[Choice]]:
        """All values of all keys. Raises ConfigError where a key has no end of them, or a `when`."""
        grid = {}
        for key, entry in self.entries.items():
            if entry.is_fixed:
                continue
            values = entry.values()
            if values is None or entry.when:
                raise ConfigError(
                    f"{key}: a grid needs a list of values, an int, or a float with a step, and no `when`; or choose "
                    "another tune.sampler"
                )
            grid[key] = values
        return grid

    def _active(self, entry: Distribution, chosen: Mapping[str, Choice]) -> bool:
        return all(chosen.get(parent) in _listed(allowed) for parent, allowed in entry.when.items())


def shared_part(chosen: Mapping[str, Choice]) -> dict[str, Choice]:
    """The choices that stages before `distill` depend on."""
    return {key: value for key, value in chosen.items() if _is_shared(key)}


def read_space(path: str, config: RunConfig) -> Space:
    """The space of a file, each end of it tried on the config.

    Raises ConfigError: the file is missing or no space, a key is unknown or may not differ between trials, a value is
    out of the config's bounds.
    """
    loaded = read_mapping(path, "those that come with raydistill lie in tune_spaces/")
    if not loaded:
        raise ConfigError(f"{path}: a search space is a mapping from config keys to distributions")
    entries = {str(key): _entry(path, str(key), value) for key, value in loaded.items()}
    space = Space(entries)
    for key, entry in entries.items():
        _check_parents(path, key, entry, entries)
        for tree in _ends(space, key):
            try:
                overlay(config, tree)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
    if all(entry.is_fixed for entry in entries.values()):
        raise ConfigError(f"{path}: every key is fixed, so there is nothing to search")
    return space


def _entry(path: str, key: str, value: Any) -> Distribution:
    if key not in set(known_keys()):
        raise ConfigError(f"{path}: {key}: unknown key{suggest_key(key)}")
    if key.partition(".")[0] not in _SECTIONS:
        raise ConfigError(
            f"{path}: {key} may not differ between trials, whose results could then not be compared; keys of "
            f"{', '.join(_SECTIONS)} may"
        )
    try:
        entry = Distribution.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        place = ".".join(str(part) for part in first["loc"][:1])
        raise ConfigError(f"{path}: {key}: {place + ': ' if place else ''}{reason[:1].lower() + reason[1:]}") from None
    for name, choice in entry.choices.items():
        for inner in choice if isinstance(choice, dict) else ():
            if f"{key}.{inner}" not in set(known_keys()):
                raise ConfigError(f"{path}: {key}: {name}: {inner}: unknown key{suggest_key(f'{key}.{inner}')}")
    return entry


def _check_parents(path: str, key: str, entry: Distribution, entries: Mapping[str, Distribution]) -> None:
    before = list(entries)[: list(entries).index(key)]
    for parent, allowed in entry.when.items():
        if parent not in before or entries[parent].categorical is None:
            raise ConfigError(f"{path}: {key}: `when` names {parent}, which is no categorical key above it")
        for label in _listed(allowed):
            if label not in entries[parent].choices:
                raise ConfigError(f"{path}: {key}: `when` waits for {parent}={label}, which is none of its choices")


def _ends(space: Space, key: str) -> Iterator[dict[str, Any]]:
    """Overlays with the ends of one key's distribution, and with whatever makes it active."""
    chosen: dict[str, Choice] = {}

    def activate(name: str) -> None:
        for parent, allowed in space.entries[name].when.items():
            activate(parent)
            chosen[parent] = _listed(allowed)[0]

    activate(key)
    for end in space.entries[key].ends() or [None]:
        fixed = space.entries[key].is_fixed
        yield space.settings(chosen if fixed else {**chosen, key: end})


def _is_shared(key: str) -> bool:
    return key.partition(".")[0] in _SHARED and key not in _TRAINING_ALONE


def _listed(allowed: Any) -> list[Any]:
    return list(allowed) if isinstance(allowed, list | tuple) else [allowed]


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a mapping is laid over what is there."""
    *parents, leaf = key.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    if isinstance(value, dict) and isinstance(tree.get(leaf), dict):
        tree[leaf] = {**tree[leaf], **value}
    else:
        tree[leaf] = value

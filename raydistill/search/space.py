"""A search space: a YAML file from config keys to distributions, checked against the config before anything starts.

loss.temperature: {log: [1, 20]}
loss.projection_dim: {int: [32, 256], step: 32}
student.model: {categorical: ["timm:resnet10t", "timm:mobilenetv3_small_050"]}
loss:                                   # a section: each name sets several of its keys
  categorical:
    kd: {kd_weight: 1}
    dkd: {kd_weight: 0, dkd_weight: 1}
loss.dkd_other_factor: {float: [1, 10], when: {loss: dkd}}
distill.clip_norm: {fixed: 1.0}
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from raydistill.config import RunConfig, known_keys, overlay, suggest_key
from raydistill.config.shipped import find_shipped, near_shipped, shipped_spaces
from raydistill.errors import ConfigError
from raydistill.search.distribution import Choice, Distribution
from raydistill.yaml_files import read_mapping

# Trials may differ in these sections. With different splits, seeds or metrics they could not be compared.
_SECTIONS = ("teacher", "student", "views", "generate", "loss", "distill")
# The stages before `distill` depend on these.
_SHARED = ("teacher", "views", "generate")
_TRAINING_ALONE = ("generate.share", "generate.task_weight")
_MOST_COMBINATIONS = 100_000  # that are gone through one by one
# The layout of trials on the machines is planned once, from the job's own value.
_PLANNED = "distill.num_workers"


def _says(choice: Any, value: Any) -> bool:
    return bool(choice == value) and isinstance(choice, bool) == isinstance(value, bool)  # 4 is 4.0, and 1 is not true


@dataclass(frozen=True)
class Space:
    """Distributions by key, in the order of the file."""

    entries: Mapping[str, Distribution]

    def draw(self, trial: Any) -> dict[str, Choice]:
        """A trial's choice for each key that its earlier choices make active."""
        chosen: dict[str, Choice] = {}
        for key, entry in self.entries.items():
            if not entry.is_fixed and self._active(entry, chosen):
                chosen[key] = entry.draw(key, trial)
        return chosen

    def settings(self, chosen: Mapping[str, Choice]) -> dict[str, Any]:
        """The overlay for a trial's choices."""
        tree: dict[str, Any] = {}
        for key, entry in self.entries.items():
            if entry.is_fixed:
                if self._active(entry, chosen):
                    _put(tree, key, entry.fixed)
            elif key in chosen:
                drawn = chosen[key]
                _put(tree, key, entry.exact(drawn) if entry.categorical is None else entry.choices[drawn])
        return tree

    def own(self, config: RunConfig) -> dict[str, Choice]:
        """The config's own values, as far as the space holds them."""
        tree = config.resolved.model_dump(mode="json")
        chosen: dict[str, Choice] = {}
        for key, entry in self.entries.items():
            if not self._active(entry, chosen):
                continue
            if entry.categorical is not None:
                # Several choices may agree with the config; take the one with the most settings.
                agreed = {label: self._agreed(key, label, tree, chosen) for label in entry.choices}
                if (most := max(agreed.values())) >= 0:
                    chosen[key] = next(label for label, count in agreed.items() if count == most)
            elif entry.holds(value := _look_up(tree, key)):
                chosen[key] = value
        return chosen

    def _agreed(self, key: str, label: Choice, tree: dict[str, Any], chosen: Mapping[str, Choice]) -> int:
        """The number of settings of a choice, if all equal the config's; -1 if one differs. A setting that a later
        entry sets again counts as equal if that entry holds the config's value."""
        known, count = {**chosen, key: label}, 0
        for name, value in _leaves(key, self.entries[key].choices[label]):
            own, again = _look_up(tree, name), self.entries.get(name)
            if name == key or again is None or not self._active(again, known):
                agrees = _says(value, own)
            elif again.categorical is not None:
                agrees = any(_says(choice, own) for choice in again.choices.values())
            else:
                agrees = _says(again.fixed, own) if again.is_fixed else again.holds(own)
            if not agrees:
                return -1
            count += 1
        return count

    def all_keys(self) -> set[str]:
        """All keys that the space may set, with those within sections."""
        values: dict[str, list[Any]] = {key: [entry.fixed] for key, entry in self.entries.items()}
        values |= {key: list(e.choices.values()) for key, e in self.entries.items() if e.categorical is not None}
        return {name for key, of_it in values.items() for value in of_it for name, _ in _leaves(key, value)}

    def shared(self) -> list[dict[str, Choice]]:
        """Every combination of the keys that the stages before `distill` depend on; [{}] if there are none.

        Raises ConfigError: such a key has infinitely many values, or depends on another kind of key.
        """
        keys = [k for k, e in self.entries.items() if not e.is_fixed and _is_shared(k)]
        for key in filter(_is_shared, self.entries):
            if key in keys and math.isinf(self.entries[key].num_values):
                raise ConfigError(
                    f"{key} changes the teacher's input, so each value needs a pass of the teacher: give categorical, "
                    "int, or float with a step"
                )
            if parents := [parent for parent in self.entries[key].when if not _is_shared(parent)]:
                raise ConfigError(f"{key}: `when` names {parents[0]}, which does not change the stages before training")
        self._refuse_many(keys)
        found: dict[str, dict[str, Choice]] = {}
        for values in itertools.product(*(self.entries[key].values() or () for key in keys)):
            chosen: dict[str, Choice] = {}
            for key, value in zip(keys, values, strict=True):
                if self._active(self.entries[key], chosen):
                    chosen[key] = value
            found[json.dumps(chosen)] = chosen
        return list(found.values())

    def grid(self) -> dict[str, list[Choice]]:
        """All values of all keys. Raises ConfigError: a key has infinitely many values, or a `when`."""
        searched = {key: entry for key, entry in self.entries.items() if not entry.is_fixed}
        for key, entry in searched.items():
            if math.isinf(entry.num_values) or entry.when:
                raise ConfigError(
                    f"{key}: a grid needs a list of values, an int, or a float with a step, and no `when`; change it, "
                    "or set another tune.sampler"
                )
        self._refuse_many(list(searched))
        return {key: entry.values() or [] for key, entry in searched.items()}

    def _refuse_many(self, keys: Sequence[str]) -> None:
        """Raises ConfigError before a combination of the keys' values is made."""
        if math.prod(self.entries[key].num_values for key in keys) > _MOST_COMBINATIONS:
            raise ConfigError(
                f"{', '.join(keys)}: more than {_MOST_COMBINATIONS:,} combinations of their values; give fewer values, "
                "or larger steps"
            )

    def _active(self, entry: Distribution, chosen: Mapping[str, Choice]) -> bool:
        return all(chosen.get(parent) in _listed(allowed) for parent, allowed in entry.when.items())


def shared_part(chosen: Mapping[str, Choice]) -> dict[str, Choice]:
    """The choices that the stages before `distill` depend on."""
    return {key: value for key, value in chosen.items() if _is_shared(key)}


def read_space(path: str, config: RunConfig) -> Space:
    """Read the space of a file, and check the ends of its ranges on the config.

    Raises ConfigError: the file is missing or not a space, a key is unknown or may not differ between trials, or the
    config does not accept a value.
    """
    loaded = read_mapping(find_shipped(path), f"give a file, or one of {shipped_spaces()}{near_shipped(path)}")
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
    if _PLANNED in space.all_keys():
        raise ConfigError(
            f"{path}: {_PLANNED} may not differ between trials: it decides how they share the machines; set it in "
            "the job"
        )
    if all(entry.is_fixed for entry in entries.values()):
        raise ConfigError(f"{path}: every key is fixed, so there is nothing to search")
    return space


def _entry(path: str, key: str, value: Any) -> Distribution:
    if key not in set(known_keys()):
        raise ConfigError(f"{path}: {key}: unknown key{suggest_key(key)}")
    if key.partition(".")[0] not in _SECTIONS:
        raise ConfigError(
            f"{path}: {key} may not differ between trials, because their results could not be compared; use keys of "
            f"{', '.join(_SECTIONS)}"
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
            raise ConfigError(f"{path}: {key}: `when` names {parent}, which is not a categorical key above it")
        for label in _listed(allowed):
            if label not in entries[parent].choices:
                raise ConfigError(f"{path}: {key}: `when` needs {parent}={label}, which is not one of its choices")


def _ends(space: Space, key: str) -> Iterator[dict[str, Any]]:
    """Overlays with the ends of one key's distribution and the choices that make it active."""
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


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The settings of a key's value: the value itself or, for a section, those within."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves(f"{key}.{name}", inner)


def _look_up(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a mapping is merged into the existing one."""
    *parents, leaf = key.split(".")
    for part in parents:
        tree = _below(tree, part)
    _lay(tree, leaf, value)


def _lay(tree: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, dict):
        below = _below(tree, name)
        for inner, of_it in value.items():
            _lay(below, inner, of_it)
    else:
        tree[name] = copy.deepcopy(value)  # trials must not change the space


def _below(tree: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(tree.get(name), dict):
        tree[name] = {}
    below: dict[str, Any] = tree[name]
    return below

"""Merges job files, overlays and single settings, and explains wrong ones."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from pydantic import ValidationError

from raydistill.config.job import RunConfig
from raydistill.config.keys import Key, describe_keys, known_keys, suggest_key, takes_list, takes_text, user_keys
from raydistill.config.section import with_slashes
from raydistill.config.shipped import find_shipped, near_shipped
from raydistill.errors import ConfigError, did_you_mean
from raydistill.escaping import shortened
from raydistill.secrets import redacted_tree, remember, texts_in
from raydistill.yaml_files import as_yaml, parse, read_mapping

_MOST_PARTS = 20  # of a dotted key; its tree is walked through by recursion
_MOST_PROBLEMS, _LONGEST = 10, 300  # limits of one error message: lines, and characters of a key or a value


def overlay(config: RunConfig, tree: Mapping[str, Any]) -> RunConfig:
    """The config with `tree` laid over it. Raises ConfigError if the result is not valid."""
    remember(texts_in(tree))
    return _validated(merged(config.model_dump(mode="json"), dict(tree)))


def load_config(words: Sequence[str], settings: Mapping[str, Any] | None = None) -> RunConfig:
    """Merge job files, overlays, places of images and `key=value` words from left to right, lay `settings` over them
    (dotted keys, or sections) and validate the result. The value of a word is YAML; for a key whose value is text it is
    taken as typed, also with quotes and `#`. Raises ConfigError: a file is missing or not YAML, a key is unknown, a
    value is out of bounds."""
    tree: Any = {}
    remember(word.partition("=")[2] for word in words)
    read = [(word, partial(_read_word, word)) for word in words]
    read += [(key, partial(nested, key, value)) for key, value in (settings or {}).items()]
    for what, layer in read:
        try:
            tree = merged(tree, layer())
        except TypeError as error:
            raise ConfigError(f"{what}: {error}; leave one of the two out") from None
    remember(texts_in(tree))
    return _validated(tree)


def _validated(tree: Any) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error))) from None


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to the same tree."""
    return as_yaml(config.model_dump(mode="json"))


def shown_yaml(config: RunConfig) -> str:
    """The resolved config to show to people, without its passwords."""
    return as_yaml(redacted_tree(config.model_dump(mode="json")))


def merged(under: Any, over: Any) -> Any:
    """The second tree laid over the first. Raises TypeError if it lays a section over a value."""
    if not isinstance(over, dict):
        return over
    if not isinstance(under, dict | None):
        raise TypeError(f"gives a section, where what came before gives the value {shortened(repr(under), _LONGEST)}")
    below = under or {}
    return {**below, **{key: merged(below.get(key), value) for key, value in over.items()}}


def _read_word(word: str) -> Any:
    key, equals, value = word.partition("=")
    if not equals and (name := word.partition(":")[0]) in known_keys() and not os.path.exists(find_shipped(word)):
        key = next((key.name for key in describe_keys() if key.name.startswith(name)), name)
        raise ConfigError(f"{word}: a setting is one word without spaces: {key}=VALUE")
    if "/" not in key:  # as in "seed = 3"
        key, value = key.strip(), value.lstrip() if key != key.rstrip() else value
    word = os.path.expanduser(word)
    if not equals or "/" in key:
        if meant := with_slashes(word):
            raise ConfigError(f"{word}: an address has two slashes; did you mean {meant}?")
        if is_job(word):
            advice = f"give a job file, an overlay, key=value, or a folder of images{near_shipped(word)}"
            return read_mapping(find_shipped(word), advice)
        return nested("images.path", word)
    if key != "images.path" and re.search("[\ud800-\udfff]", word):
        raise ConfigError(f"{word}: not UTF-8, which every value but a path has to be")
    tree: Any
    if takes_text(key) and not (
        value.startswith("[") and value.endswith("]") and takes_list(key)
    ):  # YAML reads `set #2`, `day: one`, `2024` and `no` as something else than text
        tree = None if not value or (value == "null" and takes_text(key, or_null=True)) else value
    else:
        tree = next(iter(parse(value, word)), None)
    return nested(key, tree)


def is_job(word: str) -> bool:
    """Whether a word names a job file or an overlay, not the images. YAML and JSON files are jobs. So is a name without
    an ending that is not a folder: its error message then says what it should be."""
    ending = PurePosixPath(word.rstrip("/")).suffix.lower()
    if os.path.isdir(word):
        return False
    if ending in (".yaml", ".yml", ".json"):
        return True
    is_place = "://" in word or word.startswith("example:")
    return not is_place and not (ending and os.path.exists(word))


def nested(key: str, value: Any) -> dict[str, Any]:
    """The tree of one dotted key. A path is its text. Raises ConfigError."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    parts = key.split(".")
    if len(parts) > _MOST_PARTS:
        raise ConfigError(f"{shortened(key)}: unknown key; `raydistill keys` lists them")
    for part in reversed(parts):
        value = {part: value}
    tree: dict[str, Any] = value
    return tree


def _explain(error: ValidationError) -> Iterator[str]:
    # A field that takes one of several types reports each; one line names them all.
    heads: dict[str, str] = {}
    tails, hints = defaultdict[str, dict[str, None]](dict), dict[str, str]()
    keys, more = {key.name: key for key in describe_keys()}, set[str]()
    for item in error.errors(include_url=False):
        whole, given = ".".join(user_keys(item["loc"])), item["input"]
        dotted = shortened(whole, _LONGEST)
        if len(heads) == _MOST_PROBLEMS and dotted not in heads:
            more.add(whole)
            continue
        shown = str(given).lower() if isinstance(given, bool) else shortened(repr(given), _LONGEST)
        head, hint = f"{dotted}: has no value; " if given is None else f"{dotted}={shown}: ", ""
        if item["type"] == "extra_forbidden":
            head, tail = f"{dotted}: ", f"unknown key{suggest_key(whole)}"
        elif dotted in ("images", "images.path") and (item["type"] == "missing" or given in (None, "")):
            head, tail = "images.path: ", "required; for instance: raydistill run images.path=./my_images"
        elif item["type"] == "model_type":  # a value in a section's place; the first key is what a section is about
            first = next(key for key in keys.values() if key.name.startswith(f"{whole}."))
            fits = type(given) is (str if takes_text(first.name) else int) and given
            tail = f"{dotted} is a section; for instance: {first.name}={given if fits else first.example}"
        elif item["type"] == "value_error":  # our own check; that of a section names the keys
            head, tail = head if whole in keys else "", str(item["ctx"]["error"])
        elif item["type"] == "string_unicode":
            tail = "not UTF-8; give it another name, or a link that has one"
        elif whole not in keys:
            tail = item["msg"][:1].lower() + item["msg"][1:]
        elif "by name" in keys[whole].values and (inner := _names_in(item["loc"][whole.count(".") + 1 :])):
            tail = f"{'.'.join(inner)}: {item['msg'][:1].lower()}{item['msg'][1:]}"
        elif item["type"] == "literal_error" and isinstance(given, dict) and "by name" in keys[whole].values:
            continue  # what is wrong in the mapping is said
        else:
            tail, hint = f"expected: {keys[whole].values}", _hint(keys[whole], item)
        field = dotted if head else tail
        heads.setdefault(field, head)
        tails[field][tail] = None
        hints[field] = hints.get(field) or hint
    for field, head in heads.items():
        yield head + " or ".join(tails[field]) + hints[field]
    if more:
        yield f"and {len(more):,} more keys"


def _names_in(location: tuple[int | str, ...]) -> list[str]:
    """The names of a mapping, without pydantic's marks of the type that it tried."""
    return [str(part) for part in location if not re.match(r"(literal|dict|tuple)\[", str(part))]


def _hint(key: Key, item: Any) -> str:
    """How to write what was probably meant."""
    given = item["input"]
    if item["type"] == "string_type" and isinstance(given, int | float):
        return "; put it in quotes"
    if item["type"] == "finite_number":
        return ", and finite"
    if not isinstance(given, str):
        return ""
    if percent := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) *%", given):
        share = float(percent[1]) / 100
        takes = re.search(r"(?<!whole )number", key.values) and not (share > 1 and re.search("(≤|<) 1", key.values))
        return f"; for {percent[0]} write {share:g}" if takes else ""
    words = re.findall(r"[a-z]\w*", key.values.partition("list of ")[2])
    if item["type"].endswith(("list_type", "tuple_type")) and set(re.split(" *, *", given)) <= {*words}:
        return f"; write [{given}]"
    if item["type"] == "literal_error":
        return did_you_mean(given[:_LONGEST], re.findall(r"'([^']+)'", item["ctx"]["expected"]))
    return ""

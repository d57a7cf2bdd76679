"""YAML and JSON files that people write or get from others: jobs, overlays, search spaces, class names, clusters.

A file either loads, or is refused in one sentence with its name and line before it costs much time or memory. It is
refused for its size, its depth, a repeated key, or its number of values, where each use of an alias counts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from raydistill.errors import ConfigError
from raydistill.escaping import one_line, shortened

_MOST_DEPTH, _MOST_BITS, _MOST_TAGS = 100, 1024, 100
_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_STR, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_NO_SETTINGS = {f"tag:yaml.org,2002:{kind}" for kind in ("set", "omap", "pairs", "binary")}
_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
_TAG = re.compile("[\n\r\x85\u2028\u2029]%TAG")  # all line ends of YAML
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # written in C, and many times as fast
_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class Loader(_Safe):
    """YAML as PyYAML's safe loader reads it, and so Ray: numbers, dates, no objects. But `1:30` is text: PyYAML would
    make 90 of it, and takes minutes for a long one."""

    most_bytes, most_values = 4 * 1024**2, 100_000
    keys_are_text = False

    def __init__(self, text: str) -> None:
        if sum(1 for _ in _TAG.finditer(text)) > _MOST_TAGS:  # each is compared with all before it
            raise _refusal(f"more than {_MOST_TAGS} lines of %TAG", None)
        super().__init__(text)
        self._values = 0

    def descend_resolver(self, parent: Any, index: Any) -> None:  # PyYAML calls it at each value
        self._values += 1
        if self._values > self.most_values:
            raise _refusal(f"more than {self.most_values:,} values", parent)

    def ascend_resolver(self) -> None: ...

    def construct_document(self, node: yaml.Node) -> Any:
        self._weigh(node, {})  # before keys are merged: a few lines can make billions of values
        return super().construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag in _NO_SETTINGS:  # otherwise the value would be refused later, as something else
            kind = node.tag.rpartition(":")[2]
            raise _refusal(f"!!{kind} makes a value that no key accepts; write a mapping, a list or text", node)
        try:
            if node.tag in _NUMBERS and ":" in node.value:  # as in `!!int 1:30`
                raise ValueError
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > _MOST_BITS:  # Python refuses to print it
                raise ValueError
            return value
        except (ValueError, LookupError, AttributeError, OverflowError):  # as in `!!int x`, `!!bool x`, `!!timestamp x`
            raise _refusal(f"{node.value!r} is not a valid {node.tag.rpartition(':')[2]}", node) from None

    def _weigh(self, node: yaml.Node, known: dict[yaml.Node, tuple[int, int]]) -> tuple[int, int]:
        """The number of a node's values, and their depth."""
        if isinstance(node, yaml.ScalarNode):
            return 1, 0
        if node in known:
            if not known[node][0]:
                raise _refusal("an alias refers to a value that contains it", node)
            return known[node]
        known[node] = 0, 0
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        if isinstance(node, yaml.MappingNode):
            self._look_at_keys([key for key, _ in node.value])
        count, depth = 1, 0
        for part in parts:
            inner, below = self._weigh(part, known)
            count, depth = count + inner, max(depth, below + 1)
        if count > self.most_values:
            raise _refusal(f"with its aliases it has {count:,} values, above {self.most_values:,}", node)
        if depth > _MOST_DEPTH:
            raise _refusal("nested too deeply", node)
        known[node] = count, depth
        return count, depth

    def _look_at_keys(self, keys: Sequence[yaml.Node]) -> None:
        seen = set[str]()
        for key in keys:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:  # YAML would take the last
                    raise _refusal(f"the key {key.value!r} is there twice", key)
                seen.add(key.value)
                if self.keys_are_text and key.tag != _MERGE:
                    key.tag = _STR


class JobLoader(Loader):
    """Keys are text, dates are text, and `1e-3` is a number, unlike in YAML 1.1."""

    keys_are_text = True


class TextLoader(Loader):
    """All values are text, because names are: `NO`, `017`, `2024-01-01`. It has room for the names of all classes of a
    data set."""

    most_bytes, most_values = 32 * 1024**2, 400_000
    keys_are_text = True


class _NoColon(NamedTuple):
    """A pattern that never matches text with a colon."""

    pattern: re.Pattern[str]

    def match(self, text: str) -> re.Match[str] | None:
        return None if ":" in text else self.pattern.match(text)


def _resolvers(keep: Callable[[str], bool]) -> dict[str, list[tuple[str, Any]]]:
    """PyYAML's resolvers by first character, for the wanted kinds of values, without base-60 numbers."""
    return {
        first: [
            (tag, _NoColon(pattern) if tag in _NUMBERS else pattern)
            for tag, pattern in found if keep(tag.rpartition(":")[2])
        ]
        for first, found in _Safe.yaml_implicit_resolvers.items()
    }  # fmt: skip


Loader.yaml_implicit_resolvers = _resolvers(lambda kind: True)
JobLoader.yaml_implicit_resolvers = _resolvers(lambda kind: kind != "timestamp")
TextLoader.yaml_implicit_resolvers = _resolvers(lambda kind: kind in ("merge", "null"))
JobLoader.add_implicit_resolver(*_FLOAT)


def read_documents(path: str, advice: str, loader: type[Loader] = Loader, key: str = "") -> list[Any]:
    """The documents of a file that are not empty. Raises ConfigError, with the `advice` if there is no such file, and
    with the config `key` that names it."""
    shown = f"{key}={path}" if key else path
    text = _text(path, shown, advice, loader.most_bytes)
    return parse(text, shown, loader, "JSON" if loader is TextLoader and path.lower().endswith(".json") else "YAML")


def parse(text: str, shown: str, loader: type[Loader] = JobLoader, form: str = "YAML") -> list[Any]:
    """The documents of a text that are not empty. Raises ConfigError, which calls the text `shown`."""
    line = 0
    try:
        found = [_json(text, loader.most_values)] if form == "JSON" else list(yaml.load_all(text, loader))
    except RecursionError:
        reason = "nested too deeply"
    except json.JSONDecodeError as error:
        reason, line = error.msg, error.lineno
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason, line = error.problem or error.context or "", mark.line + 1 if mark else 0
        reason = "nested too deeply" if "nesting depth" in reason else reason
    except yaml.reader.ReaderError as error:
        reason, line = f"{error.reason} (U+{int(error.character):04X})", 1 + text[: error.position].count("\n")
    except ValueError as error:  # numbers of 5,000 digits in JSON, and repeated keys
        reason = str(error)
    else:
        return [document for document in found if document is not None]
    where = f"{shown}: line {line}" if line and text.count("\n") else shown
    raise ConfigError(f"{where}: not {form}: {shortened(one_line(reason), 300)}")


def _json(text: str, most_values: int) -> Any:
    if sum(map(_QUOTED.sub("", text).count, ",:[{")) > most_values:
        raise ValueError(f"more than {most_values:,} values")
    return json.loads(text, object_pairs_hook=no_key_twice)


def as_yaml(tree: dict[str, Any]) -> str:
    """YAML that `JobLoader` reads back to the same tree."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def as_flow(tree: dict[str, Any]) -> str:
    """The same in one line."""
    text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**6)
    return str(text).rstrip("\n")


class _Dumper(_SafeDumper):
    """Quotes text that any reader would take for a number or a date."""


_Dumper.add_implicit_resolver(*_FLOAT)


def read_mapping(path: str, advice: str, loader: type[Loader] = JobLoader, key: str = "") -> dict[str, Any]:
    """A file that is one mapping, or empty. Raises ConfigError."""
    documents = read_documents(path, advice, loader, key)
    if len(documents) > 1 or not all(isinstance(document, dict) for document in documents):
        found = f"{len(documents)} documents" if len(documents) > 1 else f"a {type(documents[0]).__name__}"
        where = f"{key}={path}" if key else path
        raise ConfigError(f"{where}: the file has to be a mapping from keys to values, and is {found}")
    return documents[0] if documents else {}


def _text(path: str, shown: str, advice: str, most: int) -> str:
    place = Path(path)
    try:
        if not place.exists():
            raise ConfigError(f"{shown}: no such file; {advice}")
        if not place.is_file():
            raise ConfigError(f"{shown}: {'a folder' if place.is_dir() else 'not a regular file'}; {advice}")
        with place.open("rb") as file:  # system files may be longer than they state
            data = file.read(most + 1)
        if (size := max(len(data), place.stat().st_size)) > most:
            raise ConfigError(f"{shown}: {size:,} bytes, above {most:,}; {advice}")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: not UTF-8 (byte {error.start:,}); save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"{shown}: cannot be read: {one_line(str(error))}; {advice}") from None


def _refusal(reason: str, node: yaml.Node | None) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, reason, node.start_mark if node is not None else None)


class KeyTwiceError(ValueError):
    """A JSON object has a key twice; Python would take the last."""


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads` as `object_pairs_hook`. Raises KeyTwiceError with such a key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise KeyTwiceError(f"the key {name!r:.60} is there twice")
    return found

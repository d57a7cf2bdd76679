"""What is common to the files that describe a cluster: how they are read, and the kinds of nodes they offer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from raydistill.errors import ConfigError

# What a dashboard may listen on: code can be run through it.
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class NodeType:
    """A kind of node that a cluster starts, at most `max_workers` of them; of equals, those of the higher `priority`.

    `resources` are counts, and bytes for `memory`.
    """

    name: str
    resources: dict[str, int]
    labels: dict[str, str]
    min_workers: int
    max_workers: int
    spot: bool
    priority: int = 0


def read_documents(path: str) -> list[dict[str, Any]]:
    """The YAML documents of a file. Raises ConfigError where it cannot be read or is no YAML of keys and values."""
    try:
        with open(path, encoding="utf-8") as file:
            documents = [document for document in yaml.safe_load_all(file) if document is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise ConfigError(f"{path} is no YAML of keys and values")
    return documents


def mapping(value: Any) -> dict[str, Any]:
    """What stands where keys are expected, or none where something else does."""
    return value if isinstance(value, dict) else {}


def unlabelled(prefix: str, types: list[NodeType]) -> Iterator[str]:
    for node_type in types:
        if not node_type.labels:
            yield f"{prefix}.{node_type.name}.labels: none, so no work can ask for this kind; write {{pool: ...}}"


def without_fallback(prefix: str, types: list[NodeType]) -> Iterator[str]:
    """Spot types without an on-demand type of the same GPUs that Ray prefers less."""
    for spot in types:
        needed = {name: count for name, count in spot.resources.items() if name not in ("CPU", "memory")}
        if spot.spot and not any(
            not other.spot
            and other.max_workers
            and other.priority < spot.priority
            and all(other.resources.get(name, 0) >= count for name, count in needed.items())
            for other in types
        ):
            yield (
                f"{prefix}.{spot.name}: nothing stands in where there is no spot; add on-demand nodes with {needed}, "
                f"labels {{pool: fallback}} and a priority below {spot.priority}"
            )

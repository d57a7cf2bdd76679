"""Reads the files that describe a cluster, and suggests the right name for a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from raydistill import yaml_files
from raydistill.errors import ConfigError


def read_documents(path: str) -> list[dict[str, Any]]:
    """The YAML documents of a file. Raises ConfigError if it cannot be read or is not YAML of keys and values."""
    found = yaml_files.read_documents(path, "give a cluster.yaml, or KubeRay's")
    if not found or not all(isinstance(document, dict) for document in found):
        raise ConfigError(f"{path} is not a YAML file of keys and values")
    return found


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, or else an empty one."""
    return value if isinstance(value, dict) else {}


def hint(key: object, known: Iterable[str], else_: str = "; leave it out", likeness: float = 0.6) -> str:
    """The nearest of the known names, regardless of case, or else what to do."""
    by_small = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(str(key).casefold(), by_small, n=1, cutoff=likeness)
    return f"; did you mean {by_small[close[0]]}?" if close else else_

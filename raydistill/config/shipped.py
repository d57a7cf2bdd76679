"""The job files, overlays and search spaces that come with raydistill, by name."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from raydistill.errors import near_path

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = ("jobs", "jobs/overlays", "tune_spaces")


def find_shipped(word: str) -> str:
    """The path of the file that a word names: the user's own file, or the one that comes with raydistill under this
    name, such as `fashion_mnist`, `smoke` or `jobs/overlays/smoke.yaml`. If neither exists, the word itself."""
    return word if os.path.lexists(word) else shipped_files().get(word.removeprefix("./"), word)


def near_shipped(word: str) -> str:
    """`; did you mean smoke?`, or nothing. It looks at raydistill's own files and at the files beside the path."""
    return near_path(word, shipped_files())


def shipped_spaces() -> str:
    """The names of the search spaces, for messages."""
    return ", ".join(sorted(path.stem for path in (_PACKAGE / "tune_spaces").glob("*.yaml")))


@functools.cache
def shipped_files() -> dict[str, str]:
    """Paths by name, and by path inside the package."""
    found = {}
    for folder in _FOLDERS:
        for path in sorted((_PACKAGE / folder).glob("*.yaml")):
            found[path.stem] = found[f"{folder}/{path.name}"] = str(path)
    return found

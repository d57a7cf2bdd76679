"""timm's model names, from its source files: loading the library takes seconds."""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from raydistill.errors import ConfigError


def may_be_timm(name: str) -> bool:
    """Whether timm may have a model of this name: its sources hold the architecture, old names too."""
    architecture = name.partition(".")[0]
    return ":" in name or not _sources() or re.search(rf"\b{re.escape(architecture)}\b", _sources()) is not None


def no_timm_model(model: str, key: str) -> ConfigError:
    """The error for an unknown model, with the nearest names."""
    names = re.findall(r"^@register_model\ndef (\w+)\(", _sources(), re.MULTILINE)
    near = difflib.get_close_matches(model.removeprefix("timm:").partition(".")[0], names, n=3)
    hint = f"did you mean {' or '.join('timm:' + n for n in near)}?" if near else "timm.list_models() lists them"
    return ConfigError(f"{key}={model}: timm has no model of this name; {hint}")


@lru_cache
def _sources() -> str:
    found = find_spec("timm")  # does not load it
    folders = found.submodule_search_locations or () if found is not None else ()
    return "\n".join(
        file.read_text(encoding="utf-8") for folder in folders for file in sorted(Path(folder, "models").glob("*.py"))
    )

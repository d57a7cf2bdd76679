"""The files that hold one model's weights: one, or shards with an index, as Hugging Face's libraries write them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from raydistill.errors import ConfigError

_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.\w+$)")
# What a folder's weights are called, the first that is there.
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def weight_files(weights: str, key: str) -> list[Path]:
    """One file, or every shard where `weights` is an index, one of its shards, or a folder with either.

    Raises ConfigError where one is not there, and where an index names a file outside its own folder.
    """
    path = Path(weights)
    if path.is_dir():
        found = [path / name for name in _NAMES if (path / name).is_file()]
        if not found:
            raise ConfigError(f"{key}={weights}: a folder without {', '.join(_NAMES)}; name the file of weights")
        path = found[0]
    if _SHARD.search(path.name):
        path = path.with_name(f"{_SHARD.sub('', path.name)}.index.json")
    if not path.is_file():
        raise ConfigError(f"{key}={weights}: no such file" + ("" if str(path) == weights else f" as {path}"))
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ConfigError(f"{key}={path}: names a file outside its folder: {outside[0]!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{key}={path}: not an index of weights (a `weight_map` from tensors to files)") from None
    if lacking := [name for name in names if not (path.parent / name).is_file()]:
        raise ConfigError(f"{key}={path}: {len(lacking)} of {len(names)} shards are not there: {lacking[0]}")
    return [path.parent / name for name in names]

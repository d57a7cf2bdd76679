"""The files of one model's weights: one file, or shards with an index, as Hugging Face's libraries write them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raydistill.errors import ConfigError, near_path, reason_of
from raydistill.storage.filesystems import read_file
from raydistill.storage.state import read_json

_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.\w+$)")
_MOST_TOKENIZER, _MOST_TOKENS, _MOST_GROWTH = 64 * 1024**2, 1 << 23, 64
_DEPTH = re.compile("layer|depth|block|stage|repeat")
# The file names of a folder's weights; the first that exists counts.
NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def check_settings(folder: Path, what: str) -> None:
    """Raises ConfigError: the settings in a model's folder are not JSON, or name more layers (with timm, more of
    anything) than any network has. A library makes lists of that length before it makes the first weight."""
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        try:
            tree = read_json(folder / name, dict[str, Any], any_form=True) if (folder / name).exists() else {}
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{what}: its {name} cannot be read ({getattr(error, 'strerror', None) or error})"
            ) from None
        for key, number in _numbers(tree, ""):
            is_depth, is_timms = _DEPTH.search(key.rpartition(".")[2]), key.startswith(".model_args")
            is_classes = key.endswith(("num_classes", "num_labels"))
            most = 2**20 if is_classes else 10_000 if is_depth else 65_536 if is_timms else math.inf
            if number > most and (is_classes or "label" not in key):
                raise ConfigError(f"{what}: its {name} sets {key[1:]!r:.80} to {number}, far more than any network has")


def check_tokenizer(folder: Path, what: str) -> None:
    """Raises ConfigError: a model's tokenizer.json is very large, or makes a text very much longer: twelve replacements
    of one letter by ten take all memory."""
    try:
        data = read_file(str(folder / "tokenizer.json"), _MOST_TOKENIZER)
        if sum(map(data.count, (b",", b"[", b"{"))) > _MOST_TOKENS:
            raise ValueError("it holds far more tokens than any")
        growth = _growth(json.loads(data).get("normalizer"))
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{what}: its tokenizer.json cannot be read ({reason_of(error)})") from None
    if growth > _MOST_GROWTH:
        raise ConfigError(
            f"{what}: its tokenizer.json makes a text more than {_MOST_GROWTH} times as long; name another"
        )


def _growth(tree: Any) -> float:
    """By what factor the replacements of a normalizer may lengthen a text, one after the other."""
    if isinstance(tree, list):
        return math.prod(map(_growth, tree))
    if not isinstance(tree, dict):
        return 1
    content, pattern = tree.get("content", tree.get("prepend")), tree.get("pattern")
    own = 1.0
    if isinstance(content, str):
        plain = pattern.get("String") if isinstance(pattern, dict) else pattern
        own = max(1, len(content) / max(1, len(plain) if isinstance(plain, str) else 1))
    return own * math.prod(_growth(inner) for inner in tree.values())


def _numbers(tree: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(tree, dict):
        for name, inner in tree.items():
            yield from _numbers(inner, f"{key[:80]}.{name}")
    elif isinstance(tree, list):
        for inner in tree:
            yield from _numbers(inner, key)
    elif isinstance(tree, int | float):
        yield key, tree


def weight_files(weights: str, key: str) -> list[Path]:
    """One file, or every shard if `weights` is an index, one of its shards, or a folder with either.

    Raises ConfigError: a file is missing, or an index names a file outside its folder.
    """
    path = Path(weights)
    if path.is_dir():
        found = [path / name for name in NAMES if (path / name).is_file()]
        if not found:
            raise ConfigError(f"{key}={weights}: a folder without {', '.join(NAMES)}; name the file of weights")
        path = found[0]
    if _SHARD.search(path.name):
        path = path.with_name(f"{_SHARD.sub('', path.name)}.index.json")
    if not path.is_file():
        named = "" if str(path) == weights else f" as {path}"
        advice = near_path(weights) or "; correct the path, or leave the key out"
        raise ConfigError(f"{key}={weights}: no such file{named}{advice}")
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        names = sorted(set(read_json(path, dict[str, Any], any_form=True)["weight_map"].values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ConfigError(f"{key}={path}: names a file outside its folder: {outside[0]!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{key}={path}: not an index of weights (a `weight_map` from tensors to files)") from None
    if lacking := [name for name in names if not (path.parent / name).is_file()]:
        raise ConfigError(f"{key}={path}: {len(lacking)} of {len(names)} shards are missing: {lacking[0]}")
    return [path.parent / name for name in names]

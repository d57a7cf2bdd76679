"""The identities of models, weights and pipelines: their names, or the content of their files."""

from __future__ import annotations

import hashlib
import json
import os
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from raydistill.config import Generate, Student, Teacher
from raydistill.data.open_targets import read_settings
from raydistill.errors import ConfigError
from raydistill.examples import weights_fingerprint
from raydistill.models.weight_shards import weight_files

_MODEL_FILES = (".json", ".safetensors", ".bin", ".pth", ".pt", ".txt", ".model")
# The files of a `distill` directory that decide a student's output; only transformers models have the last one.
_STUDENT_FILES = ("student.json", "student.safetensors", "config.json")
_SECONDS_OF_A_FRESH_FILE = 2.0


def model_identity(section: Teacher | Student) -> dict[str, Any]:
    """A model's name and weights; files by their content."""
    if isinstance(section, Teacher) and section.stored is not None:
        return {"targets": read_settings(section.stored).fingerprint}
    section = section.only if isinstance(section, Teacher) else section
    identity: dict[str, Any] = {"model": section.model, "weights": _weights(section.weights, section)}
    folder = section.model.removeprefix("hf:").removeprefix("timm:local-dir:")
    if os.path.isdir(folder):
        identity["model"] = _folder(folder)
    elif section.model.startswith("example:"):
        identity["model"] = _weights(section.model, section)
    return identity


def pipeline_identity(settings: Generate | None) -> dict[str, Any]:
    """A diffusion pipeline by its hub name and revision; a folder by the content of its files."""
    assert settings is not None
    name = settings.pipeline
    if not os.path.isdir(name):
        return {"pipeline": name, "revision": settings.revision}
    paths = sorted(str(p) for p in Path(name).rglob("*") if p.is_file() and p.name.endswith(_MODEL_FILES))
    return {"pipeline": {os.path.relpath(path, name): content_hash(path) for path in paths}}


def _folder(folder: str) -> str:
    """A model in a folder is identified by the content of the files that a library reads, not by its path."""
    names = [name for name in os.listdir(folder) if name.endswith(_MODEL_FILES)]
    files = {name: os.path.join(folder, name) for name in (_STUDENT_FILES if "student.json" in names else names)}
    return json.dumps({name: content_hash(path) for name, path in sorted(files.items()) if os.path.isfile(path)})


def _weights(weights: str | None, section: Teacher | Student) -> str | None:
    """Weights are identified by their content: another file of the same name is another teacher."""
    if weights is None:
        return None
    if weights.startswith("example:"):
        return weights_fingerprint(weights.removeprefix("example:"))
    files = weight_files(weights, f"{type(section).__name__.lower()}.weights")
    contents = {file.name: content_hash(str(file)) for file in files}
    return json.dumps(contents) if len(files) > 1 else contents[files[0].name]


def content_hash(path: str) -> str:
    """SHA-256 of a file. Raises ConfigError."""
    try:
        found = os.stat(path)
        # As git does: a file may change twice within one tick of the clock.
        fresh = time.time_ns() if time.time() - found.st_mtime < _SECONDS_OF_A_FRESH_FILE else 0
        return _hash_of(path, found.st_ino, found.st_size, found.st_mtime_ns, fresh)
    except OSError as error:
        raise ConfigError(f"{path}: the model or its weights cannot be read ({error.strerror})") from None


@lru_cache(maxsize=1024)
def _hash_of(path: str, inode: int, size: int, changed: int, fresh: int) -> str:
    """Cached while the file stays the same: every stage asks for it, and a model may have gigabytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

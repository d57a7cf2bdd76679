"""What of a job can be seen to be wrong before anything that takes time is loaded or started."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from raydistill.config import RunConfig
from raydistill.errors import ConfigError
from raydistill.examples import weights_fingerprint
from raydistill.models.timm_names import may_be_timm, no_timm_model

_PROBE_SECONDS = 3.0
_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def refuse_early(config: RunConfig) -> None:
    """Raises ConfigError: a model of no kind there is, a file that is not there, a cluster nobody answers for."""
    if config.teacher is not None and config.loss.needs_teacher:
        _check_model("teacher.model", config.teacher.model, also_here="or a folder that timm, transformers or distill")
        _check_file("teacher.weights", config.teacher.weights)
    _check_model("student.model", config.student.model, also_here="or a folder that timm or transformers")
    _check_file("student.weights", config.student.weights)
    if config.generate is not None:
        _check_file("generate.names", config.generate.names)
        if not Path(config.generate.pipeline).is_dir() and not _REPOSITORY.fullmatch(config.generate.pipeline):
            raise ConfigError(f"generate.pipeline={config.generate.pipeline}: no such folder, and no name on the hub")
    if config.cluster.address is not None:
        _probe(config.cluster.address)


def _check_model(key: str, model: str, also_here: str) -> None:
    prefix, colon, name = model.partition(":")
    if "://" in model or Path(model).is_dir():
        return
    if colon and prefix == "timm" and name:
        if not may_be_timm(name):
            raise no_timm_model(model, key)
        return
    if colon and prefix == "example":
        weights_fingerprint(name)  # knows its names
        return
    if colon and prefix == "hf":
        if not _REPOSITORY.fullmatch(name) and not Path(name).is_dir():
            raise ConfigError(f"{key}={model}: no such folder, and no name on the hub, which is OWNER/NAME")
        return
    meant = f"; did you mean timm:{model} or hf:{model}?" if _REPOSITORY.fullmatch(model) and not colon else ""
    raise ConfigError(f"{key}={model}: no such folder; use timm:NAME, hf:NAME, {also_here} saved{meant}")


def _check_file(key: str, path: str | None) -> None:
    if path is not None and "://" not in path and not path.startswith("example:") and not Path(path).exists():
        raise ConfigError(f"{key}={path}: no such file")


def _probe(address: str) -> None:
    """A cluster whose HOST:PORT takes no connection is not waited for."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        return  # `auto` and the like, which Ray resolves
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"cluster.address={address}: nobody answers there ({getattr(error, 'strerror', None) or error}); start a "
            "cluster (`ray start --head`, `ray up cluster.yaml`), or leave it out for a Ray of this machine"
        ) from None

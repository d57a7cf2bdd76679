"""Models of the transformers library, loaded strictly, for teachers and students alike.

Shapes: B images, S pixels on a side, D features, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers  # it loads its classes lazily, so that timm models do not wait for them
from PIL import Image
from torch import nn

from raydistill.data.views import Preprocessing
from raydistill.errors import ConfigError, reason_of
from raydistill.models.state_dicts import no_larger_than, refuse_not_finite, sizes_of
from raydistill.models.weight_shards import check_settings
from raydistill.models.weights import checked, known_interpolation, refusing_odd_input


def keeps_outputs(network: nn.Module) -> bool:
    """Whether a forward pass leaves something in the network, as those of transformers do, so that threads cannot share
    it."""
    return any(isinstance(module, transformers.PreTrainedModel) for module in network.modules())


class Recorder:
    """A forward pre-hook that stores a layer's input. It is an object, not a closure, so that a copy of the network,
    such as an average of its weights, has its own recorder."""

    def __init__(self) -> None:
        self._seen: list[torch.Tensor] = []

    def __call__(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._seen[:] = [inputs[0]]

    def take(self) -> torch.Tensor:
        return self._seen.pop()


class TransformersClassifier(nn.Module):
    """An image classifier. The input of its last linear layer is its features."""

    def __init__(self, network: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.network = network
        self._classifier = next(name for name, module in network.named_modules() if module is classifier)
        self._recorder = Recorder()
        classifier.register_forward_pre_hook(self._recorder)

    @property
    def classifier(self) -> nn.Module:
        return self.network.get_submodule(self._classifier)

    def forward(self, images_B3SS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, C) and features (B, D)."""
        logits_BC: torch.Tensor = self.network(pixel_values=images_B3SS).logits
        return logits_BC, self._recorder.take()


def last_linear(network: nn.Module, num_outputs: int, what: str) -> nn.Linear:
    """The classifier of a transformers model, under any name. Raises ConfigError: it has none."""
    layers = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == num_outputs]
    if not layers:
        way_out = "teacher.head=linear_probe" if what.startswith("teacher") else "another student"
        raise ConfigError(f"{what} has no linear classifier; use {way_out}")
    return layers[-1]


def new_classifier(
    folder: str,
    num_classes: int,
    pretrained: bool,
    size: int | None,
    what: str,
    sizes: Sequence[int] | None = None,
) -> nn.Module:
    """A classifier for `num_classes`, with random weights, or with the folder's weights except the last layer. `sizes`
    are the sizes of the weights that it will get.

    Raises ConfigError: weights are missing or do not fit, or the model is not an image classifier.
    """
    settings = load_or_refuse(what, transformers.AutoConfig.from_pretrained, folder)
    settings.num_labels = num_classes
    if not pretrained:
        if size and hasattr(settings, "image_size"):
            settings.image_size = size  # for its position embeddings
        try:
            # Always fp32, and without the checkpoint's own code.
            with no_larger_than(sizes, what, num_classes):
                network: nn.Module = transformers.AutoModelForImageClassification.from_config(
                    settings, dtype=torch.float32, trust_remote_code=False
                )
        except ConfigError:
            raise
        except Exception as error:
            raise _refusal(what, error, "is not an image classifier, or cannot be built") from None
        return network
    loaded = load_weights(what, transformers.AutoModelForImageClassification, folder, config=settings)
    classifier = last_linear(loaded.network, num_classes, what)
    own = next(name for name, module in loaded.network.named_modules() if module is classifier)
    refuse_missing(what, {key for key in loaded.missing | loaded.mismatched if not key.startswith(f"{own}.")})
    return loaded.network


class Loaded(NamedTuple):
    """A network with a folder's weights, and the names of the weights that did not fit."""

    network: nn.Module
    missing: set[str]
    mismatched: set[str]
    unexpected: set[str]


def load_weights(what: str, kind: Any, folder: str, **options: Any) -> Loaded:
    """Load in fp32, whatever the checkpoint's precision: half precision is slow on CPUs, and numpy has no bfloat16.
    Raises ConfigError."""
    network, info = load_or_refuse(
        what, kind.from_pretrained, folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True, **options,
    )  # fmt: skip
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    return Loaded(network, set(info["missing_keys"]), mismatched, set(info["unexpected_keys"]))


def load_or_refuse(what: str, load: Any, folder: str, **options: Any) -> Any:
    """The result of `load`. Raises ConfigError: the library fails, weights are not finite, or the config names a
    network that is far larger than the folder's weights."""
    check_settings(Path(folder), what)
    sizes = sizes_of(Path(folder))
    try:
        with no_larger_than(sizes, what, getattr(options.get("config"), "num_labels", None)):
            loaded = load(folder, trust_remote_code=False, **options)
    except ConfigError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's, of no better class
            raise
        raise _refusal(what, error, "cannot be loaded") from None
    if isinstance(loaded, tuple):  # a network, and the missing names
        refuse_not_finite(loaded[0], what)
    return loaded


def _refusal(what: str, error: BaseException, found: str) -> ConfigError:
    """With a config from others a library may fail in any way."""
    reason = reason_of(error)
    if "trust_remote_code" in reason:  # the library advises to run it
        return ConfigError(f"{what}: it needs its own code (auto_map), which never runs; name another")
    if key := re.search(r"unexpected keyword argument '(.{1,80}?)'", reason):
        return ConfigError(f"{what}: its config.json has the key {key[1]!r}, which its model does not know")
    if isinstance(error, TypeError | AttributeError | LookupError | AssertionError | ArithmeticError):
        reason = "its config.json has a value that its model does not take"  # the library's text names source files
    return ConfigError(f"{what}: {found} ({reason})")


def refuse_missing(what: str, keys: set[str]) -> None:
    """Raises ConfigError: weights would stay random."""
    if keys:
        some = ", ".join(sorted(keys)[:5])
        raise ConfigError(f"{what}: {len(keys)} weights are missing or of another model: {some} …")


def transformers_preprocessing(folder: str, size: int | None, what: str, center_crop: bool = False) -> Preprocessing:
    """The preprocessing of the checkpoint's image processor, at `size` or at its own. Raises ConfigError."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # of an untrusted file
        raise ConfigError(
            f"{what} has no readable preprocessor_config.json, so its mean, std and size are unknown"
        ) from None
    for option in ("do_flip_channel_order", "rescale_offset"):
        if getattr(processor, option, False):
            raise ConfigError(f"{what} needs {option}, which is not supported; name another")
    with refusing_odd_input(what):
        return checked(_preprocessing(processor, size, what, center_crop))


def _preprocessing(processor: Any, size: int | None, what: str, center_crop: bool) -> Preprocessing:
    # The crop is the network's input; `size` is the resize before it.
    before = _side(processor.size)
    own = (_side(getattr(processor, "crop_size", None)) if getattr(processor, "do_center_crop", False) else 0) or before
    side = size or own
    if not side:
        raise ConfigError(f"{what} does not state its input size; set {what.partition('.')[0]}.size")
    resample = getattr(processor, "resample", None)
    resample = Image.Resampling.BICUBIC if resample is None else Image.Resampling(resample)
    # Our mean and std are shares of white; theirs are of the rescaled values.
    white = 255 * (processor.rescale_factor if processor.do_rescale else 1)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    resized = round(before * side / own) if center_crop and own < before else None
    return Preprocessing(
        side,
        (mean[0] / white, mean[1] / white, mean[2] / white),
        (std[0] / white, std[1] / white, std[2] / white),
        known_interpolation(resample.name.lower(), what),
        resized,
    )


def _side(shape: Any) -> int:
    """The side of a processor's `size` or `crop_size`; 0 if it has none."""
    named = dict(shape or {})
    return int(named.get("height") or named.get("shortest_edge") or 0)

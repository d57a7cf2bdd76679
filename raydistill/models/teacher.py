"""The teacher: a frozen backbone from images to features, and a linear head `W f + b` from features to logits.

Shapes: B images, S pixels on a side, D features, C classes, M outputs of the model's own head.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers  # its classes are loaded when they are named, below, so that timm teachers do not wait for them
from safetensors import SafetensorError
from safetensors.numpy import load, save
from timm.data import ImageNetInfo, resolve_model_data_config
from torch import nn

from raydistill.config import Teacher as TeacherConfig
from raydistill.data.targets import read_bytes
from raydistill.data.views import Preprocessing
from raydistill.errors import ConfigError
from raydistill.models.weights import load_timm_weights, resolve_hf_folder, teacher_kind

HEAD_FILE = "head.safetensors"


@dataclass(frozen=True)
class LinearHead:
    """`logits = features @ weight.T + bias`."""

    weight_CD: np.ndarray
    bias_C: np.ndarray

    def logits(self, features_BD: np.ndarray) -> np.ndarray:
        return features_BD.astype(np.float32) @ self.weight_CD.T + self.bias_C


def encode_head(head: LinearHead) -> bytes:
    """safetensors bytes. The library writes an array's memory as it lies, so it has to lie row by row."""
    return save({"weight": np.ascontiguousarray(head.weight_CD), "bias": np.ascontiguousarray(head.bias_C)})


def load_head(directory: str) -> LinearHead:
    """The head that `adapt` wrote into its directory."""
    tensors = load(read_bytes(f"{directory}/{HEAD_FILE}"))
    return LinearHead(tensors["weight"], tensors["bias"])


class TeacherBackbone(nn.Module):
    """Images to pooled features. Frozen and in eval mode for life: `train()` leaves it as it is, since batch norm and
    dropout must not move under it whatever wraps it."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> TeacherBackbone:
        return self

    @torch.inference_mode()
    def forward(self, images_B3SS: torch.Tensor) -> torch.Tensor:
        features_BD: torch.Tensor = self.network(images_B3SS)
        return features_BD.float()


class _TimmFeatures(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network.forward_head(self.network.forward_features(images), pre_logits=True)
        return features

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images)
        return logits


class _TransformersFeatures(nn.Module):
    """The pooled output where the checkpoint has trained one, else the class token, or the mean of a feature map."""

    def __init__(self, network: nn.Module, has_pooler: bool) -> None:
        super().__init__()
        self.network = network
        self.has_pooler = has_pooler

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output = self.network(pixel_values=images)
        pooled = output.pooler_output if self.has_pooler and "pooler_output" in output else None
        if pooled is not None:
            return pooled.flatten(1)
        last: torch.Tensor = output.last_hidden_state
        return last.mean(dim=(2, 3)) if last.ndim == 4 else last[:, 0]


class _ClassifierInput(nn.Module):
    """What enters a transformers classifier's last linear layer, whatever the model does before it."""

    def __init__(self, network: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.network = network
        self._seen: list[torch.Tensor] = []
        classifier.register_forward_pre_hook(lambda _, inputs: self._seen.append(inputs[0]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self._seen.clear()
        self.network(pixel_values=images)
        return self._seen.pop()

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(pixel_values=images).logits
        return logits


def load_teacher(config: TeacherConfig) -> tuple[TeacherBackbone, LinearHead | None, list[tuple[str, ...]]]:
    """The backbone, the model's own head (None where it has none), and the names of that head's outputs.

    Raises ConfigError: no such model, weights missing or not fitting, no network, images of a size it cannot see, a
    native head that does not give the model's own logits.
    """
    kind, name = teacher_kind(config.model)
    backbone, head, names = _load_timm(config, name) if kind == "timm" else _load_transformers(config, name)
    _try_out(config, backbone, head if config.head == "native" else None)
    return backbone, head, names


@torch.inference_mode()
def _try_out(config: TeacherConfig, backbone: TeacherBackbone, head: LinearHead | None) -> None:
    """One image through the network: what does not fit shows here and not in the middle of a run."""
    side = backbone.preprocessing.size
    image = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)
    try:
        features_BD = backbone(image)
        own_BM = backbone.network.logits(image).numpy() if head else None
    except Exception as error:  # every architecture has its own words for a size, or a kind of input, that is not its
        reason = " ".join(str(error).split())
        raise ConfigError(f"teacher.model={config.model} cannot see images of {side} pixels ({reason})") from None
    if features_BD.ndim != 2:
        raise ConfigError(f"teacher.model={config.model} gives {tuple(features_BD.shape)}, not one vector an image")
    if head and own_BM is not None and not np.allclose(head.logits(features_BD.numpy()), own_BM, 1e-3, 1e-4):
        raise ConfigError(
            f"teacher.head=native: {config.model} has more than one linear layer between its features and its logits; "
            "use teacher.head=linear_probe"
        )


def match_native_head(head: LinearHead | None, names: list[tuple[str, ...]], classes: Sequence[str]) -> LinearHead:
    """The rows of the model's own head that carry the data set's class names.

    Names match without regard to case, `_` and `-`; an output may have several names (ImageNet's synonyms, or its
    synset id). Raises ConfigError with the classes that match none or several, and the nearest names.
    """
    if head is None or not names:
        raise ConfigError("teacher.head=native: the model has no head with class names; use teacher.head=linear_probe")
    rows: dict[str, list[int]] = {}
    for index, synonyms in enumerate(names):
        for synonym in {_plain(synonym) for synonym in synonyms}:
            rows.setdefault(synonym, []).append(index)
    problems = []
    for name in classes:
        found = rows.get(_plain(name), [])
        if not found:
            near = difflib.get_close_matches(_plain(name), rows, n=2)
            problems.append(f"{name!r} (nearest: {', '.join(near)})" if near else repr(name))
        elif len(found) > 1:
            problems.append(f"{name!r} (stands for outputs {found})")
    picked = [rows[_plain(name)][0] for name in classes if _plain(name) in rows]
    if len(set(picked)) < len(picked):
        problems.append("two classes that stand for one output")
    if problems:
        raise ConfigError(
            f"teacher.head=native: of {len(classes)} classes, these have no single output among the teacher's "
            f"{len(names)}: {'; '.join(problems)}. Rename the classes, or use teacher.head=linear_probe"
        )
    return LinearHead(head.weight_CD[picked], head.bias_C[picked])


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_\-]+", name.casefold().strip()))


def _load_timm(config: TeacherConfig, name: str) -> tuple[TeacherBackbone, LinearHead | None, list[tuple[str, ...]]]:
    network = load_timm_weights(name, config.weights, config.revision, "teacher")
    data = resolve_model_data_config(network)
    preprocessing = Preprocessing(
        config.size or data["input_size"][1],
        tuple(data["mean"]),
        tuple(data["std"]),
        "bilinear" if data["interpolation"] == "bilinear" else "bicubic",
    )
    classifier = network.get_classifier()
    head = _linear_head(classifier)
    backbone = TeacherBackbone(_TimmFeatures(network), preprocessing)
    return backbone, head, _timm_class_names(network, head)


def _timm_class_names(network: nn.Module, head: LinearHead | None) -> list[tuple[str, ...]]:
    if head is None:
        return []
    labels = (network.pretrained_cfg or {}).get("label_names")
    if labels:
        return [(str(label),) for label in labels]
    if len(head.bias_C) == 1000:
        info = ImageNetInfo()
        described = [info.index_to_description(k).split(", ") for k in range(1000)]
        return [(info.index_to_label_name(k), *words) for k, words in enumerate(described)]
    return []


def _linear_head(classifier: nn.Module) -> LinearHead | None:
    if not isinstance(classifier, nn.Linear):
        return None
    weight = classifier.weight.detach().numpy()
    bias = np.zeros(len(weight), np.float32) if classifier.bias is None else classifier.bias.detach().numpy()
    return LinearHead(weight, bias)


def _load_transformers(
    config: TeacherConfig, name: str
) -> tuple[TeacherBackbone, LinearHead | None, list[tuple[str, ...]]]:
    folder = resolve_hf_folder(name, config.revision)
    if config.weights is not None:
        raise ConfigError("teacher.weights goes with timm: models; for transformers name the folder in teacher.model")
    settings = _or_config_error(config, transformers.AutoConfig.from_pretrained, folder)
    # fp32 whatever the checkpoint is stored in: on the CPU half precision is slow, and numpy knows no bfloat16.
    options = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    options |= {"dtype": torch.float32}
    classifies = any("ForImageClassification" in a for a in settings.architectures or ())
    head, names = None, []
    if config.head == "native" and classifies:
        network, info = _or_config_error(
            config, transformers.AutoModelForImageClassification.from_pretrained, folder, **options
        )
        _refuse(config.model, info["missing_keys"] | info["unexpected_keys"], info)
        last = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == settings.num_labels]
        if not last:
            raise ConfigError(f"teacher.model={config.model} has no linear classifier; use teacher.head=linear_probe")
        head = _linear_head(last[-1])
        names = [tuple(settings.id2label[k].split(", ")) for k in range(settings.num_labels)]
        features: nn.Module = _ClassifierInput(network, last[-1])
    else:
        network, info = _or_config_error(config, transformers.AutoModel.from_pretrained, folder, **options)
        missing = {key for key in info["missing_keys"] if not key.startswith("pooler.")}
        _refuse(config.model, missing, info)
        features = _TransformersFeatures(network, has_pooler=missing == set(info["missing_keys"]))
    return TeacherBackbone(features, _transformers_preprocessing(folder, config)), head, names


def _or_config_error(config: TeacherConfig, load: Any, folder: str, **options: Any) -> Any:
    try:
        return load(folder, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"teacher.model={config.model}: cannot be loaded ({reason})") from None


def _refuse(model: str, keys: set[str], info: dict[str, Any]) -> None:
    if keys := keys | {key for key, *_ in info["mismatched_keys"]}:
        some = ", ".join(sorted(keys)[:5])
        raise ConfigError(f"teacher.model={model}: {len(keys)} weights are missing or of another model: {some} …")


def _transformers_preprocessing(folder: str, config: TeacherConfig) -> Preprocessing:
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):
        raise ConfigError(
            f"teacher.model={config.model} has no preprocessor_config.json that can be read, so its mean, std and size "
            "are not known"
        ) from None
    for option in ("do_flip_channel_order", "rescale_offset"):
        if getattr(processor, option, False):
            raise ConfigError(f"teacher.model={config.model} wants {option}, which is not supported; name another")
    # The crop is what the network sees; `size` may name the resize that comes before it.
    shape = (getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None) or dict(
        processor.size
    )
    shape = dict(shape)
    side = config.size or shape.get("height") or shape.get("shortest_edge")
    if not side:
        raise ConfigError(f"teacher.model={config.model} does not state its input size; set teacher.size")
    bilinear = getattr(processor, "resample", 3) == 2
    # Ours are shares of white; theirs are of whatever the rescaling leaves.
    white = 255 * (processor.rescale_factor if processor.do_rescale else 1)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    return Preprocessing(
        int(side),
        (mean[0] / white, mean[1] / white, mean[2] / white),
        (std[0] / white, std[1] / white, std[2] / white),
        "bilinear" if bilinear else "bicubic",
    )

"""The teacher: a frozen backbone from images to features, and a linear head `W f + b` from features to logits.

Shapes: B images, S pixels on a side, D features, C classes, M outputs of the model's own head.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.data import ImageNetInfo, resolve_model_data_config
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from raydistill.config import Teacher as TeacherConfig
from raydistill.data.views import Preprocessing
from raydistill.errors import ConfigError
from raydistill.models.weights import load_timm_weights, resolve_hf_folder, teacher_kind


@dataclass(frozen=True)
class LinearHead:
    """`logits = features @ weight.T + bias`."""

    weight_CD: np.ndarray
    bias_C: np.ndarray

    def logits(self, features_BD: np.ndarray) -> np.ndarray:
        return features_BD.astype(np.float32) @ self.weight_CD.T + self.bias_C


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


class _TransformersFeatures(nn.Module):
    """The pooled output where the checkpoint has trained one, else the class token."""

    def __init__(self, network: nn.Module, has_pooler: bool) -> None:
        super().__init__()
        self.network = network
        self.has_pooler = has_pooler

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output = self.network(pixel_values=images)
        pooled = output.pooler_output if self.has_pooler and "pooler_output" in output else None
        features: torch.Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
        return features


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


def load_teacher(config: TeacherConfig) -> tuple[TeacherBackbone, LinearHead | None, list[tuple[str, ...]]]:
    """The backbone, the model's own head (None where it has none), and the names of that head's outputs.

    Raises ConfigError: no such model, weights missing or not fitting, no network.
    """
    kind, name = teacher_kind(config.model)
    return _load_timm(config, name) if kind == "timm" else _load_transformers(config, name)


def match_native_head(head: LinearHead | None, names: list[tuple[str, ...]], classes: Sequence[str]) -> LinearHead:
    """The rows of the model's own head that carry the data set's class names.

    Names match without regard to case, `_` and `-`; an output may have several names (ImageNet's synonyms, or its
    synset id). Raises ConfigError with the classes that match none or several, and the nearest names.
    """
    if head is None or not names:
        raise ConfigError("teacher.head=native: the model has no head with class names; use teacher.head=linear_probe")
    rows: dict[str, list[int]] = {}
    for index, synonyms in enumerate(names):
        for synonym in synonyms:
            rows.setdefault(_plain(synonym), []).append(index)
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
        data["mean"],
        data["std"],
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
    options = {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
    settings = AutoConfig.from_pretrained(folder)
    classifies = any("ForImageClassification" in a for a in settings.architectures or ())
    head, names = None, []
    if config.head == "native" and classifies:
        network, info = AutoModelForImageClassification.from_pretrained(folder, **options)
        _refuse_missing(config.model, info["missing_keys"] | info["unexpected_keys"])
        last = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == settings.num_labels]
        if not last:
            raise ConfigError(f"teacher.model={config.model} has no linear classifier; use teacher.head=linear_probe")
        head = _linear_head(last[-1])
        names = [tuple(settings.id2label[k].split(", ")) for k in range(settings.num_labels)]
        features: nn.Module = _ClassifierInput(network, last[-1])
    else:
        network, info = AutoModel.from_pretrained(folder, **options)
        missing = {key for key in info["missing_keys"] if not key.startswith("pooler.")}
        _refuse_missing(config.model, missing)
        features = _TransformersFeatures(network, has_pooler=missing == set(info["missing_keys"]))
    return TeacherBackbone(features, _transformers_preprocessing(folder, config)), head, names


def _refuse_missing(model: str, keys: set[str]) -> None:
    if keys:
        some = ", ".join(sorted(keys)[:5])
        raise ConfigError(f"teacher.model={model}: {len(keys)} weights are missing or of another model: {some} …")


def _transformers_preprocessing(folder: str, config: TeacherConfig) -> Preprocessing:
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except OSError:
        raise ConfigError(
            f"teacher.model={config.model} has no preprocessor_config.json, so its mean, std and size are not known"
        ) from None
    # The crop is what the network sees; `size` may name the resize that comes before it.
    shape = (getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None) or dict(
        processor.size
    )
    shape = dict(shape)
    side = config.size or shape.get("height") or shape.get("shortest_edge")
    if not side:
        raise ConfigError(f"teacher.model={config.model} does not state its input size; set teacher.size")
    bilinear = getattr(processor, "resample", 3) == 2
    return Preprocessing(
        int(side), tuple(processor.image_mean), tuple(processor.image_std), "bilinear" if bilinear else "bicubic"
    )

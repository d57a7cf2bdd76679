"""The teacher: a frozen backbone from images to features, and a linear head `W f + b` from features to logits.

Shapes: B images, S pixels on a side, D features, C classes, M outputs of the model's own head.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
import transformers  # it loads its classes lazily, so that timm teachers do not wait for them
from timm.data import ImageNetInfo
from torch import nn
from torch.nn import functional

from raydistill.config import SingleTeacher
from raydistill.config import Teacher as TeacherConfig
from raydistill.data.views import Preprocessing
from raydistill.errors import ConfigError, reason_of
from raydistill.models.autocast import autocast
from raydistill.models.from_transformers import (
    TransformersClassifier,
    last_linear,
    load_or_refuse,
    load_weights,
    refuse_missing,
    transformers_preprocessing,
)
from raydistill.models.heads import LinearHead, head_of
from raydistill.models.student import Student, read_student
from raydistill.models.weights import load_timm_weights, model_kind, resolve_hf_folder, timm_preprocessing
from raydistill.models.zero_shot import embedding_of, two_towers

_LONGEST = 10_000  # characters of an output's names, which may be millions in an untrusted config


class TeacherBackbone(nn.Module):
    """Images to pooled features. It stays frozen and in eval mode: `train()` does nothing, so that batch norm and
    dropout never change, whatever module contains it. It computes in its `precision`, and gives features in fp32."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        self.precision = "fp32"
        self._overflowed: list[int] = []  # which threads extend at once
        self.requires_grad_(False)
        super().train(False)

    @property
    def num_overflowed(self) -> int:
        """Images of batches that were computed again in fp32."""
        return sum(self._overflowed)

    def train(self, mode: bool = True) -> TeacherBackbone:
        return self

    @torch.inference_mode()
    def forward(self, images_B3SS: torch.Tensor) -> torch.Tensor:
        with autocast(images_B3SS.device, self.precision):
            features_BD: torch.Tensor = self.network(images_B3SS).float()
        if self.precision == "fp16" and not features_BD.isfinite().all():  # bf16 has the range of fp32
            self._overflowed.append(len(images_B3SS))
            return self.network(images_B3SS).float()
        return features_BD


class _TimmFeatures(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.forward_head(self.network.forward_features(images), pre_logits=True)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)


class _ClassifierFeatures(nn.Module):
    """The features of a classifier that returns them with its logits: the input of its last linear layer."""

    def __init__(self, classifier: Student | TransformersClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(images)[1]

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(images)[0]


class _TransformersFeatures(nn.Module):
    """The pooled output if the checkpoint has a trained one, else the class token, or the mean of a feature map."""

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


class _ImageTower(nn.Module):
    """The image embedding, of length 1, of a model with a text tower."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return functional.normalize(embedding_of(self.network.get_image_features(pixel_values=images)), dim=1)


class LoadedTeacher(NamedTuple):
    """The backbone, the model's own head (None if it has none), and the names of that head's outputs."""

    backbone: TeacherBackbone
    head: LinearHead | None
    names: list[tuple[str, ...]]


def load_teacher(config: TeacherConfig) -> LoadedTeacher:
    """The teacher that the config names, which is no committee.

    Raises ConfigError: there is no such model, weights are missing or do not fit, the hub does not answer, the model
    cannot take the image size, or a native head does not give the model's own logits.
    """
    one = config.only
    kind, name = model_kind(one.model, "teacher.model")
    loaders = {"timm": _load_timm, "transformers": _load_transformers, "raydistill": _load_raydistill}
    if kind == "raydistill" and one.weights is not None:
        raise ConfigError("teacher.weights is for timm: models; a distilled student's folder has its own weights")
    loaded = loaders[kind](one, name)
    _try_out(one, loaded.backbone, loaded.head if one.head == "native" else None)
    return loaded


@torch.inference_mode()
def _try_out(config: SingleTeacher, backbone: TeacherBackbone, head: LinearHead | None) -> None:
    """Run one image through the network, so that a misfit shows before the run."""
    side = backbone.preprocessing.size
    image = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)
    try:
        features_BD = backbone(image)
        own_BM = backbone.network.logits(image).numpy() if head else None
    except Exception as error:  # architectures raise different errors for a wrong size or input
        raise ConfigError(
            f"teacher.model={config.model} cannot take images of {side} pixels ({reason_of(error)})"
        ) from None
    if features_BD.ndim != 2:
        raise ConfigError(f"teacher.model={config.model} gives {tuple(features_BD.shape)}, not one vector an image")
    if head and own_BM is not None and not np.allclose(head.logits(features_BD.numpy()), own_BM, 1e-3, 1e-4):
        raise ConfigError(
            f"teacher.head=native: {config.model} has more than one linear layer between its features and its logits; "
            "use teacher.head=linear_probe"
        )


def _load_timm(config: SingleTeacher, name: str) -> LoadedTeacher:
    network = load_timm_weights(name, config.weights, config.revision, "teacher")
    what = f"teacher.model={config.model}"
    preprocessing = timm_preprocessing(network, config.size, what, config.center_crop)
    head = head_of(network.get_classifier())
    return LoadedTeacher(TeacherBackbone(_TimmFeatures(network), preprocessing), head, _timm_class_names(network, head))


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


def _load_raydistill(config: SingleTeacher, folder: str) -> LoadedTeacher:
    """A student that `distill` wrote as a teacher: its classifier is the native head."""
    student, classes = read_student(folder)
    preprocessing = student.preprocessing
    if config.size is not None:
        preprocessing = dataclasses.replace(preprocessing, size=config.size)
    backbone = TeacherBackbone(_ClassifierFeatures(student), preprocessing)
    return LoadedTeacher(backbone, head_of(student.classifier), [(name,) for name in classes])


def _load_transformers(config: SingleTeacher, name: str) -> LoadedTeacher:
    what = f"teacher.model={config.model}"
    folder = resolve_hf_folder(name, config.revision, "teacher")
    if config.weights is not None:
        raise ConfigError("teacher.weights is for timm: models; for transformers name the folder in teacher.model")
    settings = load_or_refuse(what, transformers.AutoConfig.from_pretrained, folder)
    head, names = None, []
    features: nn.Module
    if config.head == "native" and "ForImageClassification" in str(settings.architectures):
        network, *unfit = load_weights(what, transformers.AutoModelForImageClassification, folder)
        refuse_missing(what, set().union(*unfit))
        classifier = last_linear(network, settings.num_labels, what)
        head = head_of(classifier)
        names = [tuple(str(settings.id2label[k])[:_LONGEST].split(", ")) for k in range(settings.num_labels)]
        features = _ClassifierFeatures(TransformersClassifier(network, classifier))
    elif config.head == "zero_shot":
        features = _ImageTower(two_towers(what, folder))
    else:
        loaded = load_weights(what, transformers.AutoModel, folder)
        missing = {key for key in loaded.missing if not key.startswith("pooler.")}
        refuse_missing(what, missing | loaded.mismatched)
        if hasattr(loaded.network, "get_image_features"):  # image and text: its image tower is the backbone
            features = _ImageTower(loaded.network)
        else:
            features = _TransformersFeatures(loaded.network, has_pooler=missing == loaded.missing)
    preprocessing = transformers_preprocessing(folder, config.size, what, config.center_crop)
    return LoadedTeacher(TeacherBackbone(features, preprocessing), head, names)

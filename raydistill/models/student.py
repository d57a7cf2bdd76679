"""The student network: how to build, write and read it, and its logits of a split.

Shapes: B images, S pixels on a side, C classes, D features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from raydistill.config import Student as StudentConfig
from raydistill.data.sample import SampleSet, working_images
from raydistill.data.targets import labels_of, read_samples
from raydistill.data.views import WHOLE_IMAGE, Preprocessing, render
from raydistill.errors import CheckpointError, ConfigError, reason_of
from raydistill.models.from_transformers import (
    TransformersClassifier,
    last_linear,
    new_classifier,
    transformers_preprocessing,
)
from raydistill.models.metadata import StudentMetadata
from raydistill.models.state_dicts import no_larger_than, refuse_not_finite
from raydistill.models.weights import (
    STUDENT_FILE,
    load_timm_weights,
    model_kind,
    resolve_hf_folder,
    timm_preprocessing,
)
from raydistill.storage.filesystems import read_bytes
from raydistill.storage.state import needed_state
from raydistill.storage.tensors import bounded

_MOST_OWN_SIZE = 640  # pixels that a model of transformers may take without student.size: any folder may name any
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class TimmClassifier(nn.Module):
    """A timm network that also returns the pooled input of its classifier."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def classifier(self) -> nn.Module:
        return self.network.get_classifier()

    def forward(self, images_B3SS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, C) and features (B, D)."""
        features_BD = self.network.forward_head(self.network.forward_features(images_B3SS), pre_logits=True)
        return self.classifier(features_BD), features_BD


class Student(nn.Module):
    """A classifier that also returns its features, with its preprocessing."""

    def __init__(self, body: TimmClassifier | TransformersClassifier, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.body = body
        self.preprocessing = preprocessing
        self._frozen = False
        self.num_features = int(self.classifier.in_features)

    @property
    def network(self) -> nn.Module:
        """The library's network, which ships."""
        return self.body.network

    @property
    def classifier(self) -> nn.Linear:
        return self.body.classifier

    def body_parameters(self) -> list[nn.Parameter]:
        """All parameters but the classifier's."""
        of_classifier = {id(p) for p in self.classifier.parameters()}
        return [p for p in self.network.parameters() if id(p) not in of_classifier]

    def freeze_body(self) -> None:
        """From now on train only the classifier; batch norm and dropout of the rest stay in eval mode."""
        self._frozen = True
        for parameter in self.body_parameters():
            parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Student:
        super().train(mode)
        if self._frozen:
            self.body.eval()
            self.classifier.train(mode)
        return self

    def forward(self, images_B3SS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, C) and features (B, D)."""
        return self.body(images_B3SS)


def build_student(config: StudentConfig, num_classes: int) -> Student:
    """The student before its first step. Seed torch before: `init: random` draws from its global generator.

    Raises ConfigError: there is no such model, weights do not fit, the architecture cannot take the size, or the model
    is not a classifier on pooled features.
    """
    try:
        kind, name = model_kind(config.model, "student.model")
        if kind == "raydistill":
            raise ConfigError(
                f"student.model={config.model} is a distilled student: name its model, and set "
                f"student.init=pretrained student.weights={config.model}/student.safetensors"
            )
        student = (_build_timm if kind == "timm" else _build_transformers)(config, name, num_classes)
        agrees = _agrees_with_network(student)
    except (RuntimeError, AssertionError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"student.model={config.model} cannot take images of {config.size} pixels ({reason_of(error)}); change "
            "student.size"
        ) from None
    if not agrees:
        raise ConfigError(
            f"student.model={config.model} is not one linear classifier on pooled features; name another student"
        )
    _begin_near_zero(student.classifier)
    return student


def _begin_near_zero(classifier: nn.Linear) -> None:
    """Initialise a new classifier with small weights. timm scales those of EfficientNets and MobileNets by the number
    of classes only: with ten, the first logits are around 5, and unlearning them takes hundreds of steps. This raised
    an EfficientNet-Lite0 after 592 steps with few labels from a val accuracy of 0.28 to 0.45."""
    nn.init.normal_(classifier.weight, std=0.01)
    if classifier.bias is not None:
        nn.init.zeros_(classifier.bias)


def _build_timm(config: StudentConfig, name: str, num_classes: int) -> Student:
    extra = {"img_size": config.size} if config.size and _takes_image_size(name) else {}
    if config.init == "random":
        network = timm.create_model(name, pretrained=False, num_classes=num_classes, **extra)
    else:
        network = load_timm_weights(name, config.weights, config.revision, "student", num_classes=num_classes, **extra)
    preprocessing = timm_preprocessing(network, config.size, f"student.model={config.model}")
    if not isinstance(network.get_classifier(), nn.Linear):
        raise ConfigError(
            f"student.model={config.model} is not one linear classifier on pooled features; name another student"
        )
    return Student(TimmClassifier(network), preprocessing)


def _build_transformers(config: StudentConfig, name: str, num_classes: int) -> Student:
    what = f"student.model={config.model}"
    if config.weights is not None:
        raise ConfigError("student.weights is for timm: models; for transformers name the folder in student.model")
    folder = resolve_hf_folder(name, config.revision, "student")
    network = new_classifier(folder, num_classes, config.init == "pretrained", config.size, what)
    classifier = TransformersClassifier(network, last_linear(network, num_classes, what))
    side = config.size or getattr(network.config, "image_size", None)
    if config.init == "random" and not (Path(folder) / "preprocessor_config.json").is_file():
        if not isinstance(side, int):
            raise ConfigError(f"{what} does not state its input size; set student.size")
        preprocessing = Preprocessing(side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
    else:
        preprocessing = transformers_preprocessing(folder, config.size, what)
    if config.size is None and preprocessing.size > _MOST_OWN_SIZE:
        raise ConfigError(f"{what} takes {preprocessing.size} pixels, above {_MOST_OWN_SIZE}; set student.size")
    return Student(classifier, preprocessing)


def write_student(
    student: Student,
    config: StudentConfig,
    classes: Sequence[str],
    image: dict[str, Any],
    training: dict[str, Any] | None = None,
) -> dict[str, bytes]:
    """The files of a student's folder by name, for `read_student`. `image` says how a picture becomes a working image,
    `training` which epoch of how many this is, and why."""
    about = {
        "model": config.model,
        "library": "timm" if isinstance(student.body, TimmClassifier) else "transformers",
        "classes": list(classes),
        "preprocessing": {key: getattr(student.preprocessing, key) for key in ("size", "mean", "std", "interpolation")},
        "image": image,
        **({} if training is None else {"training": training}),
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in student.network.state_dict().items()}
    files = {"student.safetensors": save(weights), STUDENT_FILE: json.dumps(about, indent=2).encode()}
    if isinstance(student.body, TransformersClassifier):
        files["config.json"] = student.network.config.to_json_string().encode()
    return files


def read_student(folder: str, of: StudentConfig | None = None) -> tuple[Student, tuple[str, ...]]:
    """A student that `distill` wrote, in eval mode, and the names of its classes. `of`: the job's student, if known.

    Raises ConfigError, CheckpointError; also for another model or size than the job's: a stranger's workspace could
    name one that costs gigabytes, or one on a hub.
    """
    try:
        about = needed_state(f"{folder}/{STUDENT_FILE}", StudentMetadata)
        weights = load(bounded(read_bytes(f"{folder}/student.safetensors")))
        classes, preprocessing = tuple(about.classes), Preprocessing(**dict(about.preprocessing))
        size = preprocessing.size if of is None else of.size
        if of is not None and (about.model, preprocessing.size) != (of.model, size or preprocessing.size):
            raise ValueError(f"it is {about.model} at {preprocessing.size}, the job's is {of.model} at {size} pixels")
        sizes = [tensor.numel() for tensor in weights.values()]
        if dict(about)["library"] == "timm":
            with no_larger_than(sizes, folder, len(classes)):
                student = build_student(StudentConfig(model=about.model, size=size), len(classes))
            if student.preprocessing.size != preprocessing.size:
                own = student.preprocessing.size
                raise ValueError(f"it is {about.model} at {preprocessing.size}, the model's own size is {own} pixels")
        elif size is None and preprocessing.size > _MOST_OWN_SIZE:
            raise ValueError(f"{preprocessing.size} pixels, above {_MOST_OWN_SIZE}, without student.size")
        else:
            student = _empty_transformers(folder, len(classes), preprocessing, sizes)
        student.preprocessing = preprocessing
        student.network.load_state_dict(weights)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
            SafetensorError, FileNotFoundError) as error:  # fmt: skip
        raise CheckpointError(f"{folder} holds no complete student ({reason_of(error)}); distil it again") from None
    refuse_not_finite(student.network, folder)
    return student.eval(), classes


def _empty_transformers(folder: str, num_classes: int, preprocessing: Preprocessing, sizes: Sequence[int]) -> Student:
    """The architecture of a student's folder. Its config states the position embeddings, whatever the image size."""
    with TemporaryDirectory() as place:  # transformers reads local files only, and the folder may lie in a bucket
        Path(place, "config.json").write_bytes(read_bytes(f"{folder}/config.json"))
        network = new_classifier(place, num_classes, False, None, folder, sizes)
    return Student(TransformersClassifier(network, last_linear(network, num_classes, folder)), preprocessing)


@torch.no_grad()
def _agrees_with_network(student: Student) -> bool:
    """Whether the exported timm network gives the same logits as in training and evaluation."""
    side, was_training = student.preprocessing.size, student.training
    probe = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)
    student.eval()
    own = student.network(probe)
    try:
        logits, features = student(probe)
    except TypeError:  # several classifiers
        return False
    student.train(was_training)
    own = own if isinstance(own, torch.Tensor) else getattr(own, "logits", None)
    if own is None or own.shape != logits.shape or features.shape != (1, student.num_features):
        return False
    return torch.allclose(own, logits, 1e-3, 1e-5) and torch.allclose(student.classifier(features), logits, 1e-3, 1e-5)


def has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, _BATCH_NORMS) for module in network.modules())


def _takes_image_size(name: str) -> bool:
    """Whether the model has a fixed number of position embeddings; convolutional networks take any size."""
    defaults = timm.get_pretrained_cfg(name)
    return bool(defaults is not None and defaults.fixed_input_size)


def split_logits(
    student: nn.Module, samples: SampleSet, split: str, device: torch.device, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(N, C) float32 logits of the whole images of a split and their (N,) labels, in the split's order.

    The student is in eval mode meanwhile, so neither the batch size nor the order changes a number.
    """
    was_training = student.training
    student.eval()
    logits, labels = [], []
    for shard in range(len(samples.shards[split])):
        table = read_samples(samples, split, shard)
        logits.append(shard_logits(student, table, samples.size, device, batch_size))
        labels.append(labels_of(table))
    student.train(was_training)
    return np.concatenate(logits), np.concatenate(labels)


@torch.inference_mode()
def shard_logits(student: nn.Module, rows: pa.Table, side: int, device: torch.device, batch_size: int) -> np.ndarray:
    """(R, C) float32 logits of the whole images of a shard's rows, by a student in eval mode."""
    images, whole = torch.from_numpy(working_images(rows, side).copy()), torch.from_numpy(WHOLE_IMAGE)
    views = (
        render(part.to(device), whole.expand(len(part), -1), student.preprocessing) for part in images.split(batch_size)
    )
    return np.concatenate([student(view)[0].float().cpu().numpy() for view in views])

"""The small network that ships, and the projection heads that only training sees.

Shapes: B images, S pixels on a side, C classes, D features, P dimensions of the projection.
"""

from __future__ import annotations

import numpy as np
import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional

from raydistill.config import Student as StudentConfig
from raydistill.data.decode import pixels
from raydistill.data.sample import SampleSet
from raydistill.data.targets import labels_of, read_samples
from raydistill.data.views import WHOLE_IMAGE, Preprocessing, render
from raydistill.errors import ConfigError
from raydistill.models.weights import check_timm_name, load_timm_weights


class Student(nn.Module):
    """A timm classifier that also gives the pooled features in front of its classifier."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        with torch.no_grad():
            probe = torch.zeros(1, 3, preprocessing.size, preprocessing.size)
            was_training, _ = network.training, network.eval()
            self.num_features = self._features(probe).shape[1]
            network.train(was_training)

    def _features(self, images_B3SS: torch.Tensor) -> torch.Tensor:
        network = self.network
        features_BD: torch.Tensor = network.forward_head(network.forward_features(images_B3SS), pre_logits=True)
        return features_BD

    def forward(self, images_B3SS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, C) and features (B, D)."""
        features_BD = self._features(images_B3SS)
        return self.network.get_classifier()(features_BD), features_BD


class ProjectionHead(nn.Module):
    """Linear, ReLU, Linear, then length 1: the two-layer head of MoCo v2 that the paper's code uses on both sides."""

    def __init__(self, num_features: int, projection_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_features, num_features), nn.ReLU(inplace=True), nn.Linear(num_features, projection_dim)
        )

    def forward(self, features_BD: torch.Tensor) -> torch.Tensor:
        projected_BP = self.layers(features_BD)
        return functional.normalize(projected_BP.float(), dim=1)


def build_student(config: StudentConfig, num_classes: int) -> Student:
    """The student as training starts from it. Seed torch before: `init: random` draws from its global generator.

    Raises ConfigError: no such model, weights that do not fit, a size that the architecture cannot take, a model that
    is no classifier on pooled features.
    """
    name = check_timm_name(config.model, "student.model")
    extra = {"img_size": config.size} if _takes_image_size(name) else {}
    try:
        if config.init == "random":
            network = timm.create_model(name, pretrained=False, num_classes=num_classes, **extra)
        else:
            network = load_timm_weights(name, config.weights, None, "student", num_classes=num_classes, **extra)
        data = resolve_model_data_config(network)
        preprocessing = Preprocessing(
            config.size,
            tuple(data["mean"]),
            tuple(data["std"]),
            "bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        )
        student = Student(network, preprocessing)
    except (RuntimeError, AssertionError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"student.model={config.model} cannot see images of {config.size} pixels ({error}); change student.size"
        ) from None
    if not _agrees_with_network(student):
        raise ConfigError(
            f"student.model={config.model} is not one linear classifier on pooled features; name another student"
        )
    return student


@torch.no_grad()
def _agrees_with_network(student: Student) -> bool:
    """Whether the timm network alone, which is what ships, gives the logits that training and evaluation see."""
    side, was_training = student.preprocessing.size, student.training
    probe = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)
    student.eval()
    own = student.network(probe)
    try:
        logits, _ = student(probe)
    except (RuntimeError, TypeError):  # a convolution, or several classifiers
        return False
    student.train(was_training)
    return isinstance(own, torch.Tensor) and own.shape == logits.shape and torch.allclose(own, logits, 1e-3, 1e-5)


def has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def _takes_image_size(name: str) -> bool:
    """Transformers fix their number of positions when they are built; convolutional networks take any size."""
    defaults = timm.get_pretrained_cfg(name)
    return bool(defaults is not None and defaults.fixed_input_size)


@torch.inference_mode()
def split_logits(
    student: nn.Module, samples: SampleSet, split: str, device: torch.device, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(N, C) float32 logits of the whole images of a split and their (N,) labels, in the split's order.

    The student is in eval mode for the time of it, so neither the batch size nor the order changes a number.
    """
    was_training = student.training
    student.eval()
    logits, labels = [], []
    whole = torch.from_numpy(WHOLE_IMAGE)
    for shard in range(len(samples.shards[split])):
        table = read_samples(samples, split, shard)
        images = torch.from_numpy(np.stack([pixels(image) for image in table["image"].to_pylist()]))
        for part in images.split(batch_size):
            views = render(part.to(device), whole.expand(len(part), -1), student.preprocessing)
            logits.append(student(views)[0].float().cpu().numpy())
        labels.append(labels_of(table))
    student.train(was_training)
    return np.concatenate(logits), np.concatenate(labels)

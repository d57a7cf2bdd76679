"""The teacher: a frozen backbone from images to features, and a linear head `W f + b` from features to logits.

Shapes: B images, S pixels on a side, D features, C classes, M outputs of the model's own head.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers  # its classes are loaded when they are named, below, so that timm teachers do not wait for them
from safetensors.numpy import load, save
from timm.data import ImageNetInfo, resolve_model_data_config
from torch import nn
from torch.nn import functional

from raydistill.config import Teacher as TeacherConfig
from raydistill.data.prompts import class_words, reading, sentence, words_of
from raydistill.data.views import Preprocessing
from raydistill.errors import ConfigError, reason_of
from raydistill.models.from_transformers import (
    TransformersClassifier,
    last_linear,
    load_or_refuse,
    refuse_missing,
    transformers_preprocessing,
)
from raydistill.models.student import Student, read_student
from raydistill.models.weights import known_interpolation, load_timm_weights, model_kind, resolve_hf_folder
from raydistill.storage.filesystems import read_bytes

HEAD_FILE = "head.safetensors"
_MOST_PROBLEMS = 10


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


class _StudentFeatures(nn.Module):
    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.student(images)[1]
        return features

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.student(images)[0]
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

    def __init__(self, classifier: TransformersClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.classifier(images)[1]
        return features

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(images)[0]
        return logits


class _ImageTower(nn.Module):
    """The image embedding, of length 1, of a model that has a text tower too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return functional.normalize(_embedding(self.network.get_image_features(pixel_values=images)), dim=1)


def load_teacher(config: TeacherConfig) -> tuple[TeacherBackbone, LinearHead | None, list[tuple[str, ...]]]:
    """The backbone, the model's own head (None where it has none), and the names of that head's outputs.

    Raises ConfigError: no such model, weights missing or not fitting, no network, images of a size it cannot see, a
    native head that does not give the model's own logits.
    """
    kind, name = model_kind(config.model, "teacher.model")
    loaders = {"timm": _load_timm, "transformers": _load_transformers, "raydistill": _load_raydistill}
    if kind == "raydistill" and config.weights is not None:
        raise ConfigError("teacher.weights goes with timm: models; a folder of raydistill has its own")
    backbone, head, names = loaders[kind](config, name)
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
        raise ConfigError(
            f"teacher.model={config.model} cannot see images of {side} pixels ({reason_of(error)})"
        ) from None
    if features_BD.ndim != 2:
        raise ConfigError(f"teacher.model={config.model} gives {tuple(features_BD.shape)}, not one vector an image")
    if head and own_BM is not None and not np.allclose(head.logits(features_BD.numpy()), own_BM, 1e-3, 1e-4):
        raise ConfigError(
            f"teacher.head=native: {config.model} has more than one linear layer between its features and its logits; "
            "use teacher.head=linear_probe"
        )


def match_native_head(head: LinearHead | None, names: list[tuple[str, ...]], classes: Sequence[str]) -> LinearHead:
    """The rows of the model's own head that carry the data set's class names.

    Names match without regard to case, `_` and `-` where none is the same to the letter; an output may have several
    names (ImageNet's synonyms, or its synset id). Raises ConfigError with the classes that match none or several, and
    the nearest names.
    """
    if head is None or not names:
        raise ConfigError("teacher.head=native: the model has no head with class names; use teacher.head=linear_probe")
    rows: dict[str, list[int]] = {}
    exact: dict[str, list[int]] = {}
    for index, synonyms in enumerate(names):
        for synonym in {_plain(synonym) for synonym in synonyms}:
            rows.setdefault(synonym, []).append(index)
        for synonym in set(synonyms):
            exact.setdefault(synonym, []).append(index)
    problems: list[str] = []
    picked, taken = [], dict[int, str]()
    for name in classes:
        found = exact.get(name) or rows.get(_plain(name), [])
        picked += found[:1]
        if not found:  # looking for names that are near takes long among many
            near = difflib.get_close_matches(_plain(name), rows, n=2) if len(problems) < _MOST_PROBLEMS else []
            problems.append(f"{name!r} (nearest: {', '.join(near)})" if near else repr(name))
        elif len(found) > 1:
            problems.append(f"{name!r} (stands for outputs {found})")
        elif found[0] in taken:
            problems.append(f"{name!r} (stands for the same output as {taken[found[0]]!r})")
        taken.update(dict.fromkeys(found[:1], name))
    if problems:
        used, more = set(picked), len(problems) - _MOST_PROBLEMS
        spare = [synonyms[0] for index, synonyms in enumerate(names) if index not in used]
        others = f" (others: {', '.join(map(repr, spare))})" if 0 < len(spare) <= 10 else ""
        raise ConfigError(
            f"teacher.head=native: of {len(classes)} classes, these have no single output among the teacher's "
            f"{len(names)}{others}: {'; '.join(problems[:_MOST_PROBLEMS])}"
            f"{f' and {more:,} more' if more > 0 else ''}. Rename the classes, or use teacher.head=linear_probe"
        )
    return LinearHead(head.weight_CD[picked], head.bias_C[picked])


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_\-]+", name.strip())).casefold()


def _load_timm(config: TeacherConfig, name: str) -> tuple[TeacherBackbone, LinearHead | None, list[tuple[str, ...]]]:
    network = load_timm_weights(name, config.weights, config.revision, "teacher")
    data = resolve_model_data_config(network)
    preprocessing = Preprocessing(
        config.size or data["input_size"][1],
        tuple(data["mean"]),
        tuple(data["std"]),
        known_interpolation(data["interpolation"], f"teacher.model={config.model}"),
    )
    if config.center_crop:  # as timm's transforms_imagenet_eval rounds it
        preprocessing = dataclasses.replace(preprocessing, resized=math.floor(preprocessing.size / data["crop_pct"]))
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


def _load_raydistill(config: TeacherConfig, folder: str) -> tuple[TeacherBackbone, LinearHead, list[tuple[str, ...]]]:
    """A student that `distill` wrote is a teacher like any other: its classifier is its native head."""
    student, classes = read_student(folder)
    preprocessing = student.preprocessing
    if config.size is not None:
        preprocessing = dataclasses.replace(preprocessing, size=config.size)
    features: nn.Module = _StudentFeatures(student)
    head = _linear_head(student.classifier)
    assert head is not None, "a student has one linear classifier"
    return TeacherBackbone(features, preprocessing), head, [(name,) for name in classes]


def _load_transformers(
    config: TeacherConfig, name: str
) -> tuple[TeacherBackbone, LinearHead | None, list[tuple[str, ...]]]:
    what = f"teacher.model={config.model}"
    folder = resolve_hf_folder(name, config.revision, "teacher")
    if config.weights is not None:
        raise ConfigError("teacher.weights goes with timm: models; for transformers name the folder in teacher.model")
    settings = load_or_refuse(what, transformers.AutoConfig.from_pretrained, folder)
    # fp32 whatever the checkpoint is stored in: on the CPU half precision is slow, and numpy knows no bfloat16.
    options = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    options |= {"dtype": torch.float32}
    classifies = any("ForImageClassification" in a for a in settings.architectures or ())
    head, names = None, []
    if config.head == "native" and classifies:
        network, info = load_or_refuse(
            what, transformers.AutoModelForImageClassification.from_pretrained, folder, **options
        )
        refuse_missing(what, info["missing_keys"] | info["unexpected_keys"], _mismatched(info))
        classifier = last_linear(network, settings.num_labels, what)
        head = _linear_head(classifier)
        names = [tuple(settings.id2label[k].split(", ")) for k in range(settings.num_labels)]
        features: nn.Module = _ClassifierInput(TransformersClassifier(network, classifier))
    elif config.head == "zero_shot":
        features = _ImageTower(_two_towers(what, folder, options))
    else:
        network, info = load_or_refuse(what, transformers.AutoModel.from_pretrained, folder, **options)
        missing = {key for key in info["missing_keys"] if not key.startswith("pooler.")}
        refuse_missing(what, missing, _mismatched(info))
        if hasattr(network, "get_image_features"):  # image and text: its image tower is the backbone
            features = _ImageTower(network)
        else:
            features = _TransformersFeatures(network, has_pooler=missing == set(info["missing_keys"]))
    preprocessing = transformers_preprocessing(folder, config.size, what, config.center_crop)
    return TeacherBackbone(features, preprocessing), head, names


def _mismatched(info: dict[str, Any]) -> set[str]:
    return {key for key, *_ in info["mismatched_keys"]}


def _two_towers(what: str, folder: str, options: dict[str, Any]) -> nn.Module:
    network, info = load_or_refuse(what, transformers.AutoModel.from_pretrained, folder, **options)
    refuse_missing(what, set(info["missing_keys"]), _mismatched(info))
    if not hasattr(network, "get_text_features"):
        raise ConfigError(
            f"teacher.head=zero_shot: {what.partition('=')[2]} has no text tower; name a CLIP-like model of "
            "transformers, or use teacher.head=linear_probe"
        )
    return network


def _embedding(output: Any) -> torch.Tensor:
    """transformers' towers give a tensor, or an output that holds it."""
    embedding: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return embedding


def prompts_of(templates: Sequence[str], classes: Sequence[str]) -> list[list[str]]:
    """The sentences of every class: its words in each template, as `generate` reads them.

    Raises ConfigError where two classes have the same sentences.
    """
    words = class_words(classes)
    by_reading: dict[str, list[str]] = {}
    for name, plain in words.items():
        by_reading.setdefault(reading(plain) or plain, []).append(name)
    if same := [names for names in by_reading.values() if len(names) > 1]:
        raise ConfigError(
            f"teacher.head=zero_shot: {' and '.join(map(repr, same[0]))} make the same prompt, so no text can tell "
            "them apart; rename one, or use teacher.head=linear_probe"
        )
    return [[sentence(template, words[name]) for template in templates] for name in classes]


@torch.inference_mode()
def zero_shot_head(config: TeacherConfig, classes: Sequence[str]) -> LinearHead:
    """Text embeddings as a linear head: the mean over the prompts of a class, of length 1, times the model's learnt
    scale (Radford et al. 2021, arXiv 2103.00020, section 3.1.4). Raises ConfigError."""
    sentences = prompts_of(config.prompts, classes)
    kind, name = model_kind(config.model, "teacher.model")
    if kind != "transformers":
        raise ConfigError(f"teacher.head=zero_shot: {config.model} has no text tower; name a CLIP-like hf: model")
    what, folder = f"teacher.model={config.model}", resolve_hf_folder(name, config.revision, "teacher")
    options = {"use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}
    network = _two_towers(what, folder, options).eval()
    tokenizer = load_or_refuse(what, transformers.AutoTokenizer.from_pretrained, folder)
    _refuse_unknown_words(tokenizer, classes, what)
    # Not every tokenizer says how long a text may be.
    length = min(tokenizer.model_max_length, network.config.get_text_config().max_position_embeddings)
    rows = []
    for of_class in sentences:
        # SigLIP was trained on texts of full length; CLIP does not mind.
        tokens = tokenizer(of_class, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        accepted = {k: v for k, v in tokens.items() if k in ("input_ids", "attention_mask")}
        embedded = functional.normalize(_embedding(network.get_text_features(**accepted)), dim=1)
        rows.append(functional.normalize(embedded.mean(dim=0), dim=0))
    scale = network.logit_scale.exp() if hasattr(network, "logit_scale") else torch.tensor(100.0)
    weight_CD = (torch.stack(rows) * scale).numpy()
    return LinearHead(weight_CD, np.zeros(len(weight_CD), np.float32))


def _refuse_unknown_words(tokenizer: Any, classes: Sequence[str], what: str) -> None:
    """A tokenizer without its vocabulary loads all the same, and then takes every word for the same unknown one."""
    for name in classes:
        tokens = tokenizer(words_of(name), add_special_tokens=False)["input_ids"]
        if all(token == tokenizer.unk_token_id for token in tokens):
            raise ConfigError(
                f"teacher.head=zero_shot: the tokenizer of {what.partition('=')[2]} knows no part of {name!r}; rename "
                "the class, use teacher.head=linear_probe, or see whether the tokenizer's vocabulary is missing"
            )

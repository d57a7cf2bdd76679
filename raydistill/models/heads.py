"""The linear head of a teacher, from features to logits, and the match of a model's own head to the data's classes.

Shapes: B images, D features, C classes, M outputs of the model's own head.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from scipy.special import softmax
from torch import nn

from raydistill.data.compact import Projection, dequantised, quantised
from raydistill.errors import CheckpointError, ConfigError
from raydistill.storage.filesystems import read_bytes
from raydistill.storage.tensors import bounded

HEAD_FILE = "head.safetensors"
_MOST_PROBLEMS = 10


@dataclass(frozen=True)
class LinearHead:
    """`logits = features @ weight.T + bias`."""

    weight_CD: np.ndarray
    bias_C: np.ndarray

    def logits(self, features_BD: np.ndarray) -> np.ndarray:
        return features_BD.astype(np.float32) @ self.weight_CD.T + self.bias_C

    def columns(self, part: slice | None) -> LinearHead:
        """What the head makes of some of the features, without its bias; itself for None."""
        return self if part is None else LinearHead(self.weight_CD[:, part], np.zeros_like(self.bias_C))

    def of(self, projection: Projection | None) -> LinearHead:
        """The head for coordinates of the projection: `f` is about `mean + coordinates @ components`."""
        if projection is None:
            return self
        return LinearHead(self.weight_CD @ projection.components_JD.T, self.weight_CD @ projection.mean_D + self.bias_C)


def projection_loss(head: LinearHead, projection: Projection, features_ND: np.ndarray) -> tuple[int, float]:
    """How many answers of the head stay equal if features are stored compact, and the largest difference of a
    probability."""
    coordinates_1NJ = projection.project(features_ND[None])
    codes, scales = quantised(coordinates_1NJ, projection.deviations_J)
    stored_NJ = dequantised(codes, scales, projection.deviations_J)[0]
    full_NC, compact_NC = softmax(head.logits(features_ND), 1), softmax(head.of(projection).logits(stored_NJ), 1)
    return int((full_NC.argmax(1) == compact_NC.argmax(1)).sum()), float(np.abs(full_NC - compact_NC).max(initial=0))


def encode_head(head: LinearHead) -> bytes:
    """safetensors bytes. The library copies memory, so the arrays have to be contiguous."""
    return save({"weight": np.ascontiguousarray(head.weight_CD), "bias": np.ascontiguousarray(head.bias_C)})


def load_head(directory: str) -> LinearHead:
    """The head that `adapt` wrote into its directory. Raises CheckpointError if it is damaged."""
    path = f"{directory}/{HEAD_FILE}"
    try:
        tensors = load(bounded(read_bytes(path)))
        weight_CD, bias_C = tensors["weight"], tensors["bias"]
        if weight_CD.ndim != 2 or bias_C.shape != weight_CD.shape[:1]:
            raise ValueError(f"weights of {weight_CD.shape} and biases of {bias_C.shape}")
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete the folder and run the command again") from None
    return LinearHead(weight_CD, bias_C)


def head_of(classifier: nn.Module) -> LinearHead | None:
    """The classifier's head; None if it is not a single linear layer."""
    if not isinstance(classifier, nn.Linear):
        return None
    weight = classifier.weight.detach().numpy()
    bias = np.zeros(len(weight), np.float32) if classifier.bias is None else classifier.bias.detach().numpy()
    return LinearHead(weight, bias)


def match_native_head(head: LinearHead | None, names: list[tuple[str, ...]], classes: Sequence[str]) -> LinearHead:
    """The rows of the model's own head with the data's class names.

    If no name is equal, names match regardless of case, `_` and `-`; an output may have several names (ImageNet's
    synonyms, or its synset id). Raises ConfigError with the classes that match no output or several, and the nearest
    names.
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
        if not found:  # the search for near names is slow among many
            near = difflib.get_close_matches(_plain(name), rows, n=2) if len(problems) < _MOST_PROBLEMS else []
            problems.append(f"{name!r} (nearest: {', '.join(near)})" if near else repr(name))
        elif len(found) > 1:
            problems.append(f"{name!r} (the name of outputs {found})")
        elif found[0] in taken:
            problems.append(f"{name!r} (the same output as {taken[found[0]]!r})")
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

"""Heads from text: a CLIP-like model's text tower embeds the prompts of each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers  # it loads its classes lazily, so that timm teachers do not wait for them
from torch import nn
from torch.nn import functional

from raydistill.config import Teacher
from raydistill.data.prompts import class_words, reading, sentence, words_of
from raydistill.errors import ConfigError, reason_of
from raydistill.models.from_transformers import load_or_refuse, load_weights, refuse_missing
from raydistill.models.heads import LinearHead
from raydistill.models.weight_shards import check_tokenizer
from raydistill.models.weights import model_kind, resolve_hf_folder


def two_towers(what: str, folder: str) -> nn.Module:
    """Load a model with an image and a text tower. Raises ConfigError."""
    loaded = load_weights(what, transformers.AutoModel, folder)
    refuse_missing(what, loaded.missing | loaded.mismatched)
    if not hasattr(loaded.network, "get_text_features"):
        raise ConfigError(
            f"teacher.head=zero_shot: {what.partition('=')[2]} has no text tower; name a CLIP-like model of "
            "transformers, or use teacher.head=linear_probe"
        )
    return loaded.network


def embedding_of(output: Any) -> torch.Tensor:
    """The embedding itself, or the output's embedding: transformers' towers give either."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def prompts_of(templates: Sequence[str], classes: Sequence[str]) -> list[list[str]]:
    """The prompts of every class: its words in each template, as in `generate`.

    Raises ConfigError: two classes have the same prompts.
    """
    words = class_words(classes)
    by_reading: dict[str, list[str]] = {}
    for name, plain in words.items():
        by_reading.setdefault(reading(plain) or plain, []).append(name)
    if same := [names for names in by_reading.values() if len(names) > 1]:
        raise ConfigError(
            f"teacher.head=zero_shot: {' and '.join(map(repr, same[0]))} make the same prompt, so no text can "
            "distinguish them; rename one, or use teacher.head=linear_probe"
        )
    return [[sentence(template, words[name]) for template in templates] for name in classes]


@torch.inference_mode()
def zero_shot_head(config: Teacher, classes: Sequence[str]) -> LinearHead:
    """Text embeddings as a linear head: the mean over the prompts of a class, of length 1, times the model's learnt
    scale (Radford et al. 2021, arXiv 2103.00020, section 3.1.4). Raises ConfigError."""
    sentences = prompts_of(config.prompts, classes)
    config = config.only
    kind, name = model_kind(config.model, "teacher.model")
    if kind != "transformers":
        raise ConfigError(f"teacher.head=zero_shot: {config.model} has no text tower; name a CLIP-like hf: model")
    what, folder = f"teacher.model={config.model}", resolve_hf_folder(name, config.revision, "teacher")
    network = two_towers(what, folder).eval()
    check_tokenizer(Path(folder), what)
    tokenizer = load_or_refuse(what, transformers.AutoTokenizer.from_pretrained, folder)
    try:
        return _head_of(tokenizer, network, sentences, classes, what)
    except ConfigError:
        raise
    except Exception as error:  # an untrusted tokenizer may give numbers that the tower does not know
        raise ConfigError(f"{what}: its tokenizer does not fit its text tower ({reason_of(error)})") from None


def _head_of(
    tokenizer: Any, network: Any, sentences: Sequence[Sequence[str]], classes: Sequence[str], what: str
) -> LinearHead:
    _refuse_unknown_words(tokenizer, classes, what)
    # Not every tokenizer states the longest text.
    length = min(tokenizer.model_max_length, network.config.get_text_config().max_position_embeddings)
    rows = []
    for of_class in sentences:
        # SigLIP was trained on padded texts; CLIP accepts both.
        tokens = tokenizer(
            list(of_class), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        accepted = {k: v for k, v in tokens.items() if k in ("input_ids", "attention_mask")}
        embedded = functional.normalize(embedding_of(network.get_text_features(**accepted)), dim=1)
        rows.append(functional.normalize(embedded.mean(dim=0), dim=0))
    scale = network.logit_scale.exp() if hasattr(network, "logit_scale") else torch.tensor(100.0)
    weight_CD = (torch.stack(rows) * scale).numpy()
    return LinearHead(weight_CD, np.zeros(len(weight_CD), np.float32))


def _refuse_unknown_words(tokenizer: Any, classes: Sequence[str], what: str) -> None:
    """A tokenizer without its vocabulary loads without an error, and then maps every word to the unknown token."""
    for name in classes:
        tokens = tokenizer(words_of(name), add_special_tokens=False)["input_ids"]
        if all(token == tokenizer.unk_token_id for token in tokens):
            raise ConfigError(
                f"teacher.head=zero_shot: the tokenizer of {what.partition('=')[2]} knows no part of {name!r}; rename "
                "the class, use teacher.head=linear_probe, or check whether the tokenizer's vocabulary is missing"
            )

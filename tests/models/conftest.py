"""Small real models of transformers, saved as it saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
LABELS = {"id2label": dict(enumerate("abcde")), "label2id": {name: k for k, name in enumerate("abcde")}}
SIDE = {
    "ViT": 32, "ResNet": 32, "ConvNext": 32, "Swin": 32,
    "Dinov2": 64,  # that of its positions, which it stretches to whatever it sees
}  # fmt: skip


def classifier(kind: str) -> torch.nn.Module:
    settings = {
        "ViT": VIT,
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "ConvNext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
        "Swin": {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4},
        "Dinov2": {**VIT, "image_size": SIDE["Dinov2"]},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(**settings, **LABELS)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


@pytest.fixture
def hf_folder(tmp_path: Path) -> Callable[..., str]:
    """Writes a classifier with 5 outputs and random weights, and how it wants its images."""

    def save(kind: str, name: str = "hf", dtype: torch.dtype = torch.float32) -> str:
        folder = tmp_path / name / kind
        classifier(kind).to(dtype).save_pretrained(folder)
        transformers.ViTImageProcessor(
            size={"height": 32, "width": 32}, image_mean=[0.5, 0.4, 0.3], image_std=[0.25, 0.5, 0.2]
        ).save_pretrained(folder)
        return str(folder)

    return save

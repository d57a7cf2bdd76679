"""Which parameters are trained at which rate, and which of them shrink."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.layers import GroupNorm, LayerNorm, LayerNorm2d
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from raydistill.config import Distill
from raydistill.config import Student as StudentConfig
from raydistill.engine.distillation_model import DistillationModel
from raydistill.engine.optimizer import layer_rates, new_optimizer
from raydistill.errors import ConfigError
from raydistill.models.student import build_student

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, GroupNorm, LayerNorm, LayerNorm2d)


def model_of(tiny_set, name: str, size: int = 32, **student: object) -> DistillationModel:
    torch.manual_seed(0)
    return DistillationModel(tiny_set.job("job", student={"model": name, "size": size, **student}))


def shrunk(model: DistillationModel, settings: Distill) -> set[str]:
    """The names of those that a step without a gradient makes smaller, by the learning rate times the decay."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    new_optimizer(settings, model).step()
    by = 1 - settings.learning_rate * settings.weight_decay
    found = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, before[name] * by if name in found else before[name])
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_vit", "timm:test_convnext"])
def test_norms_biases_and_position_embeddings_do_not_shrink(tiny_set, name, optimizer) -> None:
    settings = Distill(optimizer=optimizer, learning_rate=0.1, weight_decay=0.5)
    model = model_of(tiny_set, name)
    of_norms = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()}
    excepted = {"cls_token", "pos_embed", "reg_token"}
    expected = {
        name for name, value in model.named_parameters()
        if id(value) not in of_norms and name.rpartition(".")[2] not in {"bias", "gamma", *excepted}
    }  # fmt: skip
    nonzero = {name for name, value in model.named_parameters() if value.abs().sum() > 0}
    assert shrunk(model, settings) == expected & nonzero
    assert len(expected) > 5


def test_all_shrink_where_that_is_asked_for(tiny_set) -> None:
    model = model_of(tiny_set, "timm:test_vit")
    nonzero = {name for name, value in model.named_parameters() if value.abs().sum() > 0}
    assert shrunk(model, Distill(learning_rate=0.1, weight_decay=0.5, decay_norms=True)) == nonzero


@pytest.mark.parametrize("body_rate", [1.0, 0.1])
def test_each_layer_learns_slower_than_the_next(tiny_set, body_rate) -> None:
    """A ViT: what makes tokens of the image, six blocks, the last with the norm behind it, and the classifier."""
    model = model_of(tiny_set, "timm:test_vit")
    optimizer = new_optimizer(Distill(layer_decay=0.5, body_rate=body_rate), model)
    rates = {id(value): group["rate"] for group in optimizer.param_groups for value in group["params"]}
    student, blocks = model.student.network, len(model.student.network.blocks)
    for name, value in student.named_parameters():
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else 0
        layer += blocks * name.startswith("norm") + (blocks + 1) * name.startswith("head")
        expected = 0.5 ** (blocks + 1 - layer) * (1 if name.startswith("head") else body_rate)
        assert rates[id(value)] == pytest.approx(expected), name
    others = {id(value) for value in model.parameters()} - {id(value) for value in student.parameters()}
    assert others
    assert {rates[one] for one in others} == {1.0}
    assert len(rates) == len(list(model.parameters()))


def test_a_frozen_body_stays_frozen_with_layers(tiny_set) -> None:
    job = tiny_set.job("job", student={"model": "timm:test_resnet"})
    model = DistillationModel(job)
    model.student.freeze_body()
    trained = {
        id(value)
        for group in new_optimizer(Distill(layer_decay=0.5, body_rate=0), model).param_groups
        for value in group["params"]
    }
    assert trained == {id(value) for value in model.parameters() if value.requires_grad}


def test_a_student_whose_layers_timm_does_not_know_is_refused(tmp_path: Path) -> None:
    network = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    )
    network.save_pretrained(tmp_path)
    student = build_student(StudentConfig(model=f"hf:{tmp_path}", size=32), 3)
    assert layer_rates(Distill(), student) == {}
    with pytest.raises(ConfigError, match=r"distill\.layer_decay is for timm: students"):
        layer_rates(Distill(layer_decay=0.5), student)

"""The optimizer: which parameters it trains, at which rate, and which of them shrink."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from raydistill.config import Distill
from raydistill.engine.distillation_model import DistillationModel
from raydistill.errors import ConfigError
from raydistill.models.student import Student, TimmClassifier


def new_optimizer(settings: Distill, model: DistillationModel) -> torch.optim.Optimizer:
    """The `rate` of each group is relative to the schedule's, and the first group's is 1. Raises ConfigError as
    `layer_rates`."""
    of_body = {id(parameter) for parameter in model.student.body_parameters()}
    layers, kept = layer_rates(settings, model.student), _never_decayed(settings, model)
    groups = defaultdict[tuple[float, bool], list[nn.Parameter]](list, {(1.0, True): []})
    for parameter in model.parameters():
        rate = layers.get(id(parameter), 1.0) * (settings.body_rate if id(parameter) in of_body else 1.0)
        if rate > 0:
            groups[rate, id(parameter) not in kept].append(parameter)
    rate, decay = settings.learning_rate, settings.weight_decay
    parts: list[dict[str, Any]] = [
        {"params": parameters, "rate": relative, "weight_decay": decay if decays else 0.0}
        for (relative, decays), parameters in groups.items()
        if parameters
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parts, rate, weight_decay=decay, fused=True)
    # Not fused: where the first step is not finite, torch 2.14 trains on a momentum that it has not initialised.
    return torch.optim.SGD(parts, rate, momentum=settings.momentum, weight_decay=decay)


def _never_decayed(settings: Distill, model: DistillationModel) -> set[int]:
    """The ids of norms, biases, and what a timm network excepts."""
    if settings.decay_norms or settings.weight_decay == 0:
        return set()
    network = model.student.network
    excepted: set[str] = getattr(network, "no_weight_decay", set)()
    of_student = param_groups_weight_decay(network, 1.0, no_weight_decay_list=excepted)
    groups = [*of_student, *param_groups_weight_decay(model, 1.0)]
    return {id(parameter) for group in groups if group["weight_decay"] == 0 for parameter in group["params"]}


def layer_rates(settings: Distill, student: Student) -> dict[int, float]:
    """The rate of each of the student's parameters by its layer, relative to the classifier's; empty if all have one.
    Clark et al. 2020 (arXiv 2003.10555) have it for text, Bao et al. 2022 (arXiv 2106.08254) for images. Raises
    ConfigError: the student is not timm's."""
    if settings.layer_decay is None:
        return {}
    if not isinstance(student.body, TimmClassifier):
        raise ConfigError("distill.layer_decay is for timm: students, whose layers have an order; set it to null")
    groups = param_groups_layer_decay(student.network, layer_decay=settings.layer_decay)
    return {id(parameter): float(group["lr_scale"]) for group in groups for parameter in group["params"]}

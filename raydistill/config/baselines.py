"""The overlay of each arm of `compare`. The files of jobs/overlays hold the same settings."""

from __future__ import annotations

from typing import Any

from raydistill.config.loss import Loss

NO_TERMS = {key: 0 for key in Loss.model_fields if key.endswith("_weight")}
_RANDOM: dict[str, Any] = {"init": "random", "weights": None}
_PRETRAINED: dict[str, Any] = {"init": "pretrained"}


def _without_teacher(student: dict[str, Any], body_rate: float) -> dict[str, Any]:
    return {
        "teacher": None,
        "views": {"per_image": "fresh"},
        "loss": {**NO_TERMS, "task_weight": 1},
        "student": student,
        "distill": {"labelled_share": 1, "body_rate": body_rate},
    }


_ALIGN_UNIFORM = {**NO_TERMS, "task_weight": 1, "kd_weight": 1, "alignment_weight": 1, "uniformity_weight": 1}
OVERLAYS: dict[str, dict[str, Any]] = {
    "scratch": _without_teacher(_RANDOM, 1),
    "linear_probe": _without_teacher(_PRETRAINED, 0),
    "fine_tune": _without_teacher(_PRETRAINED, 0.1),
    "kd": {"student": _RANDOM, "loss": {**NO_TERMS, "task_weight": 1, "kd_weight": 1}},
    "align_uniform": {"student": _RANDOM, "loss": _ALIGN_UNIFORM},
    "crd": {"student": _RANDOM, "loss": {**NO_TERMS, "task_weight": 1, "kd_weight": 1, "crd_weight": 1}},
    "distill_pretrained": {"student": _PRETRAINED, "loss": _ALIGN_UNIFORM},
    "job": {},
}

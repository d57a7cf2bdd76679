"""What each way to train the student lays over a job; the files of jobs/overlays hold the same."""

from __future__ import annotations

from typing import Any

from raydistill.config.loss import Loss

NO_TERMS = {key: 0 for key in Loss.model_fields if key.endswith("_weight")}
_CE_ALONE = {
    "teacher": None,
    "views": {"per_image": "fresh"},
    "loss": {**NO_TERMS, "task_weight": 1},
    "distill": {"labelled_share": 1, "body_rate": 1},
}
_ALIGN_UNIFORM = {**NO_TERMS, "task_weight": 1, "kd_weight": 1, "alignment_weight": 1, "uniformity_weight": 1}
OVERLAYS: dict[str, dict[str, Any]] = {
    "scratch": {**_CE_ALONE, "student": {"init": "random"}},
    "linear_probe": {
        **_CE_ALONE,
        "student": {"init": "pretrained"},
        "distill": {"labelled_share": 1, "body_rate": 0},
    },
    "fine_tune": {
        **_CE_ALONE,
        "student": {"init": "pretrained"},
        "distill": {"labelled_share": 1, "body_rate": 0.1},
    },
    "kd": {"student": {"init": "random"}, "loss": {**NO_TERMS, "task_weight": 1, "kd_weight": 1}},
    "align_uniform": {"student": {"init": "random"}, "loss": _ALIGN_UNIFORM},
    "crd": {"student": {"init": "random"}, "loss": {**NO_TERMS, "task_weight": 1, "kd_weight": 1, "crd_weight": 1}},
    "distill_pretrained": {"student": {"init": "pretrained"}, "loss": _ALIGN_UNIFORM},
    "job": {},
}

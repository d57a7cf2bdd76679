"""The modules of training: the student with projection heads, an adapter and the teacher's head, and the best student.

Shapes: V images, D features, E features of the student, C classes.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from scipy.special import bdtrc
from torch import nn

from raydistill.data.views import render
from raydistill.engine.batches import DistillJob
from raydistill.engine.replicas import Replicas
from raydistill.losses.total import Outputs
from raydistill.models.projections import Adapter, ProjectionHead
from raydistill.models.student import Student, build_student

_SIGNIFICANCE = 0.05  # the probability of shipping other weights than the default, though these are no worse


class DistillationModel(nn.Module):
    """The student and the modules that only training uses: the projection heads of both networks, the adapter, and the
    teacher's frozen linear head."""

    def __init__(self, job: DistillJob) -> None:
        super().__init__()
        loss = job.config.loss
        self.student: Student = build_student(job.config.student, len(job.samples.classes))
        self.replicas: Replicas | None = None  # that compute the student's outputs instead of itself
        if job.config.distill.body_rate == 0:
            self.student.freeze_body()
        head = job.teacher_head()
        self.student_projection = self.teacher_projection = self.adapter = None
        if head is not None:
            self.register_buffer("head_weight", torch.from_numpy(head.weight_CD), persistent=False)
            self.register_buffer("head_bias", torch.from_numpy(head.bias_C), persistent=False)
            width, teacher_width = self.student.num_features, head.weight_CD.shape[1]
            if loss.needs_projection:
                self.student_projection = ProjectionHead(loss.projection_head, width, loss.projection_dim)
                self.teacher_projection = ProjectionHead(loss.projection_head, teacher_width, loss.projection_dim)
            if loss.needs_adapter:
                self.adapter = Adapter(loss.adapter, width, teacher_width)

    def render(self, images_VHH3: torch.Tensor, parameters_VP: torch.Tensor) -> torch.Tensor:
        """(V, 3, S, S): what the student sees."""
        as_seen = partial(render, preprocessing=self.student.preprocessing)
        if self.replicas is None:
            return as_seen(images_VHH3, parameters_VP)
        return torch.cat(self.replicas.map(as_seen, images_VHH3, parameters_VP))

    def forward(self, images: torch.Tensor, features_VD: torch.Tensor | None) -> tuple[Outputs, Outputs | None]:
        logits_VC, student_VE = (self.replicas or self.student)(images)
        if features_VD is None:
            return Outputs(logits_VC), None
        adapted_VD = None if self.adapter is None else self.adapter(student_VE)
        with torch.autocast(images.device.type, enabled=False):
            teacher_logits_VC = self._head(features_VD)
            adapted_logits_VC = None if adapted_VD is None else self._head(adapted_VD.float())
        student_projected = self.student_projection and self.student_projection(student_VE)
        teacher_projected = self.teacher_projection and self.teacher_projection(features_VD)
        student = Outputs(logits_VC, student_VE, student_projected, adapted_VD, adapted_logits_VC)
        return student, Outputs(teacher_logits_VC, features_VD, teacher_projected)

    def _head(self, features_VD: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(features_VD, self.head_weight, self.head_bias)


class BestStudent(nn.Module):
    """The student of the best epoch on val so far. Checkpoints hold it, so that a resumed run has the same one. `right`
    marks its correct answers among the V labelled val images."""

    def __init__(self, student: nn.Module, num_val: int) -> None:
        super().__init__()
        self.student = copy.deepcopy(student).requires_grad_(False)
        self.register_buffer("epoch", torch.tensor(0))
        self.register_buffer("right", torch.zeros(num_val, dtype=torch.bool))

    def offer(self, student: nn.Module, epoch: int, right_V: torch.Tensor) -> None:
        """Keep it if it is the best so far. Of equal ones keep the latest, which has trained longest."""
        if right_V.sum() >= self.right.sum():
            self.take(student, epoch, right_V)

    def take(self, student: nn.Module, epoch: int, right_V: torch.Tensor) -> None:
        self.student.load_state_dict(student.state_dict())
        self.epoch.fill_(epoch)
        self.right.copy_(right_V)

    def is_better_than(self, right_V: torch.Tensor, looks: int) -> bool:
        """Whether it is significantly better than a student with correct answers `right_V`, although it is the best of
        this many `looks`."""
        return is_better(self.right, right_V, looks)


def is_better(right_V: torch.Tensor, other_V: torch.Tensor, looks: int) -> bool:
    """Whether a student with correct answers `right_V` is significantly better than one with `other_V`, as one of this
    many `looks`: McNemar's exact one-sided test with Bonferroni's correction."""
    only_right, only_other = int((right_V & ~other_V).sum()), int((other_V & ~right_V).sum())
    # The tail of the binomial distribution; importing scipy.stats would take each worker a second.
    return bool(bdtrc(only_right - 1, only_right + only_other, 0.5) <= _SIGNIFICANCE / looks)

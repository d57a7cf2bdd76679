"""What each stage leaves behind for those after it: paths and numbers, never live handles.

That of `prepare` is `data.sample.SampleSet`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from raydistill.data.sample import SampleSet

PREDICTIONS_FILE = "predictions.parquet"
# Those of its columns that others read, besides what the networks said in full.
PREDICTIONS = pa.schema([
    ("sample_id", pa.string()), ("label", pa.int32()), ("split", pa.string()),
    ("student_class", pa.int32()), ("student_probability", pa.float32()),
    ("teacher_class", pa.int32()), ("teacher_probability", pa.float32()),
])  # fmt: skip


@dataclass(frozen=True)
class AdaptedTeacher:
    """What `adapt` leaves behind. `features` holds the teacher's features of train and val; `l2` is the chosen strength
    of the linear probe's penalty, None for another head; accuracies are shares, `val_confidence` is the mean
    probability of the class that the teacher names first, and both are None where the split is empty."""

    path: str
    features: str
    val_accuracy: float | None
    val_confidence: float | None
    chance: float
    l2: float | None
    num_train: int


@dataclass(frozen=True)
class GeneratedImages:
    """What `generate` leaves behind. `wanted`, `kept` and `missing` are counts by class, `rejected` by reason;
    `actor_seconds` is what all of them cost, whichever run paid for it."""

    samples: SampleSet
    wanted: dict[str, int]
    kept: dict[str, int]
    missing: dict[str, int]
    rejected: dict[str, int]
    actor_seconds: float


@dataclass(frozen=True)
class SoftTargets:
    """What `teach` leaves behind."""

    path: str
    num_images: int
    num_views: int
    num_features: int


@dataclass(frozen=True)
class StudentCheckpoint:
    """What `distill` leaves behind: `student.safetensors` (timm's keys), `student.json`, and each epoch's record.
    `val_accuracy` is that of `kept_epoch`, which ships; `kept` says in a sentence why that one."""

    path: str
    val_accuracy: float | None
    num_parameters: int
    steps: int
    batch_size: int
    kept_epoch: int
    kept: str


@dataclass(frozen=True)
class Report:
    """What `evaluate` leaves behind, also as `report.json`; the pictures lie beside it."""

    path: str
    student: dict[str, Any]  # split -> measures
    teacher: dict[str, Any] | None
    agreement: dict[str, float] | None  # split -> share of equal top-1
    temperature: float | None  # divides the student's logits so that it is as sure as it is right; fitted on val
    student_parameters: int
    teacher_parameters: int | None
    student_images_per_second: float
    teacher_images_per_second: float | None  # where evaluate.time_teacher asks for it
    device: str
    kept: str = ""  # which epoch of the student ships, and why

    @property
    def accuracies(self) -> dict[str, dict[str, float]]:
        """By network and split."""
        networks = {"student": self.student, "teacher": self.teacher or {}}
        return {who: {split: m["accuracy"] for split, m in splits.items()} for who, splits in networks.items()}


@dataclass(frozen=True)
class Exported:
    """What `export` leaves behind. `files` has their bytes by name; `differences` the largest difference of logits from
    the checkpoint's by form; `int8` the agreement with it, the accuracies on val before and after, and whether the file
    was kept; `speed` that of the student by form (`Speed`)."""

    path: str
    files: dict[str, int]
    differences: dict[str, float]
    int8: dict[str, float | None] | None
    speed: dict[str, dict[str, float]]


@dataclass
class Outcome:
    """What a run came to; stages that were not asked for are None."""

    samples: SampleSet | None = None
    adapted: AdaptedTeacher | None = None
    generated: GeneratedImages | None = None
    student: StudentCheckpoint | None = None
    report: Report | None = None
    exported: Exported | None = None
    refused: str | None = None  # why the student is not exported
    without_generated: Report | None = None  # of the same job without generated images, where it was run
    seconds: dict[str, float] = field(default_factory=dict)  # of the stages that ran; 0 where one was done before
    directories: dict[str, str] = field(default_factory=dict)
    page: str | None = None  # where report.html lies

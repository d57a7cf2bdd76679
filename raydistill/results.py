"""The results of the stages: paths and numbers, never live handles.

The result of `prepare` is `data.sample.SampleSet`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # those that pydantic reads
)

import pyarrow as pa
from pydantic import Field, GetPydanticSchema, NonNegativeFloat, NonNegativeInt
from typing_extensions import TypedDict

from raydistill.config.section import Precision
from raydistill.data.sample import SampleSet

PREDICTIONS_FILE = "predictions.parquet"
# The columns that other code reads; the full logits follow.
PREDICTIONS = pa.schema([
    ("sample_id", pa.string()), ("label", pa.int32()), ("split", pa.string()),
    ("student_class", pa.int32()), ("student_probability", pa.float32()),
    ("teacher_class", pa.int32()), ("teacher_probability", pa.float32()),
])  # fmt: skip

Share = Annotated[float, Field(ge=0, le=1)]
Measured = Literal["val", "test"]


class _OfClass(TypedDict):
    images: NonNegativeInt
    answers: NonNegativeInt
    recall: Share | None
    precision: Share


class _Pair(TypedDict):
    true: str
    taken_for: str
    images: NonNegativeInt


class _Measures(TypedDict):
    images: NonNegativeInt
    accuracy: Share
    interval: Annotated[list[Share], Field(min_length=2, max_length=2)]
    top5: Share
    ece: Share
    ece_calibrated: NotRequired[Share]
    balanced_accuracy: Share
    per_class: dict[str, _OfClass]
    confused: list[_Pair]


class _Speed(TypedDict):
    p50_milliseconds: NonNegativeFloat
    p95_milliseconds: NonNegativeFloat
    images_per_second: NonNegativeFloat
    batch_size: NonNegativeInt


class _Int8(TypedDict):
    images: NonNegativeInt
    agreement: Share
    accuracy_before: Share | None
    accuracy_after: Share | None
    max_drop: float
    kept: bool


def _read_as(shape: Any) -> GetPydanticSchema:
    """Of a plain dictionary: what it has to be where it is read from a workspace."""
    return GetPydanticSchema(lambda _, handler: handler(shape))


@dataclass(frozen=True)
class Features:
    """The teacher's features of whole images: their width and precision, and the seconds that a view takes on one CPU
    or GPU; None if none was computed, or for a committee."""

    path: str
    num_features: NonNegativeInt
    precision: Precision = "fp32"
    seconds_a_view: NonNegativeFloat | None = None


@dataclass(frozen=True)
class Member:
    """A model of a committee: its share of right answers on val by itself, and that of it and those before it together;
    None without val images. Its soft targets take one CPU or GPU `seconds_a_view`."""

    model: str
    num_features: NonNegativeInt
    alone: Share | None
    together: Share | None
    seconds_a_view: NonNegativeFloat | None


@dataclass(frozen=True)
class AdaptedTeacher:
    """The result of `adapt`. `features` holds the teacher's features of train and val; `l2` is the selected strength of
    the linear probe's penalty, None for another head; accuracies are shares; `val_confidence` is the mean probability
    of the teacher's top class; both are None without val images. `members`: of a committee."""

    path: str
    features: str
    val_accuracy: float | None
    val_confidence: float | None
    chance: float
    l2: float | None
    num_train: int
    precision: Precision = "fp32"
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class GeneratedImages:
    """The result of `generate`. `wanted`, `kept` and `missing` are counts by class, `rejected` by reason.
    `actor_seconds` is the time of all actors for all images, over all runs."""

    samples: SampleSet
    wanted: dict[str, int]
    kept: dict[str, int]
    missing: dict[str, int]
    rejected: dict[str, int]
    actor_seconds: float


@dataclass(frozen=True)
class SoftTargets:
    """The result of `teach`; if a batch was compared with fp32, also the share of equal answers, and the largest
    difference of a logit."""

    path: str
    num_images: int
    num_views: int
    num_features: int
    precision: Precision = "fp32"
    equal_in_fp32: Share | None = None
    largest_difference: NonNegativeFloat | None = None


@dataclass(frozen=True)
class StudentCheckpoint:
    """The result of `distill`: `student.safetensors` (timm's keys), `student.json`, and each epoch's record.
    `val_accuracy` is that of `kept_epoch`, which ships; `kept` is a sentence with the reason."""

    path: str
    val_accuracy: float | None
    num_parameters: int
    steps: int
    batch_size: int
    kept_epoch: int
    kept: str
    precision: Precision = "fp32"


@dataclass(frozen=True)
class Report:
    """The result of `evaluate`, also as `report.json`."""

    path: str
    student: Annotated[dict[str, Any], _read_as(dict[Measured, _Measures])]  # split -> measures
    teacher: Annotated[dict[str, Any] | None, _read_as(dict[Measured, _Measures] | None)]
    agreement: Annotated[
        dict[str, float] | None, _read_as(dict[Measured, Share] | None)
    ]  # split -> share of equal top-1
    temperature: float | None  # divide the student's logits by it for calibrated probabilities; fitted on val
    student_parameters: int
    teacher_parameters: int | None
    student_images_per_second: float
    teacher_images_per_second: float | None  # with evaluate.time_teacher
    device: str
    kept: str = ""  # which epoch of the student ships, and why

    def __post_init__(self) -> None:
        for beside in (self.teacher, self.agreement):
            if beside is not None and beside.keys() != self.student.keys():
                raise ValueError("student and teacher are measured on different splits")
        for split, of_split in self.student.items():
            if not {pair["true"] for pair in of_split.get("confused", ())} <= of_split.get("per_class", {}).keys():
                raise ValueError(f"a class that is confused on {split} is none of its classes")

    @property
    def accuracies(self) -> dict[str, dict[str, float]]:
        """By network and split."""
        networks = {"student": self.student, "teacher": self.teacher or {}}
        return {who: {split: m["accuracy"] for split, m in splits.items()} for who, splits in networks.items()}


@dataclass(frozen=True)
class Exported:
    """The result of `export`. `files` holds sizes in bytes by name; `differences` the largest difference of logits from
    the checkpoint by file; `int8` the agreement with it, the val accuracies before and after, and whether the file is
    kept; `speed` the student's `Speed` by format."""

    path: str
    files: dict[str, int]
    differences: dict[str, float]
    int8: Annotated[dict[str, float | None] | None, _read_as(_Int8 | None)]
    speed: Annotated[dict[str, dict[str, float]], _read_as(dict[str, _Speed])]


@dataclass
class Outcome:
    """The results of a run; None for stages that were not asked for."""

    samples: SampleSet | None = None
    adapted: AdaptedTeacher | None = None
    generated: GeneratedImages | None = None
    student: StudentCheckpoint | None = None
    report: Report | None = None
    exported: Exported | None = None
    refused: str | None = None  # why the student is not exported
    without_generated: Report | None = None  # of the same job without generated images, if it was run
    seconds: dict[str, float] = field(default_factory=dict)  # of the stages that ran; 0 for those done before
    directories: dict[str, str] = field(default_factory=dict)
    page: str | None = None  # the path of report.html

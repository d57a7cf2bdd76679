"""check --teacher: does a teacher fit the data, how good is it, and what would it cost? It uses some of the images, on
this machine.

Shapes: N images, D features, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from rich.table import Table

from raydistill.config import RunConfig, Teacher
from raydistill.data.chunks import chunks, decode_chunk
from raydistill.data.isolation import Killed, map_isolated
from raydistill.data.sample import seeded_rank
from raydistill.data.sources.columns import Entries
from raydistill.data.sources.listing import list_images
from raydistill.data.views import WHOLE_IMAGE, Preprocessing, render
from raydistill.errors import ConfigError, DataError
from raydistill.models.heads import match_native_head
from raydistill.models.student import build_student
from raydistill.models.teacher import TeacherBackbone, load_teacher
from raydistill.runtime.cgroups import num_cores
from raydistill.runtime.progress import Progress
from raydistill.stages.adapt import fit_linear_probe

# The number of images: three quarters for the quick probe, one for its accuracy.
_MOST_IMAGES, _BATCH, _TOLERANCE = 800, 32, 1e-3
_PROBE = "linear probe"


@dataclass(frozen=True)
class TeacherLook:
    """One teacher on a sample of the images. `trouble` says why it cannot be used; "" if it can."""

    model: str
    preprocessing: str
    num_features: int
    accuracy: float | None  # of its native head, or of a probe fitted on three quarters, on the other quarter
    num_scored: int
    head: str
    images_per_second: float
    forecast_seconds: float  # for all views of the job, on this machine
    trouble: str


def check_teachers(config: RunConfig, names: Sequence[str], progress: Progress) -> list[TeacherLook]:
    """The job's teacher, or those named (`MODEL` or `MODEL=WEIGHTS`), the most accurate first. Raises ConfigError if
    there is none to check, or one cannot be loaded."""
    if config.teacher is None and not names:
        raise ConfigError("check --teacher: the job has no teacher; name one in teacher.model, or use --teachers")
    settings = [_named(name) for name in names] if names or config.teacher is None else [*config.teacher.members]
    listing = list_images(config.images)
    train = listing.entries[listing.entries.in_split(None, "train")]
    labelled = train[train.is_labelled]
    ranks = np.array([seeded_rank(config.seed, "check", f"{e.path}/{e.row}") for e in labelled])
    some = labelled[np.argsort(ranks, kind="stable")[:_MOST_IMAGES]]
    images_NHH3, labels_N = _decode(config, some[some.by_name()])
    views = config.views.per_image if isinstance(config.views.per_image, int) else config.distill.epochs
    num_views = views * len(train)
    progress.line(f"student:  {config.student.model} {_student_words(config, len(listing.classes))}")
    looks, features = [], []
    with progress.task("teachers", len(settings) * len(images_NHH3), "images") as advance:
        for teacher in settings:
            look, features_ND = _look(teacher, listing.classes, images_NHH3, labels_N, num_views)
            looks.append(look)
            features.append(features_ND)
            advance(len(images_NHH3))
    if len(looks) > 1 and all(look.head == _PROBE and not look.trouble for look in looks):
        accuracy, num_scored = _probe(np.concatenate(features, axis=1), labels_N, len(listing.classes), settings[0])
        seconds = sum(look.forecast_seconds for look in looks)
        looks.append(
            TeacherLook(
                "all as a committee", "", sum(look.num_features for look in looks), accuracy, num_scored, _PROBE,
                num_views / seconds, seconds, "",
            )
        )  # fmt: skip
    return sorted(looks, key=lambda look: -(look.accuracy or 0.0))


def _named(words: str) -> Teacher:
    """`MODEL`, or `MODEL=WEIGHTS`."""
    model, _, weights = words.strip().partition("=")
    return Teacher(model=model, weights=weights or None)


def _student_words(config: RunConfig, num_classes: int) -> str:
    return f"sees {_words(build_student(config.student, num_classes).preprocessing)}"


def _decode(config: RunConfig, entries: Entries) -> tuple[np.ndarray, np.ndarray]:
    """(N, H, H, 3) uint8 and (N,) class numbers of the readable ones. Raises DataError if there are none."""
    images, labels, settings = [], [], config.images
    work = partial(decode_chunk, images=settings)
    for _, found in map_isolated(work, chunks(entries, settings), num_cores()):
        for one in found:
            if not isinstance(one, Killed) and one["image"]:  # `check` has given the reasons for the others
                images.append(np.frombuffer(one["image"], np.uint8).reshape(settings.size, settings.size, 3))
                labels.append(int(entries.label_N[one["index"]]))
    if not images:
        raise DataError(f"images.path={settings.path}: no labelled train image can be read")
    return np.stack(images), np.array(labels)


def _probe(
    features_ND: np.ndarray, labels_N: np.ndarray, num_classes: int, teacher: Teacher
) -> tuple[float | None, int]:
    """The accuracy on one image of four of a probe that is fitted on the others, and how many these are; None if they
    cannot tell."""
    is_scored_N = np.arange(len(labels_N)) % 4 == 3
    if not is_scored_N.any() or len(set(labels_N[~is_scored_N])) < 2:
        return None, int(is_scored_N.sum())
    fitted, scored = ((features_ND[some], labels_N[some]) for some in (~is_scored_N, is_scored_N))
    probe, _ = fit_linear_probe(fitted, scored, num_classes, teacher.class_balanced)
    return float((probe.logits(scored[0]).argmax(1) == scored[1]).mean()), int(is_scored_N.sum())


def _look(
    teacher: Teacher, classes: tuple[str, ...], images_NHH3: np.ndarray, labels_N: np.ndarray, num_views: int
) -> tuple[TeacherLook, np.ndarray]:
    """The look, and the (N, D) features."""
    backbone, head, outputs = load_teacher(teacher)
    started = time.perf_counter()
    features_ND = _features(backbone, images_NHH3, teacher.batch_size)
    rate = len(images_NHH3) / (time.perf_counter() - started)
    trouble = _trouble(backbone, images_NHH3, features_ND)
    words, accuracy, num_scored = _PROBE, None, len(labels_N)
    if teacher.head == "native":
        words = "native"
        try:
            own = match_native_head(head, outputs, classes)
            accuracy = float((own.logits(features_ND).argmax(1) == labels_N).mean())
        except ConfigError as error:
            trouble = trouble or str(error)
    elif not trouble:
        accuracy, num_scored = _probe(features_ND, labels_N, len(classes), teacher)
    seen = _words(backbone.preprocessing)
    look = TeacherLook(
        teacher.name, seen, features_ND.shape[1], accuracy, num_scored, words, rate, num_views / rate, trouble
    )
    return look, features_ND


def _features(backbone: TeacherBackbone, images_NHH3: np.ndarray, batch_size: int) -> np.ndarray:
    whole = torch.from_numpy(WHOLE_IMAGE)
    parts = [
        backbone(render(part, whole.expand(len(part), -1), backbone.preprocessing)).numpy()
        for part in torch.from_numpy(images_NHH3).split(batch_size)
    ]
    return np.concatenate(parts)


def _trouble(backbone: TeacherBackbone, images_NHH3: np.ndarray, features_ND: np.ndarray) -> str:
    """Rows that are not finite, and features that depend on chance or on the rest of the batch."""
    if bad := int((~np.isfinite(features_ND)).any(axis=1).sum()):
        return f"gives no finite features for {bad} of {len(features_ND)} images"
    few = images_NHH3[:_BATCH]
    again_BD, alone_BD = _features(backbone, few, len(few)), _features(backbone, few, 1)
    bound = _TOLERANCE * float(np.abs(features_ND).max())
    if np.abs(again_BD - _features(backbone, few, len(few))).max() != 0:
        return "gives other features for the same images the second time"
    if not np.abs(again_BD - alone_BD).max() <= bound:
        return "gives other features for an image alone than in a batch"
    return ""


def _words(wanted: Preprocessing) -> str:
    centre = f" (the centre of {wanted.resized})" if wanted.resized else ""
    return f"{wanted.size} pixels{centre}, mean {_few(wanted.mean)}, std {_few(wanted.std)}, {wanted.interpolation}"


def _few(numbers: Sequence[float]) -> str:
    return "/".join(f"{number:.3g}" for number in numbers)


def teachers_table(looks: Sequence[TeacherLook]) -> Table:
    titles = ("teacher", "sees", "features", "head", "accuracy", "images/s here", "all views here", "trouble")
    table = Table(*titles, box=None, pad_edge=False)
    for look in looks:
        accuracy = "" if look.accuracy is None else f"{look.accuracy:.3f} of {look.num_scored}"
        table.add_row(
            look.model, look.preprocessing, f"{look.num_features:,}", look.head, accuracy,
            f"{look.images_per_second:,.0f}", f"{look.forecast_seconds:,.0f} s", look.trouble or "none",
        )  # fmt: skip
    return table

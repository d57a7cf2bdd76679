"""The pool of teacher actors, for shards of images or a stream of fresh views.

Shapes: R rows, K views, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from raydistill.cluster.plan import Plan
from raydistill.cluster.restarts import Restart, trying
from raydistill.config import RunConfig, Teacher
from raydistill.data.compact import Projection
from raydistill.engine.frozen_teacher import FrozenTeacher
from raydistill.errors import StageError
from raydistill.models.heads import load_head
from raydistill.runtime import metrics
from raydistill.storage.directory import refuse_small_disk


def refuse_large_targets(config: RunConfig, num_images: int, head: str, projection: Projection | None = None) -> None:
    """Raises ConfigError: the soft targets of this many images may not fit on the disk."""
    views, width = config.views.per_image, load_head(head).of(projection).weight_CD.shape[1]
    assert views != "fresh", "fresh views are not stored"
    each = width * 2 if projection is None else width + 2  # float16, or bytes and a scale
    need = num_images * (views * each + 16)  # and the image's id
    what = f"teach: {width} features of {views} views of each image"
    refuse_small_disk(config, what, need, "lower views.per_image, choose another workspace")


def teacher_pool(plan: Plan, most_useful: int) -> dict[str, Any]:
    """Ray Data options of the pool of teacher actors, with at most `most_useful` actors."""
    fewest, most = plan.teacher_actors
    most = max(min(most, most_useful), 1)
    pool = ActorPoolStrategy(min_size=min(fewest, most), max_size=most)
    return {"compute": pool, "num_cpus": plan.teacher_cpus, "num_gpus": plan.teacher_gpus or None}


class TeacherActor(FrozenTeacher):
    """Holds the teacher for the life of the pool, and counts its work for the `stage`. `pin` is the file of what
    `precision: auto` stands for; `tries` are the pool's; None without Ray."""

    stage = "teach"

    def __init__(self, teacher: Teacher, threads: int, pin: str, tries: Any = None) -> None:
        self._restart, self._tries = Restart(), tries
        device = torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")
        with trying(tries, self._restart.starts(teacher.name)):
            super().__init__(teacher, device, threads, pin)

    def features(self, images_RHHC: np.ndarray, parameters_KRP: np.ndarray) -> np.ndarray:
        metrics.count("raydistill_teacher_calls", 1, self.stage)
        metrics.count("raydistill_teacher_views", len(images_RHHC) * len(parameters_KRP), self.stage)
        return super().features(images_RHHC, parameters_KRP)


def fresh_views(
    teachers: Sequence[tuple[Teacher, str]],
    gather: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    units: list[dict[str, int]],
    plan: Plan,
    tries: Any,
) -> ray.data.Dataset:
    """The online path: rows of fresh views with the teacher's features, in the order of `units`, as one long execution,
    so that the teacher actors start once. `gather` turns a unit into its rows. Of a committee, each of `teachers`, with
    its file of what `precision: auto` stands for, adds its features to those of the one before."""
    rows = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        gather, batch_size=1, batch_format="numpy", num_cpus=plan.load_cpus
    )
    for teacher, pin in teachers:
        rows = rows.map_batches(
            StreamTeacher,
            fn_constructor_kwargs={"teacher": teacher, "threads": plan.teacher_threads, "pin": pin, "tries": tries},
            # One unit at a time, or the whole stream would become one task: on CPUs Ray fuses this with the previous
            # step, whose rows are units, and would gather `batch_size` of them first. With GPUs it needs a number, and
            # does not fuse.
            batch_size=teacher.batch_size if plan.teacher_gpus else None,
            batch_format="numpy",
            **teacher_pool(plan, len(units)),
        )
    return rows


class StreamTeacher(TeacherActor):
    """Adds the teacher's features to the rows that the trainers receive."""

    stage = "distill"

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with trying(self._tries, f"{len(batch['image'])} images, {batch['sample_id'][0]} the first"):
            features_1RD = self.features(batch["image"], batch["parameters"][None])
        refuse_not_finite(features_1RD, batch["sample_id"].tolist())
        before = [batch["features"]] if "features" in batch else []
        return {**batch, "features": np.concatenate([*before, features_1RD[0]], axis=1)}


def refuse_not_finite(features_KRD: np.ndarray, ids: Sequence[str]) -> None:
    """Raises StageError naming the first sample whose features are NaN, infinite, or beyond float16."""
    bad_KR = ~np.isfinite(features_KRD).all(axis=2)
    if bad_KR.any():
        row = int(np.argwhere(bad_KR)[0][1])
        raise StageError(
            f"the teacher's features of sample {ids[row]} are not finite as float16 ({int(bad_KR.sum())} of "
            f"{bad_KR.size} views); check the teacher's weights and teacher.size"
        )

"""The pool of teacher actors, for shards of images or a stream of fresh views.

Shapes: R rows, K views, H working pixels, P parameters of a view, D features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from raydistill.cluster.plan import Plan
from raydistill.cluster.restarts import Restart, trying
from raydistill.config import RunConfig, Teacher
from raydistill.data.views import render, to_device
from raydistill.engine.precision import set_teacher_precision
from raydistill.errors import StageError
from raydistill.models.from_transformers import keeps_outputs
from raydistill.models.heads import LinearHead, load_head
from raydistill.models.teacher import load_teacher
from raydistill.storage.directory import refuse_small_disk

logger = logging.getLogger(__name__)


def refuse_large_targets(config: RunConfig, num_images: int, head: str) -> None:
    """Raises ConfigError: the soft targets of this many images may not fit on the disk."""
    views, width = config.views.per_image, load_head(head).weight_CD.shape[1]
    assert views != "fresh", "fresh views are not stored"
    need = num_images * (views * width * 2 + 16)  # float16, and the image's id
    what = f"teach: {width} features of {views} views of each image"
    refuse_small_disk(config, what, need, "lower views.per_image, choose another workspace")


def teacher_pool(plan: Plan, most_useful: int) -> dict[str, Any]:
    """Ray Data options of the pool of teacher actors, with at most `most_useful` actors."""
    fewest, most = plan.teacher_actors
    most = max(min(most, most_useful), 1)
    pool = ActorPoolStrategy(min_size=min(fewest, most), max_size=most)
    return {"compute": pool, "num_cpus": plan.teacher_cpus, "num_gpus": plan.teacher_gpus or None}


class TeacherActor:
    """Holds the teacher for the life of the pool. `pin` is the file of what `precision: auto` stands for; `tries` are
    the pool's; None without Ray."""

    def __init__(self, teacher: Teacher, threads: int, pin: str, tries: Any = None) -> None:
        self._restart, self._tries = Restart(), tries
        self._device = torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")
        with trying(tries, self._restart.starts(teacher.model)):
            self._backbone, _, _ = load_teacher(teacher)
            # On CPUs a thread for each share of a batch does more than several threads inside each operation.
            shares = self._device.type == "cpu" and not keeps_outputs(self._backbone)
            self._threads = threads if shares else 1
            torch.set_num_threads(1 if shares else threads)
            # With channels last, convolutions took little more than half the time on CPUs.
            self._backbone.to(self._device, memory_format=torch.channels_last)
            share = -(-teacher.batch_size // self._threads)
            set_teacher_precision(self._backbone, teacher.precision, pin, share, self._device)
        self._batch_size = teacher.batch_size

    @property
    def num_overflowed(self) -> int:
        return self._backbone.num_overflowed

    def compared(
        self, head: LinearHead, images_RHHC: np.ndarray, parameters_KRP: np.ndarray, features_KRD: np.ndarray
    ) -> dict[str, float]:
        """The answers to the first view of a batch beside those in fp32: how many `answers`, how many `equal`, and the
        largest `difference` of a logit. Empty if the teacher computes in fp32."""
        precision, rows = self._backbone.precision, slice(self._batch_size)
        if precision == "fp32":
            return {}
        self._backbone.precision = "fp32"
        exact_RC = head.logits(self.features(images_RHHC[rows], parameters_KRP[:1, rows])[0])
        self._backbone.precision = precision
        logits_RC = head.logits(features_KRD[0, rows])
        equal_R = logits_RC.argmax(1) == exact_RC.argmax(1)
        difference = float(np.abs(logits_RC - exact_RC).max())
        return {"answers": len(equal_R), "equal": int(equal_R.sum()), "difference": difference}

    def features(self, images_RHHC: np.ndarray, parameters_KRP: np.ndarray) -> np.ndarray:
        """(K, R, D) float16 features of K views of each image."""
        size = -(-min(self._batch_size, len(images_RHHC)) // self._threads)
        shares = [slice(first, first + size) for first in range(0, len(images_RHHC), size)]
        with ThreadPoolExecutor(self._threads) as pool:
            seen = pool.map(lambda rows: self._seen(images_RHHC[rows], parameters_KRP[:, rows]), shares)
            return np.concatenate(list(seen), axis=1)

    def _seen(self, images_RHHC: np.ndarray, parameters_KRP: np.ndarray) -> np.ndarray:
        """The features of a batch, in halves if it does not fit into the device's memory."""
        backbone, half = self._backbone, len(images_RHHC) // 2
        try:
            images = to_device(torch.from_numpy(np.array(images_RHHC)), self._device)  # a copy: Ray's are read-only
            views = (
                render(images, torch.from_numpy(np.array(one_RP)), backbone.preprocessing) for one_RP in parameters_KRP
            )
            return torch.stack([backbone(view).half() for view in views]).cpu().numpy()
        except torch.OutOfMemoryError:
            if not half:
                raise
        if half < self._batch_size:
            self._batch_size = half
            logger.warning("the teacher takes %d images at a time: more do not fit into its memory", half)
        halves = slice(half), slice(half, None)
        return np.concatenate([self._seen(images_RHHC[rows], parameters_KRP[:, rows]) for rows in halves], axis=1)


def fresh_views(
    teacher: Teacher,
    gather: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    units: list[dict[str, int]],
    plan: Plan,
    pin: str,
    tries: Any,
) -> ray.data.Dataset:
    """The online path: rows of fresh views with the teacher's features, in the order of `units`, as one long execution,
    so that the teacher actors start once. `gather` turns a unit into its rows."""
    rows = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        gather, batch_size=1, batch_format="numpy", num_cpus=plan.load_cpus
    )
    return rows.map_batches(
        StreamTeacher,
        fn_constructor_kwargs={"teacher": teacher, "threads": plan.teacher_threads, "pin": pin, "tries": tries},
        # One unit at a time, or the whole stream would become one task: on CPUs Ray fuses this with the previous step,
        # whose rows are units, and would gather `batch_size` of them first. With GPUs it needs a number, and does not
        # fuse.
        batch_size=teacher.batch_size if plan.teacher_gpus else None,
        batch_format="numpy",
        **teacher_pool(plan, len(units)),
    )


class StreamTeacher(TeacherActor):
    """Adds the teacher's features to the rows that the trainers receive."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with trying(self._tries, f"{len(batch['image'])} images, {batch['sample_id'][0]} the first"):
            features_1RD = self.features(batch["image"], batch["parameters"][None])
        refuse_not_finite(features_1RD, batch["sample_id"].tolist())
        return {**batch, "features": features_1RD[0]}


def refuse_not_finite(features_KRD: np.ndarray, ids: Sequence[str]) -> None:
    """Raises StageError naming the first sample whose features are NaN, infinite, or beyond float16."""
    bad_KR = ~np.isfinite(features_KRD).all(axis=2)
    if bad_KR.any():
        row = int(np.argwhere(bad_KR)[0][1])
        raise StageError(
            f"the teacher's features of sample {ids[row]} are not finite as float16 ({int(bad_KR.sum())} of "
            f"{bad_KR.size} views); check the teacher's weights and teacher.size"
        )

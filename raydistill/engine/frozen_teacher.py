"""A teacher on a device, and what it makes of images. It is apart from the pool, so that it runs where there is no Ray.

Shapes: R rows, K views, H working pixels, P parameters of a view, D features, C classes.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from raydistill.config import Teacher
from raydistill.data.device import to_device
from raydistill.data.views import render
from raydistill.engine.precision import set_teacher_precision
from raydistill.engine.workarounds import keep_freed_memory
from raydistill.models.from_transformers import keeps_outputs
from raydistill.models.heads import LinearHead
from raydistill.models.teacher import load_teacher

logger = logging.getLogger(__name__)


class FrozenTeacher:
    """The features of images, in batches. `pin` is the file of what `precision: auto` stands for."""

    def __init__(self, teacher: Teacher, device: torch.device, threads: int, pin: str) -> None:
        self._device = device
        if device.type == "cpu":
            keep_freed_memory()
        self._backbone, _, _ = load_teacher(teacher)
        # On CPUs a thread for each share of a batch does more than several threads inside each operation.
        shares = device.type == "cpu" and not keeps_outputs(self._backbone)
        self._threads = threads if shares else 1
        torch.set_num_threads(1 if shares else threads)
        # With channels last, convolutions took little more than half the time on CPUs.
        self._backbone.to(device, memory_format=torch.channels_last)
        share = -(-teacher.batch_size // self._threads)
        set_teacher_precision(self._backbone, teacher.precision, pin, share, device)
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

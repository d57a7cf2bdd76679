"""Ray's stream of fresh views with the teacher's features: images that tasks gather, for the actors of the teacher.

It is apart from `batches`, so that the training loop runs where there is no Ray.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from raydistill.cluster.plan import Plan
from raydistill.cluster.restarts import new_tries, trying
from raydistill.config import members
from raydistill.data.order import Visits
from raydistill.data.train_split import Streamed
from raydistill.engine.batches import DistillJob
from raydistill.engine.checkpoints import latest_step
from raydistill.engine.teacher_pool import fresh_views
from raydistill.identity import teacher_pin

# Steps whose images one Ray task gathers for the stream of fresh views.
_STEPS_IN_UNIT = 8


class FreshStream:
    """Makes Ray's stream of fresh views, from the first step of the workers."""

    def __init__(self, job: DistillJob, plan: Plan) -> None:
        self._job, self._plan = job, plan

    def __call__(self) -> Any:
        job = self._job
        units = [
            {"first": first, "steps": min(_STEPS_IN_UNIT, job.total_steps - first)}
            for first in range(latest_step(job.path), job.total_steps, _STEPS_IN_UNIT)
        ]
        # After the last step there is nothing to stream, but Ray Data needs a row.
        units, tries = units or [{"first": 0, "steps": 1}], new_tries()
        root = job.path.rpartition("/")[0]
        teachers = [(one.teacher, teacher_pin(root, one)) for one in members(job.config) if one.teacher is not None]
        return fresh_views(teachers, _GatherUnit(job, tries), units, self._plan, tries)


class _GatherUnit:
    """A Ray Data task: the images and views of some steps' global batches."""

    def __init__(self, job: DistillJob, tries: Any) -> None:
        self._job, self._tries = job, tries

    def __call__(self, unit: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        source, order = Streamed(self._job.train_split), self._job.order(int(unit["first"][0]))
        visits = Visits.concat(list(itertools.islice(order, int(unit["steps"][0]))))
        with trying(self._tries, f"{len(visits)} images of the steps from {int(unit['first'][0])} on, to be read"):
            batch = source.gather(visits)
        weights = {} if batch.weights_V is None else {"weight": batch.weights_V}
        return weights | {
            "image": batch.images_VHHC,
            "parameters": batch.parameters_VP,
            "label": batch.labels_V,
            "row": batch.rows_V,
            "sample_id": np.array(source.ids(visits)),
        }

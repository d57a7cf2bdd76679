"""Work on many small units: in tasks of Ray Data or, where one task would do all of it, in this process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from raydistill.cluster.plan import Plan
from raydistill.cluster.restarts import new_tries, trying

Work = Callable[[dict[str, np.ndarray]], pa.Table]


def in_tasks(work: Work, units: Sequence[dict[str, Any]], together: int, plan: Plan) -> Iterator[pa.Table]:
    """The tables that `work` makes of the columns of `units`, in their order; a task takes `together` units."""
    if not units:
        return
    if len(units) <= together:
        yield work({name: np.array([unit[name] for unit in units], object) for name in units[0]})
        return
    yield from tasks(work, units, together, plan).iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    )


def tasks(work: Work, units: Sequence[dict[str, Any]], together: int, plan: Plan) -> ray.data.Dataset:
    """The same as a Dataset of Ray's."""
    dataset = ray.data.from_items(list(units), override_num_blocks=math.ceil(len(units) / together))
    return dataset.map_batches(
        _Counted(work, new_tries()), batch_size=None, batch_format="numpy", num_cpus=plan.decode_cpus
    )


@dataclass(frozen=True)
class _Counted:
    """Work that is given up when it kills its process each time."""

    work: Work
    tries: Any

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        name = min(batch)
        with trying(self.tries, f"{len(batch[name])} pieces of work, {name} {batch[name][0]} the first"):
            return self.work(batch)

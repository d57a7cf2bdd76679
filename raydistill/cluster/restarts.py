"""Counts repeated work of lost actors, and gives up work that kills its actor each time."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydistill.errors import StageError

# as many as distill.max_failures gives a train worker
_MOST_TRIES = 4


class Restart:
    """The cost of replacing a lost actor: the new one's start, and the call that the lost one had open.

    Every actor of a pool creates it first. Ray restarts a lost actor, on another node if needed, and repeats its open
    call. So the first call after a restart counts as repeated work.
    """

    def __init__(self) -> None:
        self._actor = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
        self._again = self._actor is not None and ray.get_runtime_context().was_current_actor_reconstructed
        self._since = time.monotonic()

    def starts(self, model: str) -> str:
        """A name for the actor's own start, as a piece of work."""
        return f"{model}, to be loaded by actor {self._actor}"

    def note(self, images: int) -> dict[str, np.ndarray]:
        """For a call of that many images: how many of them are repeated, and the seconds since the restart."""
        again, self._again = self._again, False
        seconds = time.monotonic() - self._since if again else 0.0
        return {"images_again": np.array([images if again else 0]), "seconds_again": np.array([seconds])}


class Tries:
    """Counts how often a piece of work begins without ending. Ray Data replaces actors and repeats tasks forever, and
    does not say which work killed a process, nor whether its node was lost."""

    def __init__(self) -> None:
        self._begun: dict[str, list[str]] = defaultdict(list)

    def begin(self, work: str, node: str) -> int:
        """How often the work has begun, including now. A start on a node that is gone does not count."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self._begun[work] = [*(node for node in self._begun[work] if node in alive), node]
        return len(self._begun[work])

    def end(self, work: str) -> None:
        self._begun.pop(work, None)


def new_tries() -> Any:
    """An actor beside the driver that holds the Tries of one pool."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    endless = {"max_restarts": -1, "max_task_retries": -1}
    return ray.remote(num_cpus=0, **endless)(Tries).options(scheduling_strategy=here).remote()


@contextlib.contextmanager
def trying(tries: Any, work: str) -> Iterator[int]:
    """Wraps a piece of work of an actor or a task. Gives the number of this try; raises StageError after too many.

    `tries` is None outside Ray.
    """
    if tries is None:
        yield 1
        return
    times = ray.get(tries.begin.remote(work, ray.get_runtime_context().get_node_id()))
    if times > _MOST_TRIES:
        raise StageError(
            f"{work}: tried {_MOST_TRIES} times, and its process died each time, on nodes that are still there; if "
            "memory ran out, take a smaller batch size, fewer actors or larger nodes"
        )
    yield times
    tries.end.remote(work)

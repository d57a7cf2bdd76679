"""What it costs that an actor, or the node under it, was lost: the work that it had open is begun again."""

from __future__ import annotations

import time

import numpy as np
import ray


class Restart:
    """What an actor that stands in for a lost one pays for it: its own start, and the call that the other had open.

    Made first of all by every actor of a pool. Ray restarts a lost actor, on another node if need be, and makes its
    open call again, so that the first call after a restart is taken for work that had been begun.
    """

    def __init__(self) -> None:
        in_actor = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
        self._again = in_actor and ray.get_runtime_context().was_current_actor_reconstructed
        self._since = time.monotonic()

    def note(self, images: int) -> dict[str, np.ndarray]:
        """Of a call that made so many images' work: how many of them were begun before, and the seconds since the
        restart."""
        again, self._again = self._again, False
        seconds = time.monotonic() - self._since if again else 0.0
        return {"images_again": np.array([images if again else 0]), "seconds_again": np.array([seconds])}

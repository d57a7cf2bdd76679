"""Reports work that has not moved for long, and what Ray waits for."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from raydistill.errors import reason_of
from raydistill.runtime.periodic import repeated

_SECONDS = 120.0
_SECONDS_BETWEEN_LOOKS = 1.0


@contextlib.contextmanager
def idle_noticed(say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Gives a function to call whenever something has moved. If it is not called for two minutes, and each time that
    this doubles, `say` gets a sentence, in a thread of its own."""
    moved, limit = time.monotonic(), _SECONDS

    def move() -> None:
        nonlocal moved, limit
        moved, limit = time.monotonic(), _SECONDS

    def look() -> None:
        nonlocal limit
        if (idle := time.monotonic() - moved) >= limit:
            limit *= 2
            say(f"nothing has moved for {idle:.0f} s{waiting_words()}")

    # The last look may wait for a head that does not answer.
    with repeated(look, _SECONDS_BETWEEN_LOOKS, "idle", patience=_SECONDS_BETWEEN_LOOKS):
        yield move


def waiting_words() -> str:
    """What Ray cannot place, and how much of that is free; empty without Ray. `; Ray waits to place 2 x {GPU: 1}; free:
    GPU 0 of 1`."""
    if "ray" not in sys.modules:  # Ray does not run in this process
        return ""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    if not ray.is_initialized():
        return ""
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
    except Exception as error:  # errors of Ray and its connection; then it is not known what waits
        return f"; Ray does not say what waits ({reason_of(error)[:100]})"
    demand = [*status.resource_demands.ray_task_actor_demand, *status.resource_demands.placement_group_demand]
    asked = [request for one in demand for request in one.bundles_by_count]
    if not asked:
        return "; all that Ray was asked to place is running"
    names = {name for request in asked for name in request.bundle}
    free = [f"{u.resource_name} {u.total - u.used:g} of {u.total:g}" for u in status.cluster_resource_usage
            if u.resource_name in names]  # fmt: skip
    waiting = ", ".join(f"{request.count} x {_bundle_words(request.bundle)}" for request in asked)
    return f"; Ray waits to place {waiting}; free: {', '.join(free) or 'none of it'}"


def _bundle_words(bundle: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in sorted(bundle.items())) + "}"

"""Nodes that join a cluster while work is going on are looked at as those before them were."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from raydistill.config import RunConfig
from raydistill.errors import reason_of

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LOOKS = 5.0


@contextlib.contextmanager
def watched(config: RunConfig) -> Iterator[None]:
    """For the time of a `with` block, drain whatever node joins and is not fit, and say why; the work goes on on the
    others, and what an actor there had begun is begun again."""
    import ray

    over, known = threading.Event(), {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def watch() -> None:
        while not over.wait(_SECONDS_BETWEEN_LOOKS):
            try:
                _look(config, known)
            except Exception as error:  # Ray's and its connection's: the look after this one may tell
                log.warning("nodes that join are not looked at for now: %s", reason_of(error))

    thread = threading.Thread(target=watch, name="newcomers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _look(config: RunConfig, known: set[str]) -> None:
    import ray

    from raydistill.cluster.nodes import look_at
    from raydistill.cluster.preemption import drain

    new = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in known]
    for node in new:
        bad = [finding for finding in look_at(config, [node]) if finding.advice]
        if bad:
            why = "; ".join(f"{finding.about}: {finding.found}; {finding.advice}" for finding in bad)
            log.error("a node that joined is drained, since it is not fit: %s", why)
            drain(node["NodeID"], "raydistill: not fit", 0.0, ray.get_runtime_context().gcs_address)
        known.add(node["NodeID"])  # last: a drain that failed is tried again

"""Checks nodes that join a cluster while work runs, as the first ones were checked."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from raydistill.config import RunConfig
from raydistill.errors import reason_of
from raydistill.runtime.periodic import repeated

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LOOKS = 5.0


@contextlib.contextmanager
def late_nodes_checked(config: RunConfig) -> Iterator[None]:
    """During a `with` block, drain each node that joins and is not fit, and say why. The work continues on the other
    nodes, and repeats what an actor on that node had begun."""
    import ray

    known = {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def look() -> None:
        try:
            _inspect(config, known)
        except Exception as error:  # errors of Ray and its connection; the next look may succeed
            log.warning("nodes that join are not checked for now: %s", reason_of(error))

    with repeated(look, _SECONDS_BETWEEN_LOOKS, "late-nodes"):
        yield


def _inspect(config: RunConfig, known: set[str]) -> None:
    import ray

    from raydistill.cluster.nodes import inspect_nodes
    from raydistill.cluster.preemption import drain

    new = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in known]
    for node in new:
        bad = [finding for finding in inspect_nodes(config, [node]) if finding.advice]
        if bad:
            why = "; ".join(f"{finding.about}: {finding.found}; {finding.advice}" for finding in bad)
            log.error("a node that joined is drained, because it is not fit: %s", why)
            drain(node["NodeID"], "raydistill: not fit", 0.0, ray.get_runtime_context().gcs_address)
        known.add(node["NodeID"])  # last, so that a failed drain is tried again

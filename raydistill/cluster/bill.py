"""The cost of a stage on a cluster: the time of its nodes by type, and the nodes that were lost."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from raydistill.config import RunConfig
from raydistill.escaping import counted
from raydistill.runtime.periodic import repeated

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LOOKS = 5.0
# Ray's NodeDeathInfo.Reason: ended unexpectedly, and preempted. Nodes that were idle, or told to end, are not lost.
_LOST = (2, 3)


class NodeClock:
    """Adds up how long nodes of each type existed, by looking at the cluster now and then.

    `seconds` is by node type: the label `pool`, `head` for a head without one, `nodes` for others. `lost` counts nodes
    that died or were preempted.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.lost = 0
        self._looked = time.monotonic()
        self._alive: set[str] = set()
        self._failed = False

    def look(self) -> None:
        """Add the time since the last look for all nodes that exist."""
        import ray

        now = time.monotonic()
        passed, self._looked = now - self._looked, now
        if not ray.is_initialized():
            return
        try:
            nodes = ray.nodes()
        except Exception as error:  # errors of Ray and its connection; no stage fails because its bill is incomplete
            if not self._failed:
                log.warning("the hours of nodes are incomplete: Ray does not answer (%s)", error)
            self._failed = True
            return
        for node in nodes:
            if node["Alive"]:
                self.seconds[node_type(node)] += passed
                self._alive.add(node["NodeID"])
            elif node["NodeID"] in self._alive:
                self._alive.discard(node["NodeID"])
                self.lost += node.get("DeathReason") in _LOST


@contextlib.contextmanager
def billed(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Gives a dict that is filled when the `with` block ends, and kept beside a stage's seconds. It stays empty without
    a joined cluster: for one machine the seconds say everything."""
    bill: dict[str, Any] = {}
    if config.cluster.address is None:
        yield bill
        return
    clock = NodeClock()
    clock.look()  # a node that exists now may be lost before the next look
    with repeated(clock.look, _SECONDS_BETWEEN_LOOKS, "node-clock"):
        yield bill
    clock.look()
    bill |= {"node_seconds": dict(clock.seconds), "lost_nodes": clock.lost}


def node_type(node: Mapping[str, Any]) -> str:
    """The type of one of `ray.nodes()`."""
    if pool := (node.get("Labels") or {}).get("pool"):
        return str(pool)
    return "head" if "node:__internal_head__" in node["Resources"] else "nodes"


def cost(node_seconds: Mapping[str, float], prices: Mapping[str, float]) -> float | None:
    """The cost of nodes by the price of their types an hour; None if a type has no price, or nothing was measured."""
    if not node_seconds or not set(node_seconds) <= set(prices):
        return None
    return sum(seconds / 3600 * prices[name] for name, seconds in node_seconds.items())


def bill_words(bill: Mapping[str, Any], prices: Mapping[str, float]) -> str:
    """The time and cost of a finished stage in words: `130 s; spot 0.21 h, train 0.04 h = 0.12; 1 node lost`."""
    words = [f"{bill['seconds']:.0f} s"] if "seconds" in bill else []
    if node_seconds := bill.get("node_seconds"):
        hours = ", ".join(f"{name} {seconds / 3600:.2f} h" for name, seconds in sorted(node_seconds.items()))
        money = cost(node_seconds, prices)
        words.append(hours if money is None else f"{hours} = {money:.2f}")
    if bill.get("lost_nodes"):
        words.append(f"{counted(bill['lost_nodes'], 'nodes')} lost")
    if bill.get("images_again"):
        words.append(f"{counted(bill['images_again'], 'images')} begun again, {bill['seconds_again']:.0f} s")
    return "; ".join(words)

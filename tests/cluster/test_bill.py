"""The bill of a stage on a cluster: node-seconds by type, the nodes that were lost, money where prices are known."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from raydistill.cluster import bill as bills
from raydistill.cluster.bill import NodeClock, bill_words, billed, cost
from raydistill.config import RunConfig


def node(name: str, pool: str | None = None, alive: bool = True, reason: int = 0) -> dict[str, Any]:
    return {
        "NodeID": name, "Alive": alive, "Resources": {"CPU": 2.0}, "Labels": {"pool": pool} if pool else {},
        "DeathReason": reason,
    }  # fmt: skip


HEAD = {**node("head"), "Resources": {"node:__internal_head__": 1.0}}


class ScriptedRay:
    """Nodes as they are at each look, and the clock that moves ten seconds between looks."""

    def __init__(self, looks: list[list[dict[str, Any]] | None]) -> None:
        self.looks, self.now = looks, 0.0

    def is_initialized(self) -> bool:
        return self.looks[int(self.now / 10) - 1] is not None

    def nodes(self) -> list[dict[str, Any]]:
        return self.looks[int(self.now / 10) - 1] or []

    def monotonic(self) -> float:
        return self.now


def clock_over(monkeypatch: pytest.MonkeyPatch, looks: list[list[dict[str, Any]] | None]) -> NodeClock:
    scripted = ScriptedRay(looks)
    monkeypatch.setitem(sys.modules, "ray", scripted)
    monkeypatch.setattr(bills.time, "monotonic", scripted.monotonic)
    clock = NodeClock()
    for _ in looks:
        scripted.now += 10
        clock.look()
    return clock


def test_nodes_count_from_when_they_come_to_when_they_go(monkeypatch) -> None:
    looks = [
        None,  # Ray is on its way
        [HEAD],
        [HEAD, node("a", "spot"), node("b", "spot"), node("c")],
        [HEAD, node("a", "spot", alive=False, reason=3), node("b", "spot"), node("c")],
        [HEAD, node("a", "spot", alive=False, reason=3), node("b", "spot", alive=False, reason=4), node("c")],
    ]
    clock = clock_over(monkeypatch, looks)
    assert (clock.seconds, clock.lost) == ({"head": 40.0, "spot": 30.0, "nodes": 30.0}, 1)


def test_a_node_that_was_lost_before_is_not_lost_again(monkeypatch) -> None:
    gone = node("old", "spot", alive=False, reason=2)
    assert clock_over(monkeypatch, [[HEAD, gone], [HEAD, gone]]).lost == 0


def test_a_stage_does_not_fail_because_nobody_answers_what_it_cost(monkeypatch, caplog) -> None:
    def refuse(self) -> None:
        raise ConnectionError("the head is gone")

    monkeypatch.setattr(ScriptedRay, "nodes", refuse)
    assert clock_over(monkeypatch, [[HEAD]] * 3).seconds == {}
    assert [record.getMessage() for record in caplog.records] == [
        "the hours of nodes are incomplete: Ray does not answer (the head is gone)"
    ]


def test_the_machine_alone_is_not_looked_at(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # an import would raise
    with billed(RunConfig.model_validate({"images": {"path": "x"}})) as bill:
        pass
    assert bill == {}


def test_a_joined_cluster_is_billed_for_the_block(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ScriptedRay([[HEAD]]))
    with billed(RunConfig.model_validate({"images": {"path": "x"}, "cluster": {"address": "auto"}})) as bill:
        pass
    assert bill["node_seconds"]["head"] > 0
    assert bill["lost_nodes"] == 0


def test_money_needs_a_price_for_every_type() -> None:
    node_seconds = {"spot": 7200.0, "head": 3600.0}
    assert cost(node_seconds, {"spot": 0.5, "head": 0.25, "train": 9.0}) == pytest.approx(1.25)
    assert cost(node_seconds, {"spot": 0.5}) is None
    assert cost({}, {"spot": 0.5}) is None


@pytest.mark.parametrize(
    ("bill", "words"),
    [
        ({}, ""),
        ({"seconds": 130.2}, "130 s"),
        ({"seconds": 130.2, "node_seconds": {}, "lost_nodes": 0}, "130 s"),
        (
            {"seconds": 3600.0, "node_seconds": {"spot": 7200.0, "head": 3600.0}, "lost_nodes": 2},
            "3600 s; head 1.00 h, spot 2.00 h = 1.25; 2 nodes lost",
        ),
        ({"seconds": 60.0, "node_seconds": {"gold": 60.0}, "lost_nodes": 0}, "60 s; gold 0.02 h"),
        ({"seconds": 60.0, "images_again": 16, "seconds_again": 7.4}, "60 s; 16 images begun again, 7 s"),
    ],
)
def test_a_bill_in_words(bill: dict[str, Any], words: str) -> None:
    assert bill_words(bill, {"spot": 0.5, "head": 0.25}) == words

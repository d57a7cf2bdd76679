"""Real faults on a cluster of three nodes: whatever happens, the same samples, images, soft targets and student."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.chaos.rounds import EPOCHS, FAULTS, Result, make_inputs, moments_of, play

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
# For continuous integration: a lost node, and a lost worker.
_SHORT = {("node_killed", "teach"), ("train_worker", "distill")}
_ROUNDS = [
    pytest.param(fault, moment, marks=pytest.mark.short if (fault, moment) in _SHORT else ())
    for fault in FAULTS
    for moment in moments_of(fault)
]


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def undisturbed(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Result:
    result = play(job, tmp_path_factory.mktemp("undisturbed") / "round")
    assert (result.redone, result.lost_nodes, result.errors, result.epochs) == (0, 0, [], EPOCHS)
    return result


@pytest.mark.parametrize(("fault", "moment"), _ROUNDS)
def test_a_fault_changes_nothing_but_the_time(fault: str, moment: str, job, undisturbed, tmp_path: Path) -> None:
    result = play(job, tmp_path / "round", fault, moment, count=2)
    assert result.hashes == undisturbed.hashes
    assert result.student.keys() == undisturbed.student.keys()
    for name, weights in undisturbed.student.items():
        np.testing.assert_allclose(result.student[name], weights, atol=1e-4, err_msg=name)
    assert result.epochs == undisturbed.epochs
    assert result.units == undisturbed.units
    assert result.redone <= 3, "open units, and the open epoch"
    if fault in ("node_killed", "node_drained"):
        assert result.lost_nodes == 1

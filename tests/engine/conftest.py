"""The small real inputs and runs."""

import pytest

from raydistill.engine import reporter
from tests.small_run import *  # noqa: F403 - fixtures


@pytest.fixture
def after_every_step(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Settings with which each step ends in a checkpoint, although writing then takes most of the time."""
    monkeypatch.setattr(reporter, "_LEAST_GAP", 0.0)
    return {"checkpoint_seconds": 1e-9}

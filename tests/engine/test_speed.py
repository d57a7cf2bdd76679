"""Speeds against networks whose calls take known times, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from raydistill.engine import speed
from raydistill.engine.speed import images_per_second, measure_speed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """Seconds so far; with an argument, that many more pass first."""
    now = [100.0]

    def read(passes: float = 0.0) -> float:
        now[0] += passes
        return now[0]

    monkeypatch.setattr(speed.time, "perf_counter", read)
    return read


def test_the_speed_of_calls_of_known_length(clock):
    found = measure_speed(lambda batch: clock(0.01 + 0.002 * len(batch)), np.zeros((1, 2)))
    assert found.p50_milliseconds == pytest.approx(12)
    assert found.p95_milliseconds == pytest.approx(12)
    assert (found.batch_size, found.images_per_second) == (128, pytest.approx(128 / 0.266))


def test_the_first_call_counts_only_where_it_is_the_only_one(clock):
    lengths = iter([1.4, *[0.01] * 1000])
    assert measure_speed(lambda batch: clock(next(lengths)), np.zeros((1, 2))).p95_milliseconds == pytest.approx(10)
    assert measure_speed(lambda batch: clock(2.0), np.zeros((1, 2))).p50_milliseconds == pytest.approx(2000)


@pytest.mark.parametrize("one", [1e-5, 1e-3, 0.05, 0.4, 1.2, 2.9, 70.0])
@pytest.mark.parametrize("fixed", [0.0, 0.02, 5.0])
def test_a_measurement_ends_after_seconds_or_one_call(clock, one, fixed):
    class Slow(nn.Module):
        def forward(self, images: torch.Tensor) -> None:
            clock(fixed + one * len(images))

    started = clock()
    measure_speed(lambda batch: clock(fixed + one * len(batch)), np.zeros((1, 2)))
    assert clock() - started <= max(3.5, fixed + one) + 1e-9
    started = clock()
    rate = images_per_second(Slow(), 4, torch.device("cpu"))
    assert clock() - started <= max(3.5, 2 * (fixed + one)) + 1e-9
    assert 1 / (fixed + one) * 0.999 <= rate <= 1 / one * 1.001

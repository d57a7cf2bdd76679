"""How fast a network is on this machine: how long one image takes, and how many go through in a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BATCHES = (1, 8, 32, 128)
_ALONE_SECONDS, _BATCH_SECONDS, _FEWEST = 1.0, 0.5, 3


@dataclass(frozen=True)
class Speed:
    """Milliseconds for one image alone, at the median and at the 95th percentile of calls; images a second at the batch
    size, of those tried, that gives most."""

    p50_milliseconds: float
    p95_milliseconds: float
    images_per_second: float
    batch_size: int


def measure_speed(run: Callable[[np.ndarray], object], image_1: np.ndarray) -> Speed:
    """`image_1` is one input with its batch dimension. Takes about three seconds."""
    alone = _seconds_of_calls(run, image_1, _ALONE_SECONDS)
    rates = {1: 1 / float(np.mean(alone))}
    for size in BATCHES[1:]:
        calls = _seconds_of_calls(run, np.repeat(image_1, size, axis=0), _BATCH_SECONDS)
        rates[size] = size / float(np.mean(calls))
    best = max(rates, key=rates.__getitem__)
    p50, p95 = (float(1000 * q) for q in np.quantile(alone, (0.5, 0.95)))
    return Speed(p50, p95, rates[best], best)


def _seconds_of_calls(run: Callable[[np.ndarray], object], batch: np.ndarray, seconds: float) -> list[float]:
    run(batch)  # the first call plans, allocates and compiles
    calls: list[float] = []
    while sum(calls) < seconds or len(calls) < _FEWEST:
        started = time.perf_counter()
        run(batch)
        calls.append(time.perf_counter() - started)
    return calls

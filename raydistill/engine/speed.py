"""Latency and throughput of a network on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

BATCHES = (1, 8, 32, 128)
_SECONDS, _ALONE_SECONDS, _BATCH_SECONDS = 3.0, 1.0, 0.5
_USUAL_BATCH = 32


@dataclass(frozen=True)
class Speed:
    """Milliseconds for a single image, the median and the 95th percentile of calls; images a second at the fastest
    batch size of those tried."""

    p50_milliseconds: float
    p95_milliseconds: float
    images_per_second: float
    batch_size: int


def measure_speed(run: Callable[[np.ndarray], object], image_1: np.ndarray) -> Speed:
    """`image_1` is one input with its batch dimension. It takes about three seconds or one call, whichever is longer,
    and skips batch sizes that would take longer than the rest of that time."""
    deadline = time.perf_counter() + _SECONDS
    alone = _seconds_of_calls(run, image_1, _ALONE_SECONDS, deadline)
    rates = {1: 1 / float(np.mean(alone))}
    for size in BATCHES[1:]:
        if time.perf_counter() + 2 * size / max(rates.values()) > deadline:
            break
        calls = _seconds_of_calls(run, np.repeat(image_1, size, axis=0), _BATCH_SECONDS, deadline)
        rates[size] = size / float(np.mean(calls))
    best = max(rates, key=rates.__getitem__)
    p50, p95 = (float(1000 * q) for q in np.quantile(alone, (0.5, 0.95)))
    return Speed(p50, p95, rates[best], best)


@torch.inference_mode()
def images_per_second(network: nn.Module, size: int, device: torch.device) -> float:
    """The speed of a network in eval mode, in batches of 32 random images, or in smaller ones if 32 take longer than a
    second."""

    def run(images: torch.Tensor) -> None:
        network(images)
        if device.type == "cuda":
            torch.cuda.synchronize()

    network.eval()
    images, deadline = torch.rand(_USUAL_BATCH, 3, size, size, device=device), time.perf_counter() + _SECONDS
    alone = min(_seconds_of_calls(run, images[:1], 0, deadline))
    batch = images[: int(_ALONE_SECONDS / alone)]
    if len(batch) < 2:
        return 1 / alone
    return len(batch) / float(np.mean(_seconds_of_calls(run, batch, _ALONE_SECONDS, deadline)))


def _seconds_of_calls(run: Callable[[Any], object], batch: Any, seconds: float, deadline: float) -> list[float]:
    """Seconds of each call, for this many seconds, at least one. The first call, which allocates and compiles, counts
    only if a second one would not end before the deadline."""
    calls: list[float] = []
    started = begun = time.perf_counter()
    while True:
        run(batch)
        ended = time.perf_counter()
        calls.append(ended - begun)
        enough = len(calls) > 1 and ended - started >= seconds
        if enough or ended + calls[-1] > deadline:
            return calls[1:] or calls
        begun = ended

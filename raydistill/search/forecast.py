"""Time and cost of a search, extrapolated from a few steps of the job's own student."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time

import numpy as np
import torch

from raydistill.config import RunConfig
from raydistill.engine.batches import DistillJob
from raydistill.engine.loop import distill_loop
from raydistill.engine.workers import Worker
from raydistill.escaping import counted
from raydistill.search.display import minutes

_MEASURED_STEPS, _WARM_UP_STEPS, _MOST_SECONDS = 8, 2, 20.0


def seconds_per_step(job: DistillJob, threads: int) -> float | None:
    """Median seconds of a training step, from a few steps in this process that write nothing; None if they fail."""
    ticks: list[float] = []
    started = time.monotonic()

    def count(step: int) -> bool:
        ticks.append(time.monotonic())
        if len(ticks) > _WARM_UP_STEPS + _MEASURED_STEPS or (len(ticks) > 1 and ticks[-1] - started > _MOST_SECONDS):
            raise TimeoutError  # enough steps
        return False

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The trial of these settings will report an error such as too little memory; other trials may work.
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Exception):
        distill_loop(dataclasses.replace(job, path=f"{folder}/steps"), Worker(0, 1, device, threads, count))
    if device == "cuda":
        torch.cuda.empty_cache()  # for the trials
    gaps = np.diff(ticks)
    return float(np.median(gaps[min(_WARM_UP_STEPS, len(gaps) - 1) :])) if len(gaps) else None


def forecast_lines(config: RunConfig, left: int, together: int, each: float | None, before: float) -> list[str]:
    """The forecast in words: `left` trials of `each` seconds, then for each new seed two trainings and `before` seconds
    of earlier stages."""
    lines = [f"tune: {left} trials, {together} at a time"]
    seeds = config.tune.confirm_seeds
    confirming = f"; then {2 * seeds} trainings with {counted(seeds, 'new seeds')} to confirm" if seeds else ""
    if each is None:
        return [f"{lines[0]}{confirming}: time unknown, because the first steps of the job's own student failed"]
    trials, again = math.ceil(left / together) * each, seeds * (2 * each + before)
    early = "" if config.tune.pruner == "none" else "; less if trials end early"
    lines[0] += f", of about {each:.0f} s each: about {minutes(trials)}{early}"
    if seeds:
        stages = f", {before:.0f} s of earlier stages for each" if before else ""
        lines.append(f"tune:{confirming[1:]}{stages}: about {minutes(again)}")
    cost = search_cost(config, trials + again)
    money = "" if cost is None else f", {cost:.2f} at {config.cluster.price_per_hour:g} an hour"
    return [*lines, f"tune: about {minutes(trials + again)} in all{money}"]


def search_cost(config: RunConfig, seconds: float) -> float | None:
    """The cost of all machines for this time by the clock."""
    return None if config.cluster.price_per_hour is None else config.cluster.price_per_hour * seconds / 3600

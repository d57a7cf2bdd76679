"""Counters beside Ray's own, in its dashboards and for Prometheus, where Ray runs. Nothing here starts or loads Ray.

The system that keeps them adds up the processes: each counts its own work.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from importlib import import_module
from typing import Any

COUNTERS = {
    "raydistill_images_prepared": "Images that prepare has decoded or refused",
    "raydistill_teacher_calls": "Calls of the teacher",
    "raydistill_teacher_views": "Views that the teacher has seen",
    "raydistill_bytes_read": "Bytes of whole files that were read: pictures, shards, soft targets, weights",
    "raydistill_bytes_written": "Bytes of the files that were written",
    "raydistill_seconds_waited_for_data": "Seconds in which training waited for its next batch",
}


_STAGE_DIRECTORY = re.compile(r"/([a-z_]+)-[0-9a-f]{12}/")


def count(name: str, amount: float, stage: str) -> None:
    """Add to a counter of COUNTERS, tagged with the stage and with Ray's id of the job. Does nothing outside Ray."""
    ray = sys.modules.get("ray")
    if amount > 0 and ray is not None and ray.is_initialized():
        _counter(name).inc(amount, {"stage": stage, "job": ray.get_runtime_context().get_job_id()})


def count_bytes(what: str, place: str, size: int) -> None:
    """Count what was `read` or `written` for the stage in whose directory the place lies."""
    count(f"raydistill_bytes_{what}", size, stage_of(place))


def stage_of(place: str) -> str:
    found = _STAGE_DIRECTORY.search(f"{place}/")
    return found[1] if found else "other"


@lru_cache
def _counter(name: str) -> Any:
    return import_module("ray.util.metrics").Counter(name, COUNTERS[name], ("stage", "job"))

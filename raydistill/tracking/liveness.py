"""Whether the process of an MLflow run still exists, by its signs of life; ends runs whose process is gone."""

from __future__ import annotations

import re
import time
from typing import Any

from raydistill.runtime.processes import is_running, process_name

_SILENT_SECONDS = 15 * 60.0  # room for clocks that differ, and for a server that was away for a while


def signs_of_life() -> dict[str, str]:
    """Tags of a run that this process works on. `alive` is in seconds since the epoch."""
    return {"raydistill.process": process_name(), "raydistill.alive": f"{time.time():.0f}"}


def is_gone(run: Any) -> bool | None:
    """Whether the run's process has ended or, on another machine, has shown no sign of life for so long that it counts
    as ended. None if the run names no process, or has no usable sign of life."""
    process, alive = (run.data.tags.get(f"raydistill.{tag}") for tag in ("process", "alive"))
    if process is None:
        return None
    running = is_running(process)
    if running is not None:
        return not running
    seconds = re.fullmatch(r"[0-9]{1,12}(\.[0-9]+)?", alive or "")  # another program may write there, too
    return seconds is not None and time.time() - float(seconds[0]) > _SILENT_SECONDS


def end_children(client: Any, experiment: str, parent: str) -> None:
    """Mark the open child runs of a run as killed."""
    query = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
    for run in client.search_runs([experiment], query):
        client.set_terminated(run.info.run_id, "KILLED")


def end_dead(client: Any, experiment: str) -> None:
    """Mark open runs whose process is gone as killed; this job's run is opened again."""
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'"):
        if is_gone(run):
            end_children(client, experiment, run.info.run_id)
            client.set_terminated(run.info.run_id, "KILLED")

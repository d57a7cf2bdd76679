"""The records of a running `distill`: one for each epoch, and the numbers of steps done and lost."""

from __future__ import annotations

import json

from pydantic import BaseModel, NonNegativeInt

from raydistill.storage.filesystems import open_filesystem, write_bytes
from raydistill.storage.state import EpochRecord, read_state


class _Progress(BaseModel):
    step: NonNegativeInt
    lost_steps: NonNegativeInt = 0


def write_epoch(path: str, record: dict[str, float]) -> None:
    write_bytes(_epoch_file(path, int(record["epoch"])), json.dumps(record).encode())


def read_epoch(path: str, epoch: int) -> dict[str, float] | None:
    return read_state(_epoch_file(path, epoch), EpochRecord, any_float=True)


def read_epochs(path: str, most: int | None = None) -> list[dict[str, float]]:
    """The records of all epochs in a student's directory, or of those up to `most`, in order."""
    records = list[dict[str, float]]()
    while len(records) != most and (record := read_epoch(path, len(records) + 1)) is not None:
        records.append(record)
    return records


def drop_epochs_after(path: str, step: int) -> None:
    for record in reversed(read_epochs(path)):  # a killed command leaves no gap
        if record["step"] > step:
            fs, file = open_filesystem(_epoch_file(path, int(record["epoch"])))
            fs.remove_file(file)


def _epoch_file(path: str, epoch: int) -> str:
    return f"{path}/epochs/{epoch:05d}.json"


def seconds_between_looks(path: str) -> float:
    """How often the progress is written, and read. In a bucket each time costs money."""
    return 5.0 if "://" in path else 1.0


def write_progress(path: str, step: int, lost_steps: int) -> None:
    """Store the last step, and how many steps were repeated in all."""
    write_bytes(f"{path}/progress.json", json.dumps({"step": step, "lost_steps": lost_steps}).encode())


def read_progress(path: str) -> tuple[int, int]:
    """The last values of `write_progress`; zeros before its first call."""
    written = read_state(f"{path}/progress.json", _Progress) or _Progress(step=0)
    return written.step, written.lost_steps


def note_lost_steps(path: str, step: int) -> int:
    """Count the steps after `step`, the checkpoint to resume from, as lost. Returns all lost steps so far."""
    came_to, lost_steps = read_progress(path)
    if came_to > step:
        lost_steps += came_to - step
        write_progress(path, step, lost_steps)
    return lost_steps

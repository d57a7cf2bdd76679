"""One trial of `tune`, in the process that Ray Tune gives it: it trains a student and reports each epoch."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ray import tune
from rich.console import Console

from raydistill.cluster.plan import Plan
from raydistill.engine.batches import DistillJob
from raydistill.engine.checkpoints import latest_step
from raydistill.engine.records import read_epochs
from raydistill.errors import RaydistillError
from raydistill.models.student import read_student, split_logits
from raydistill.results import StudentCheckpoint
from raydistill.runtime.progress import Progress
from raydistill.stages.distill import distill_student
from raydistill.storage.directory import StageDirectory, read_seconds
from raydistill.storage.lease import held
from raydistill.storage.state import EpochRecord, needed_state, result_of


@dataclass(frozen=True)
class TrialWork:
    """What the process that trains a trial receives."""

    job: DistillJob
    directory: StageDirectory
    plan: Plan
    objectives: tuple[str, ...]


def run_trial(config: dict[str, Any]) -> None:
    """Tune's trainable: train one student, in this process or on Ray Train workers, and report each epoch.

    It reports a failure and does not raise it, so that Tune retries only a lost process.
    """
    # How long the previous trial, which Tune has ended, may stay in this process, for example to write a checkpoint.
    # With Tune's own 2 s the next trial fails, and Tune waits for its end for ever.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "600"
    started, stopped = time.monotonic(), False

    def report(record: dict[str, Any]) -> None:
        nonlocal stopped
        try:
            tune.report({"seconds": time.monotonic() - started, **record})
        except SystemExit:
            stopped = True
            raise

    try:
        result = _train(pickle.loads(config["work"]), report)  # noqa: TID251 - what this command sent
    except Exception as error:
        result = {"failed": _reason(error)}
    if stopped:  # Tune has ended the trial; a failure during the exit replaced its SystemExit
        sys.exit(0)
    report(result)


def _reason(error: Exception) -> str:
    if isinstance(error, RaydistillError):
        return str(error)
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def _train(work: TrialWork, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train a trial's student, or find it trained, and report its epochs. Returns the last record with all objectives.

    `shipped` of a record holds the objectives of the epoch that would ship if training ended there. It reports earlier
    epochs again, because a killed search may have missed them.
    """
    job, directory, last = work.job, work.directory, work.job.config.distill.epochs
    records: dict[int, dict[str, float]] = {}

    def shipped(record: dict[str, float]) -> dict[str, float]:
        records[int(record["epoch"])] = record
        ships = records[int(record.get("kept_epoch", record["epoch"]))]
        return {name: ships[name] for name in work.objectives if name in record}

    def on_epoch(record: dict[str, float]) -> None:
        of_shipped = shipped(record)
        if record["epoch"] < last and "not_risen_since" not in record:  # the result has the last
            report({**record, "shipped": of_shipped})

    quiet = Progress(Console(quiet=True))
    with held(directory, quiet.line) as is_to_do:  # a run of the same settings may train it too
        if is_to_do:
            for record in read_epochs(directory.path, latest_step(directory.path) // job.steps_per_epoch):
                on_epoch(record)
            started = time.monotonic()
            student = distill_student(job, directory, work.plan, quiet, on_epoch)
            directory.write_bill({"seconds": time.monotonic() - started})
    if not is_to_do:
        student = result_of(directory.done() or {}, directory.path, StudentCheckpoint)
        for record in read_epochs(directory.path):
            on_epoch({**record, "trained_before": True})
    last = student.steps // job.steps_per_epoch
    record = needed_state(f"{directory.path}/epochs/{last:05d}.json", EpochRecord, any_float=True)
    of_shipped = shipped(record) | _measures(work, student, record)
    result = {**record, "shipped": of_shipped, "finished": True}
    return result if is_to_do else {**result, "seconds": read_seconds(directory.path)}


def _measures(work: TrialWork, student: StudentCheckpoint, record: dict[str, float]) -> dict[str, float]:
    """The objectives that training does not measure, all on val."""
    wanted = set(work.objectives) - set(record)
    found = {"parameters": float(student.num_parameters)}
    if wanted <= set(found):
        return found
    from raydistill.engine.measures import Answers, measures
    from raydistill.engine.speed import images_per_second

    config, samples = work.job.config, work.job.samples
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = read_student(student.path, config.student)[0].to(device)
    if "milliseconds_per_image" in wanted:
        found["milliseconds_per_image"] = 1000 / images_per_second(network, network.preprocessing.size, device)
    if any(name.startswith("val_") for name in wanted):
        logits_NC, labels_N = split_logits(network, samples, "val", device, config.evaluate.batch_size)
        answers = Answers.of(logits_NC, labels_N)
        all_measures = measures(answers, labels_N, samples.classes, config.evaluate.calibration_bins)
        found |= {f"val_{name}": float(all_measures[name]) for name in ("balanced_accuracy", "top5", "ece")}
    return found

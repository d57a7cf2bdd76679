"""distill: train the student on labels and soft targets, and write its weights."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from raydistill.cluster.plan import Plan
from raydistill.config import RunConfig
from raydistill.data.prompts import refuse_unknown
from raydistill.data.targets import UNLABELLED, read_labels
from raydistill.engine.batches import DistillJob
from raydistill.engine.checkpoints import drop_checkpoints, latest_checkpoint, latest_step
from raydistill.engine.fresh_stream import FreshStream
from raydistill.engine.loop import distill_loop
from raydistill.engine.precision import described
from raydistill.engine.records import (
    drop_epochs_after,
    note_lost_steps,
    read_epoch,
    read_epochs,
    read_progress,
    seconds_between_looks,
)
from raydistill.engine.workers import run_workers
from raydistill.errors import DataError
from raydistill.escaping import counted
from raydistill.execution import Execution
from raydistill.identity import distill_directory, student_pin
from raydistill.losses.task import class_weights
from raydistill.models.student import build_student, has_batch_norm, write_student
from raydistill.results import Outcome, StudentCheckpoint
from raydistill.runtime.progress import Progress
from raydistill.stages.generate import label_weights
from raydistill.storage.directory import StageDirectory
from raydistill.storage.state import result_of

logger = logging.getLogger(__name__)


def distill_student(
    job: DistillJob,
    directory: StageDirectory,
    plan: Plan,
    progress: Progress,
    on_epoch: Callable[[dict[str, float]], None],
    title: str = "distill",
) -> StudentCheckpoint:
    """Train the student, in this process or on Ray Train workers, and write its weights.

    `on_epoch` gets the record of each epoch. If the loop runs in this process, an error that `on_epoch` raises ends the
    training after that epoch's checkpoint. A killed run resumes from its last checkpoint.
    Raises DataError: too few images.
    """
    _refuse_too_few_images(job)
    settings = job.config.distill
    if not job.samples.num_labelled["val"]:
        for is_set, key, instead in (
            (settings.keep == "best", "keep=best", "keep=last"),
            (settings.patience is not None, f"patience={settings.patience}", "patience=null"),
        ):
            if is_set:
                raise DataError(
                    f"distill.{key} needs labelled val images, and there are none; add some, or set distill.{instead}"
                )
    job = _with_class_weights(job)
    directory.begin()
    start = latest_step(job.path)
    note_lost_steps(job.path, start)
    drop_epochs_after(job.path, start)  # otherwise `_following` would report them as done
    stream = FreshStream(job, plan) if job.config.views.per_image == "fresh" and job.head is not None else None
    in_process = plan.train_workers == 0
    with _following(job, start, progress, _nothing if in_process else on_epoch, title):
        record = run_workers(distill_loop, job, plan, stream, on_epoch if in_process else _nothing)
    _, lost_steps = read_progress(job.path)
    again = lost_steps * job.batch_size
    progress.again(title, again, again / record["images_per_second"])
    epochs = read_epochs(job.path)
    kept_epoch = int(record.get("kept_epoch", record["epoch"]))
    kept = kept_words(job, epochs, kept_epoch)
    precision, words = described(settings.precision, student_pin(job.path.rpartition("/")[0], job.config))
    training = {"kept_epoch": kept_epoch, "epochs": len(epochs), "kept": kept, "precision": precision}
    num_parameters = _write_student(job, directory, training)
    val_accuracy = epochs[kept_epoch - 1].get("val_accuracy")
    result = StudentCheckpoint(
        directory.path, val_accuracy, num_parameters, int(record["step"]), job.batch_size, kept_epoch, kept, precision
    )
    progress.line(f"{title:<9} {kept}")
    progress.line(f"{title:<9} trained in {words}")
    directory.finish(asdict(result))
    drop_checkpoints(job.path)
    for run in () if in_process else directory.fs.names(f"{directory.place}/ray"):
        if re.fullmatch(r"[0-9a-f]{32}", run):  # the name that `run_workers` gives a Ray Train run
            directory.fs.remove(f"{directory.place}/ray/{run}")
    directory.fs.remove_if_empty(f"{directory.place}/ray")
    return result


def _nothing(record: dict[str, float]) -> None:
    pass


def _refuse_too_few_images(job: DistillJob) -> None:
    """Only now is the number of training images known: without duplicates, bad files and unlabelled images."""
    config, workers = job.config, job.config.distill.most_workers
    if job.batch_size // workers >= 2:
        return
    if job.batch_size < workers:
        raise DataError(
            f"the student has {counted(job.batch_size, 'images')} to train on, fewer than distill.num_workers="
            f"{workers}; lower it, or add images"
        )
    what = config.student.model
    student = build_student(config.student, len(job.samples.classes))
    if job.head is not None and config.loss.projects_with_batch_norm:
        what = f"loss.projection_head={config.loss.projection_head}"
    elif not has_batch_norm(student):
        return
    raise DataError(
        f"the student has {counted(job.batch_size, 'images')} to train on with {counted(workers, 'workers')}, so some "
        f"get one image a step, and {what} has batch norm, which needs two; add images, or lower distill.num_workers"
    )


def _with_class_weights(job: DistillJob) -> DistillJob:
    """Raises ConfigError: the data lacks a class that is named."""
    asked, samples = job.config.loss.class_weights, job.samples
    if asked is None or not job.config.loss.weighs_classes:
        return job
    num_labelled_C = np.zeros(len(samples.classes), int)
    if asked != "balanced":
        refuse_unknown(asked, samples.classes, "loss.class_weights")
    else:
        for shard in range(len(samples.shards["train"])):
            labels = read_labels(samples, "train", shard)
            if (labels == UNLABELLED).any():
                break  # labelled rows come first
            num_labelled_C += np.bincount(labels, minlength=len(num_labelled_C))
    return replace(job, class_weights=class_weights(asked, samples.classes, num_labelled_C))


def kept_words(job: DistillJob, epochs: list[dict[str, float]], kept_epoch: int) -> str:
    """Which epoch ships and why, in words, and why training stopped before the last one."""
    words, kept = _kept_words(job, epochs, kept_epoch), epochs[kept_epoch - 1]
    if "is_averaged" in kept:
        names = {0.0: "latest", 1.0: "averaged"}
        mine, other = names[kept["is_averaged"]], names[1 - kept["is_averaged"]]
        words += f"; it has the {mine} weights (the {other} ones had {kept[f'val_accuracy_{other}']:.3f})"
    if (since := epochs[-1].get("not_risen_since")) is None:
        return words
    stopped = f"stopped after epoch {len(epochs)} of {job.config.distill.epochs}"
    return f"{stopped}: val has not risen since epoch {int(since)}; {words}"


def _kept_words(job: DistillJob, epochs: list[dict[str, float]], kept_epoch: int) -> str:
    accuracies = {int(e["epoch"]): e["val_accuracy"] for e in epochs if "val_accuracy" in e}
    last, images = len(epochs), job.samples.num_labelled["val"]
    words = f"epoch {kept_epoch} of {job.config.distill.epochs} ships"
    if not accuracies:
        return f"{words}: nothing was measured on val"
    words += f": {accuracies[kept_epoch]:.3f} on val"
    best = max(accuracies, key=lambda epoch: (accuracies[epoch], epoch))
    if kept_epoch == best:
        behind = "" if kept_epoch == last else f"; the last epoch had {accuracies[last]:.3f}"
        of = f"the best of {len(accuracies)} measured epochs" if len(accuracies) > 1 else "the only epoch measured"
        return f"{words}, {of}{behind}"
    words += f", although epoch {best} had {accuracies[best]:.3f}"
    if job.config.distill.keep == "last":
        return f"{words} (distill.keep=last)"
    return f"{words}: {images} val images do not show that it is better (distill.keep=best ships the best epoch anyway)"


def _write_student(job: DistillJob, directory: StageDirectory, training: dict[str, object]) -> int:
    checkpoint = latest_checkpoint(job.path)
    assert checkpoint is not None, "the loop ends with a checkpoint"
    now = "ema." if job.config.distill.ema_decay else "model.student."
    prefix = ("kept.student." if job.looks_at_val else now) + "body.network."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint[0].items() if k.startswith(prefix)}
    # Build it as for training: the number of position embeddings can depend on the weights and the image size.
    student = build_student(job.config.student, len(job.samples.classes))
    student.network.load_state_dict(weights)
    image = {"size": job.config.images.size, "fit": job.config.images.fit}
    for name, data in write_student(student, job.config.student, job.samples.classes, image, training).items():
        directory.write(name, data)
    return sum(p.numel() for p in student.parameters())


@contextlib.contextmanager
def _following(
    job: DistillJob, start: int, progress: Progress, on_epoch: Callable[[dict[str, float]], None], title: str
) -> Iterator[None]:
    """Show progress and call `on_epoch` from the files that the loop writes, until the block ends. The loop starts at
    step `start`."""
    at, epoch, ended = start, start // job.steps_per_epoch, threading.Event()
    with progress.task(title, job.total_steps, "steps", done=start) as advance:

        def look() -> None:
            nonlocal at, epoch
            step, _ = read_progress(job.path)
            while step >= (epoch + 1) * job.steps_per_epoch and (record := read_epoch(job.path, epoch + 1)):
                epoch += 1
                on_epoch(record)
                advance(max(int(record["step"]) - at, 0), _note(record))
                at = max(int(record["step"]), at)
            advance(max(step - at, 0))
            at = max(step, at)

        def follow() -> None:
            trouble, last_look = "", False
            while not last_look:
                last_look = ended.wait(seconds_between_looks(job.path))
                try:
                    look()
                    trouble = ""
                except Exception as error:  # storage does not answer; training may continue, so look again later
                    if str(error) != trouble:
                        logger.warning("%s: cannot read the progress for now (%s)", title, trouble := str(error))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _note(record: dict[str, float]) -> str:
    accuracy = f", val {record['val_accuracy']:.3f}" if "val_accuracy" in record else ""
    waits = f", {record.get('waits_for_data', 0):.0%} waiting for data"
    return f"epoch {int(record['epoch'])}, loss {record['loss']:.3f}{accuracy}{waits}"


def distill_job(config: RunConfig, outcome: Outcome) -> tuple[DistillJob, StageDirectory]:
    """The job of `distill` from the results of the earlier stages, and the student's directory. It has a teacher only
    if a loss term needs one."""
    samples, generated, taught = outcome.samples, outcome.generated, config.loss.needs_teacher
    assert samples is not None, "prepare has run"
    directory = distill_directory(config, samples)
    job = DistillJob(
        config,
        samples,
        directory.path,
        head=outcome.adapted.path if taught and outcome.adapted is not None else None,
        targets=outcome.directories.get("teach") if taught else None,
        generated=None if generated is None else generated.samples,
        generated_targets=outcome.directories.get("teach_generated") if taught else None,
        weights=None if generated is None else label_weights(config, generated),
    )
    return job, directory


def distill(execution: Execution) -> None:
    samples, progress = execution.samples, execution.progress
    job, directory = distill_job(execution.config, execution.outcome)
    if job.head is None and samples.num_labelled["train"] < samples.num_rows("train"):
        unused = samples.num_rows("train") - samples.num_labelled["train"]
        progress.line(f"distill   {unused} unlabelled images are not used: the loss has no teacher")

    def work(record: Any) -> None:
        distill_student(job, directory, execution.plan(), progress, lambda m: record.log(m, int(m["step"])))

    execution.outcome.student = result_of(execution.result(directory, work), directory.path, StudentCheckpoint)

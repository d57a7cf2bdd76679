"""evaluate: measure the student and its teacher.

Shapes: N images, C classes, R rows of a part.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet as pq

from raydistill.cluster.plan import Plan
from raydistill.config import SHARD_BYTES, RunConfig
from raydistill.data.sample import SampleSet
from raydistill.data.targets import labels_of
from raydistill.engine.measures import (
    Answers,
    agreement,
    calibration_error,
    fitted_temperature,
    measures,
    probability_at,
)
from raydistill.engine.predictions import PredictionPass, kept_columns, predictions, student_logits
from raydistill.engine.speed import images_per_second
from raydistill.execution import Execution
from raydistill.identity import evaluate_directory, held_out_directory
from raydistill.models.student import read_student
from raydistill.models.teacher import load_teacher
from raydistill.results import PREDICTIONS_FILE, AdaptedTeacher, Report, StudentCheckpoint
from raydistill.runtime.progress import Progress
from raydistill.storage.directory import StageDirectory
from raydistill.storage.filesystems import write_file
from raydistill.storage.state import result_of
from raydistill.storage.tables import values

# From so many val and test images on, actors wait less for their start than they save.
_MANY = 20_000


def evaluate_student(
    config: RunConfig,
    samples: SampleSet,
    adapted: AdaptedTeacher | None,
    student: StudentCheckpoint,
    directory: StageDirectory,
    plan: Plan | None,
    progress: Progress,
) -> Report:
    """Measure student and teacher on val and on test: in a pool of actors or, without a plan, in this process.

    This process holds some numbers of each image, and the predictions for one shard.
    """
    directory.begin()
    splits = tuple(split for split in ("val", "test") if samples.num_rows(split))
    features = {} if adapted is None else {"val": adapted.features, "test": held_out_directory(config, samples).path}
    head = None if adapted is None else adapted.path
    wanted = PredictionPass(config, samples, splits, student.path, head, features)
    with TemporaryDirectory() as folder, progress.task("evaluate", _count(samples), "images") as advance:
        seen = {split: _Seen(f"{folder}/{split}") for split in splits}

        def kept() -> Iterator[pa.Table]:
            for table in predictions(wanted, plan):
                seen[values(table["split"])[0]].add(table)
                advance(len(table))
                yield kept_columns(table)

        whole = f"{folder}/{PREDICTIONS_FILE}"
        _write(kept(), whole)
        write_file(f"{directory.path}/{PREDICTIONS_FILE}", lambda place: shutil.copyfile(whole, place))
        measured, agreements, temperature = _measured(config, samples.classes, seen)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = read_student(student.path, config.student)[0].to(device)
    teacher_parameters, teacher_speed = (None, None) if adapted is None else _teacher_cost(config, device)
    report = Report(
        path=directory.path,
        student=measured["student"],
        teacher=measured.get("teacher"),
        agreement=agreements or None,
        temperature=temperature,
        student_parameters=student.num_parameters,
        teacher_parameters=teacher_parameters,
        student_images_per_second=images_per_second(network, network.preprocessing.size, device),
        teacher_images_per_second=teacher_speed,
        device=torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        kept=student.kept,
    )
    directory.write_json("report.json", asdict(report))
    directory.finish(asdict(report))
    return report


def _count(samples: SampleSet) -> int:
    return samples.num_rows("val") + samples.num_rows("test")


class _Seen:
    """The predictions for a split: the numbers of each image that measures need and, in a file, the student's logits,
    since every temperature that is tried reads them all."""

    def __init__(self, place: str) -> None:
        self._tables, self._place, self._num_classes = list[pa.Table](), place, 0

    def add(self, table: pa.Table) -> None:
        names = [n for n in table.column_names if n.endswith(("label", "_class", "_probability", "_in_top5"))]
        self._tables.append(table.select(names).take(np.arange(len(table))))  # a copy: the others' memory may go
        logits_RC = student_logits(table)
        self._num_classes = logits_RC.shape[1]
        with open(self._place, "ab") as file:
            file.write(logits_RC.tobytes())

    def answers(self) -> tuple[dict[str, Answers], np.ndarray]:
        """Of student and teacher, and the (N,) labels."""
        table = pa.concat_tables(self._tables)
        found = {}
        for who in ("student", "teacher"):
            columns = [table[f"{who}_{name}"] for name in ("class", "probability", "in_top5")]
            if not columns[0].null_count:
                found[who] = Answers(*(np.array(column.to_numpy()) for column in columns))
        return found, labels_of(table)

    def logits(self) -> np.ndarray:
        """(N, C), to be read in parts."""
        return np.memmap(self._place, np.float32, "c").reshape(-1, self._num_classes)


def _measured(
    config: RunConfig, classes: tuple[str, ...], seen: dict[str, _Seen]
) -> tuple[dict[str, dict[str, Any]], dict[str, float], float | None]:
    """The measures of student and teacher by split, their agreement, and the student's temperature, fitted on val."""
    bins, temperature = config.evaluate.calibration_bins, None
    measured: dict[str, dict[str, Any]] = {"student": {}}
    agreements = {}
    for split, of_split in seen.items():
        answers, labels_N = of_split.answers()
        for who, own in answers.items():
            measured.setdefault(who, {})[split] = measures(own, labels_N, classes, bins)
        if "teacher" in answers:
            agreements[split] = agreement(answers["student"].class_N, answers["teacher"].class_N)
        if split == "val":
            temperature = fitted_temperature(of_split.logits(), labels_N)
        if temperature is not None:
            calibrated_N = probability_at(of_split.logits(), temperature)
            right_N = answers["student"].class_N == labels_N
            measured["student"][split]["ece_calibrated"] = calibration_error(calibrated_N, right_N, bins)
    return measured, agreements, temperature


def _write(tables: Iterator[pa.Table], place: str) -> None:
    groups = _grouped(tables)
    first = next(groups, pa.table({}))
    with pq.ParquetWriter(place, first.schema) as writer:
        for group in itertools.chain([first], groups):
            writer.write_table(group)


def _grouped(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Tables of some SHARD_BYTES: a file of many small row groups is slow to read."""
    waiting, size = list[pa.Table](), 0
    for table in tables:
        waiting.append(table)
        size += table.nbytes
        if size >= SHARD_BYTES:
            yield pa.concat_tables(waiting)
            waiting, size = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def _teacher_cost(config: RunConfig, device: torch.device) -> tuple[int, float | None]:
    """The backbone's parameters, and its images a second with evaluate.time_teacher; of a committee, of all its members
    one after the other."""
    assert config.teacher is not None
    parameters, seconds = 0, 0.0
    for member in config.teacher.members:
        teacher = load_teacher(member).backbone.to(device)
        parameters += sum(parameter.numel() for parameter in teacher.parameters())
        if config.evaluate.time_teacher:
            seconds += 1 / images_per_second(teacher, teacher.preprocessing.size, device)
    return parameters, 1 / seconds if seconds else None


def evaluate(execution: Execution) -> None:
    config, samples, outcome = execution.config, execution.samples, execution.outcome
    directory = evaluate_directory(config, samples)

    def work(_: Any) -> None:
        assert outcome.student is not None
        plan = execution.plan_of_many() if _count(samples) >= _MANY else None
        is_stored = config.teacher is not None and config.teacher.stored is not None  # without answers on val and test
        adapted = None if is_stored else outcome.adapted
        evaluate_student(config, samples, adapted, outcome.student, directory, plan, execution.progress)

    report = outcome.report = result_of(execution.result(directory, work), directory.path, Report)
    if config.generate is not None:
        without = evaluate_directory(config.model_copy(update={"generate": None}), samples).done()
        other = None if without is None else result_of(without, without["path"], Report)
        outcome.without_generated = other if other and other.student.keys() == report.student.keys() else None
    metrics = {
        f"{who}_{split}_{name}": float(values[split][name])
        for who, values in (("student", report.student), ("teacher", report.teacher or {}))
        for split in values for name in ("accuracy", "top5", "ece")
    }  # fmt: skip
    metrics |= {f"agreement_{split}": share for split, share in (report.agreement or {}).items()}
    parent, student = execution.tracker.parent, outcome.directories["distill"]
    parent.log(metrics)
    parent.note({stage: path.rpartition("/")[2] for stage, path in outcome.directories.items()})
    assert outcome.student is not None
    parent.note({"student_precision": outcome.student.precision})
    if outcome.adapted is not None:
        parent.note({"teacher_precision": outcome.adapted.precision})
    if "://" not in report.path:
        parent.files([report.path], "evaluate")
        parent.files([f"{student}/student.safetensors", f"{student}/student.json"], "student")

"""The tables of the report.

Shape: C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.filesize import decimal

from raydistill.data.sample import SampleSet
from raydistill.data.targets import read_labels
from raydistill.pages.templates import Table
from raydistill.results import Exported, GeneratedImages, Report

_MOST_CLASSES, _MOST_PAIRS = 40, 15
_MOST_IN_MATRIX = 30  # so that the pairs that `evaluate` keeps are all of them
_FEWEST_FOR_TOP5 = 11  # of ten classes five are half


def measures(report: Report, baselines: Mapping[str, Report], num_classes: int) -> Table:
    """By split, the student, its teacher and the baselines."""
    networks = {"student": report.student, "teacher": report.teacher or {}}
    networks |= {arm: other.student for arm, other in baselines.items()}
    columns = {"balanced accuracy": "balanced_accuracy", "top-5": "top5", "calibration error": "ece"}
    if num_classes < _FEWEST_FOR_TOP5:
        del columns["top-5"]
    rows = [
        [
            f"{who}, {split}", f"{m['images']:,}", f"{m['accuracy']:.3f}", "{:.3f} to {:.3f}".format(*m["interval"]),
            *(f"{m[key]:.3f}" for key in columns.values()),
        ]
        for split in report.student for who, splits in networks.items() if (m := splits.get(split))
    ]  # fmt: skip
    return Table(["", "images", "accuracy", "95 % interval", *columns], rows)


def by_class(report: Report, samples: SampleSet, main: str) -> Table:
    """By class its labelled images in each split, the recall of student and teacher on `main`, and the class that it is
    most often taken for; the worst first, and those without images last."""
    train_C, measured, taken_for = _train_images(samples), report.student[main], dict[str, str]()
    teachers = (report.teacher or {}).get(main, {}).get("per_class")
    for pair in measured["confused"]:  # the most frequent first
        taken_for.setdefault(pair["true"], f"{pair['taken_for']} ({pair['images']:,})")
    recalls = [measured["per_class"][name]["recall"] for name in samples.classes]
    order = sorted(range(len(recalls)), key=lambda k: 2.0 if recalls[k] is None else recalls[k])
    rows = []
    for k in order[:_MOST_CLASSES]:
        name, teacher = samples.classes[k], None if teachers is None else teachers[samples.classes[k]]["recall"]
        images = [train_C[k], *(of_split["per_class"][name]["images"] for of_split in report.student.values())]
        rows.append([
            name, *(f"{count:,}" for count in images), {"share": recalls[k], "mark": teacher},
            *([] if teachers is None else ["" if teacher is None else f"{teacher:.3f}"]), taken_for.get(name, ""),
        ])  # fmt: skip
    titles = ["class", "train", *report.student, "recall", *([] if teachers is None else ["of the teacher"])]
    return Table([*titles, "most often taken for"], rows)


def _train_images(samples: SampleSet) -> np.ndarray:
    """The labelled train images (C,) of each class."""
    counts_C = np.zeros(len(samples.classes), int)
    for shard in range(len(samples.shards["train"])):
        labels = read_labels(samples, "train", shard)
        counts_C += np.bincount(labels[labels >= 0], minlength=len(counts_C))
    return counts_C


def confusion_matrix(report: Report, main: str) -> list[tuple[str, list[tuple[int, float]]]]:
    """By true class, the images of each answer and their share. Empty if there are too many classes to show."""
    classes = report.student[main]["per_class"]
    pairs = {(pair["true"], pair["taken_for"]): pair["images"] for pair in report.student[main]["confused"]}
    if len(classes) > _MOST_IN_MATRIX:
        return []
    found = []
    for true, one in classes.items():
        counts = [pairs.get((true, name), 0) for name in classes]
        counts[list(classes).index(true)] = one["images"] - sum(counts)
        found.append((true, [(count, count / max(one["images"], 1)) for count in counts]))
    return found


def confused(report: Report, main: str) -> Table:
    measured = report.student[main]
    rows = [
        [p["true"], p["taken_for"], f"{p['images']:,}", f"{measured['per_class'][p['true']]['images']:,}"]
        for p in measured["confused"][:_MOST_PAIRS]
    ]
    return Table(["true class", "taken for", "images", "of the class"], rows)


def wanted(generated: GeneratedImages) -> Table:
    rows = [[name, f"{count:,}", f"{generated.kept[name]:,}"] for name, count in generated.wanted.items()]
    return Table(["class", "wanted", "kept"], rows)


def by_split(samples: SampleSet) -> Table:
    rows = [[s, f"{samples.num_rows(s):,}", f"{samples.num_labelled[s]:,}"] for s in samples.shards]
    return Table(["split", "images", "labelled"], rows)


def files(exported: Exported) -> Table:
    rows = [
        [name, decimal(size), f"{exported.differences[name]:.1e}" if name in exported.differences else ""]
        for name, size in exported.files.items()
    ]
    return Table(["file", "size", "largest difference of logits"], rows)


def speeds(exported: Exported) -> Table:
    rows = [
        [form, f"{s['p50_milliseconds']:.2f} ms", f"{s['p95_milliseconds']:.2f} ms", f"{s['images_per_second']:,.0f}",
         f"{s['batch_size']:.0f}"] for form, s in exported.speed.items()
    ]  # fmt: skip
    return Table(["speed on CPUs", "one image, median", "95th percentile", "most images/s", "in batches of"], rows)

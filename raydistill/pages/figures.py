"""The figures of `evaluate`, as PNG bytes, in colours of the Okabe-Ito palette, safe for colour-blind readers.

Shapes: N images, C classes.
"""

from __future__ import annotations

import io
import itertools
import textwrap
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from raydistill.escaping import for_figure

STUDENT, TEACHER, OTHERS = "#0072B2", "#D55E00", ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_COLOURS = {"student": STUDENT, "teacher": TEACHER}
_MOST_NAMED_CLASSES = 40


class Answers(NamedTuple):
    """The class (N,) that a network predicts for each image, and its probability (N,)."""

    class_N: np.ndarray
    sure_N: np.ndarray

    @classmethod
    def of(cls, logits_NC: np.ndarray) -> Answers:
        class_N = logits_NC.argmax(1)
        highest_N1 = np.take_along_axis(logits_NC, class_N[:, None], axis=1)
        return cls(class_N, 1 / np.exp(logits_NC - highest_N1).sum(axis=1))


def curves_figure(epochs: list[dict[str, float]], kept_epoch: int) -> bytes:
    """Every loss term and the val accuracy by epoch, with the epoch that ships."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = [e["epoch"] for e in epochs]
    plain = {
        "epoch", "step", "images", "images_per_second", "learning_rate", "val_accuracy", "kept_epoch", "loss",
    }  # fmt: skip
    terms = sorted({name for e in epochs for name in e} - plain)
    for colour, name in zip(itertools.cycle((STUDENT, *OTHERS)), ["loss", *terms], strict=False):
        left.plot(at, [e.get(name, np.nan) for e in epochs], label=name, color=colour)
    left.set(xlabel="epoch", title="Loss and its terms on train")
    left.legend(fontsize=8)
    measured = [(e["epoch"], e["val_accuracy"]) for e in epochs if "val_accuracy" in e]
    if measured:
        right.plot(*zip(*measured, strict=True), marker="o", markersize=3, color=STUDENT)
    right.axvline(kept_epoch, color=TEACHER, linewidth=1, linestyle="--", label=f"epoch {kept_epoch} ships")
    right.legend(fontsize=8)
    right.set(xlabel="epoch", ylabel="accuracy", title="Student on val")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return png(figure)


def contact_sheet(name: str, kept: list[Image.Image], rejected: list[tuple[Image.Image | None, str]]) -> bytes:
    """Generated images of one class: first the kept ones, then the rejected ones with their reasons."""
    tiles = [(image, "") for image in kept] + rejected
    columns = min(8, max(len(tiles), 1))
    kept_rows, rejected_rows = -(-len(kept) // columns), -(-len(rejected) // columns)
    rows = max(kept_rows + rejected_rows, 1)
    figure = Figure(figsize=(1.4 * columns, 1.6 * rows + 0.5), layout="constrained")
    title = f"{for_figure(name)}: {len(kept)} kept and {len(rejected)} rejected are shown"
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for number, (image, reason) in enumerate(tiles):
        place = number if number < len(kept) else kept_rows * columns + number - len(kept)
        axes = grid.flat[place]
        if image is not None:
            axes.imshow(image, cmap="grey" if image.mode == "L" else None)
        if reason:
            axes.set_title("\n".join(textwrap.wrap(reason, 18)), fontsize=7, color=TEACHER)
    return png(figure)


def confused_pairs(answers_N: np.ndarray, labels_N: np.ndarray) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images), the most frequent first."""
    wrong_N = answers_N != labels_N
    pairs, counts = np.unique(np.stack([labels_N, answers_N])[:, wrong_N], axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(pairs[0, n]), int(pairs[1, n]), int(counts[n])) for n in order]


def _shown_classes(answers_N: np.ndarray, labels_N: np.ndarray, num_classes: int) -> list[int]:
    """All classes or, if they are too many, the most confused ones, or else those with the most images."""
    if num_classes <= _MOST_NAMED_CLASSES:
        return list(range(num_classes))
    confused = (k for true, other, _ in confused_pairs(answers_N, labels_N) for k in (true, other))
    largest = np.argsort(-np.bincount(labels_N, minlength=num_classes), kind="stable").tolist()
    return list(dict.fromkeys([*confused, *largest]))[:_MOST_NAMED_CLASSES]


def confusion_figure(answers_N: np.ndarray, labels_N: np.ndarray, classes: tuple[str, ...], split: str) -> bytes:
    """Rows are the true classes; each row sums to 1. With very many classes it shows the most confused ones, and the
    last column holds all others."""
    shown = _shown_classes(answers_N, labels_N, len(classes))
    place = dict(zip(shown, range(len(shown)), strict=True))
    some = len(shown) < len(classes)
    names = [for_figure(classes[k]) for k in shown]
    counts = np.zeros((len(shown), len(shown) + some), int)
    for label, answer in zip(labels_N.tolist(), answers_N.tolist(), strict=True):
        if label in place:
            counts[place[label], place.get(answer, -1)] += 1
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(max(4.0, 0.45 * len(shown) + 2), 14)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.8)
    columns = [*names, "all others"] if some else names
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    if len(shown) <= 15:
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
                dark = shares[row, column] > 0.5
                axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8,
                          color="white" if dark else "black")  # fmt: skip
    more = f", the {len(shown)} most confused of {len(classes)} classes" if some else ""
    axes.set(xlabel="predicted", ylabel="true", title=f"Student on {split}: {len(labels_N)} images{more}")
    return png(figure)


def reliability_figure(answers: dict[str, Answers], labels_N: np.ndarray, bins: int, split: str) -> bytes:
    """The accuracy of each network by its confidence, without bins of fewer than 5 images."""
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--", label="perfectly calibrated")
    for who, (class_N, sure_N) in answers.items():
        right_N = class_N == labels_N
        bin_N = np.minimum((sure_N * bins).astype(int), bins - 1)
        points = [
            (sure_N[bin_N == b].mean(), right_N[bin_N == b].mean()) for b in range(bins) if (bin_N == b).sum() >= 5
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=who, color=_COLOURS[who])
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title=f"Reliability on {split}")
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(alpha=0.3)
    return png(figure)


def per_class_figure(answers: dict[str, Answers], labels_N: np.ndarray, classes: tuple[str, ...], split: str) -> bytes:
    """The student's recall of each class, worst first, with a mark for the teacher's."""
    images_C = np.bincount(labels_N, minlength=len(classes))
    recalls = {}
    for who, (class_N, _) in answers.items():
        right_C = np.bincount(labels_N[class_N == labels_N], minlength=len(classes))
        recalls[who] = np.where(images_C > 0, right_C / np.maximum(images_C, 1), np.nan)
    order = np.lexsort((-images_C, recalls["student"]))[:_MOST_NAMED_CLASSES]
    figure = Figure(figsize=(6.4, min(max(2.4, 0.3 * len(order) + 1.2), 14)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(order)), recalls["student"][order], color=STUDENT, label="student")
    if "teacher" in recalls:
        axes.plot(recalls["teacher"][order], range(len(order)), "D", color=TEACHER, markersize=5, label="teacher")
    names = [f"{for_figure(classes[k])} ({images_C[k]})" for k in order]
    axes.set_yticks(range(len(order)), names, fontsize=8)
    axes.invert_yaxis()
    more = f", worst {len(order)} of {len(classes)} classes" if len(order) < len(classes) else ""
    axes.set(xlim=(0, 1), xlabel="recall", title=f"By class on {split} (images){more}")
    axes.legend(fontsize=8, loc="lower right")
    return png(figure)


def png(figure: Figure) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=130)
    return sink.getvalue()

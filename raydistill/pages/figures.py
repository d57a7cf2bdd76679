"""Charts of the pages, as SVG in the colours of their style sheet, and contact sheets of images, as PNG.

Shape: N images.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator
from PIL import Image

from raydistill.escaping import for_figure
from raydistill.secrets import for_page

# A page in dark has other colours than one in light, so matplotlib draws with these, and the style sheet has the rest.
# Not black: matplotlib leaves it out.
INK, SERIES = "#010101", tuple(f"#0000{k:02x}" for k in range(1, 7))
STUDENT, TEACHER = SERIES[:2]
_COLOURS = {INK: "currentColor", **{colour: f"var(--series-{k})" for k, colour in enumerate(SERIES, start=1)}}
# Small, so that the text is large enough where a telephone shows it.
_SIZE = (4.0, 2.8)  # inches
_STYLE: Any = {
    "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.15, "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "lines.markersize": 4,
    "axes.prop_cycle": cycler("color", SERIES),
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "grid.color": INK,
}  # fmt: skip


def chart(words: str, draw: Callable[[Axes], object], size: tuple[float, float] = _SIZE) -> tuple[str, Markup]:
    """The words, and the SVG for which they stand. Its legend lies above the axes, where it covers nothing. `draw`
    escapes names of others with `escaping.for_figure`."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": words}):  # or two charts of a page may share ids
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        axes = figure.subplots()
        draw(axes)
        if len(labels := axes.get_legend_handles_labels()[1]) > 1:
            columns = int(size[0] * 72 / (4.6 * max(map(len, labels)) + 34))  # points: of the letters, and of the sign
            figure.legend(loc="outside upper left", ncols=min(max(columns, 1), 3))
        sink = io.StringIO()
        figure.savefig(sink, format="svg")
    svg = sink.getvalue().partition("<svg")[2]
    svg = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>| id="[\w.]+_\d+"', "", svg, flags=re.S)
    svg = re.sub("'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    svg = re.sub("(?<=: )#0[0-9a-f]{5}", lambda found: _COLOURS.get(found[0], found[0]), svg)
    return words, Markup(f'<svg role="img" aria-label="{escape(for_page(words))}"{svg}')


def curves(epochs: list[dict[str, float]], kept_epoch: int) -> list[tuple[str, Markup]]:
    """Every loss term and the val accuracy by epoch, with the epoch that ships."""
    at = [e["epoch"] for e in epochs]
    plain = {
        "epoch", "step", "images", "images_per_second", "waits_for_data", "learning_rate", "val_accuracy", "kept_epoch",
        "val_accuracy_averaged", "val_accuracy_latest", "is_averaged", "not_risen_since", "loss",
    }  # fmt: skip
    terms = sorted({name for e in epochs for name in e} - plain)
    measured = [(e["epoch"], e["val_accuracy"]) for e in epochs if "val_accuracy" in e]

    def losses(axes: Axes) -> None:
        for name in ["loss", *terms]:
            axes.plot(at, [e.get(name, np.nan) for e in epochs], label=name)
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    def accuracy(axes: Axes) -> None:
        axes.plot(*zip(*measured, strict=True), marker="o", markersize=3, label="student")
        axes.axvline(kept_epoch, color=TEACHER, linewidth=1, linestyle="--", label=f"epoch {kept_epoch} ships")
        axes.set(xlabel="epoch", ylabel="accuracy")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    found = [chart("Loss and its terms on train, by epoch", losses)]
    return [*found, chart("Accuracy of the student on val, by epoch", accuracy)] if len(measured) > 1 else found


def reliability(answers: dict[str, tuple[np.ndarray, np.ndarray]], bins: int, split: str) -> tuple[str, Markup]:
    """The accuracy of each network by its confidence, without bins of fewer than 5 images. `answers` has, by network,
    the probability (N,) of the class that it names, and whether this is right (N,)."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="perfectly calibrated")
        for (who, (sure_N, right_N)), colour in zip(answers.items(), (STUDENT, TEACHER), strict=False):
            bin_N = np.minimum((sure_N * bins).astype(int), bins - 1)
            points = [
                (sure_N[bin_N == b].mean(), right_N[bin_N == b].mean()) for b in range(bins) if (bin_N == b).sum() >= 5
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=who, color=colour)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")

    return chart(f"Accuracy by confidence on {split}", draw, (4.0, 3.6))


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
            axes.set_title("\n".join(textwrap.wrap(reason, 18)), fontsize=7, color="#c24f00")
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=130)
    return sink.getvalue()

"""The figures of `compare`, as PNG bytes."""

from __future__ import annotations

from matplotlib.figure import Figure

from raydistill.escaping import for_figure
from raydistill.pages.figures import png
from raydistill.search.arms import is_baseline
from raydistill.search.verdict import Comparison


def draw_comparison(comparison: Comparison) -> bytes:
    """Test accuracy of each arm over its seconds, with intervals."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in comparison.rows:
        error = [[row.test_mean - row.test_low], [row.test_high - row.test_mean]]
        marker = "s" if is_baseline(row.arm) else "o"
        axes.errorbar([row.seconds], [row.test_mean], yerr=error, marker=marker, capsize=4, label=for_figure(row.arm))
    axes.set(
        xlabel="seconds: adapt + generate + teach + train", ylabel="test accuracy (mean over seeds)",
        title=f"{comparison.num_seeds} seed(s); squares: baselines; bars: 95 % intervals over "
        + ("images only" if comparison.num_seeds == 1 else "images and seeds"),
    )  # fmt: skip
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return png(figure)


def draw_curve(comparison: Comparison) -> bytes:
    """Test accuracy over the number of labels."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in sorted({point["arm"] for point in comparison.curve}):
        points = sorted((p for p in comparison.curve if p["arm"] == name), key=lambda p: p["num_labelled"])
        counts, means = [p["num_labelled"] for p in points], [p["test_mean"] for p in points]
        axes.plot(counts, means, marker="o", label=for_figure(name))
        axes.fill_between(counts, [p["test_low"] for p in points], [p["test_high"] for p in points], alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(xlabel="labelled train images", ylabel="test accuracy (mean over seeds)")
    axes.grid(alpha=0.3)
    axes.legend()
    return png(figure)

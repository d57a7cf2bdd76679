"""compare.html: a comparison on one page that needs no network."""

from __future__ import annotations

from datetime import UTC, datetime

from markupsafe import Markup
from matplotlib.axes import Axes

from raydistill.escaping import counted, for_figure
from raydistill.pages.figures import SERIES, chart
from raydistill.pages.templates import Table, page
from raydistill.search.arms import is_baseline
from raydistill.search.verdict import NOTES, Comparison


def comparison_page(comparison: Comparison, name: str) -> bytes:
    by_arm = {row.arm: row for row in comparison.rows}
    tiles = [(comparison.ship or "not decided", "arm to ship")]
    for arm, words in {comparison.best: "best by val", comparison.cheapest: "cheapest"}.items():
        tiles.append((f"{by_arm[arm].test_mean:.3f} in {by_arm[arm].seconds:,.0f} s", f"{arm} on test, the {words}"))
    return page(
        "compare.html", name=name, kind="comparison", when=datetime.now(UTC), verdict=comparison.verdict, tiles=tiles,
        curve_verdict=comparison.curve_verdict, arms=Table(*comparison.table()), notes=NOTES,
        pictures=[_accuracies(comparison), *([_curve(comparison)] if comparison.curve else [])],
    )  # fmt: skip


def _accuracies(comparison: Comparison) -> tuple[str, Markup]:
    def draw(axes: Axes) -> None:
        for k, row in enumerate(comparison.rows):
            error = [[row.test_mean - row.test_low], [row.test_high - row.test_mean]]
            marker = ("sD" if is_baseline(row.arm) else "o^")[k >= len(SERIES)]  # where the colours begin again
            axes.errorbar(
                [row.seconds], [row.test_mean], yerr=error, marker=marker, capsize=4, label=for_figure(row.arm)
            )
        axes.set(xlabel="seconds: adapt + generate + teach + train", ylabel="test accuracy")
        axes.set_xlim(left=0)

    over = "images" if comparison.num_seeds == 1 else "images and seeds"
    words = (
        f"Test accuracy over seconds, means of {counted(comparison.num_seeds, 'seeds')} with 95 % intervals over {over}"
    )
    return chart(f"{words}; squares and diamonds have no teacher", draw, (4.0, 3.6))


def _curve(comparison: Comparison) -> tuple[str, Markup]:
    def draw(axes: Axes) -> None:
        for name in sorted({point["arm"] for point in comparison.curve}):
            points = sorted((p for p in comparison.curve if p["arm"] == name), key=lambda p: p["num_labelled"])
            counts, means = [p["num_labelled"] for p in points], [p["test_mean"] for p in points]
            axes.plot(counts, means, marker="o", label=for_figure(name))
            axes.fill_between(counts, [p["test_low"] for p in points], [p["test_high"] for p in points], alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set(xlabel="labelled train images", ylabel="test accuracy")

    return chart("Test accuracy by the number of labels, means over seeds with 95 % intervals", draw, (4.0, 3.6))

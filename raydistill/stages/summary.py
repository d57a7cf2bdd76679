"""The closing table of a run: what came out, how good, how large, how fast, how long it took, and where it lies."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table

from raydistill.config import RunConfig
from raydistill.stages.run import Outcome


def closing_table(config: RunConfig, outcome: Outcome) -> Group:
    """Student beside teacher, then the stages."""
    report = outcome.report
    assert report is not None
    results = Table("", "student", "teacher", box=None, pad_edge=False, title=config.name, title_justify="left")
    for split in report.student:
        results.add_row(
            f"{split} accuracy", _accuracy(report.student[split]), _accuracy((report.teacher or {}).get(split))
        )
        if report.agreement:
            results.add_row(f"{split} agreement", f"{report.agreement[split]:.3f}", "")
    results.add_row("parameters", f"{report.student_parameters:,}", _number(report.teacher_parameters))
    results.add_row("images/s", f"{report.student_images_per_second:,.0f}", _number(report.teacher_images_per_second))
    stages = Table("stage", "seconds", "where", box=None, pad_edge=False)
    for stage, directory in outcome.directories.items():
        seconds = outcome.seconds.get(stage)
        stages.add_row(stage, f"{seconds:.0f}" if seconds else "done", directory)
    return Group("", results, "", stages, "")


def _accuracy(measures: dict[str, Any] | None) -> str:
    if measures is None:
        return ""
    low, high = measures["interval"]
    return f"{measures['accuracy']:.3f} ({low:.3f} to {high:.3f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"

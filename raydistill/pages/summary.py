"""The closing table of a run: accuracy, size, speed, time and directories."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Group
from rich.table import Column, Table

from raydistill.cluster.bill import bill_words
from raydistill.config import RunConfig
from raydistill.majority_baseline import compare_with_majority
from raydistill.results import Outcome
from raydistill.storage.directory import read_bill
from raydistill.storage.filesystems import write_bytes
from raydistill.storage.jobs import job_name


def closing_table(config: RunConfig, outcome: Outcome) -> Group:
    """Student beside teacher, then the stages."""
    report = outcome.report
    assert report is not None
    results = Table("", "student", "teacher", box=None, pad_edge=False, title=job_name(config), title_justify="left")
    for split in report.student:
        results.add_row(
            f"{split} accuracy", _accuracy(report.student[split]), _accuracy((report.teacher or {}).get(split))
        )
        if report.agreement:
            results.add_row(f"{split} agreement", f"{report.agreement[split]:.3f}", "")
    for row in _generated_rows(config, outcome):
        results.add_row(*row)
    results.add_row("parameters", f"{report.student_parameters:,}", _number(report.teacher_parameters))
    if outcome.student is not None:
        results.add_row("computed in", outcome.student.precision, outcome.adapted.precision if outcome.adapted else "")
    results.add_row("images/s", f"{report.student_images_per_second:,.0f}", _number(report.teacher_images_per_second))
    bills = {stage: read_bill(directory) for stage, directory in outcome.directories.items()}
    on_nodes = any(bill.keys() & {"node_seconds", "images_again"} for bill in bills.values())
    stages = Table(
        "stage",
        "seconds",
        Column("where", overflow="fold"),
        *(["took in all"] if on_nodes else []),
        box=None,
        pad_edge=False,
    )
    for stage, directory in outcome.directories.items():
        seconds = outcome.seconds.get(stage)
        more = [bill_words(bills[stage], config.cluster.prices)] if on_nodes else []
        stages.add_row(stage, f"{seconds:.0f}" if seconds else "done", directory, *more)
    warnings = [f"warning: {words}" for words in compare_with_majority(report.student).warnings]
    kept = f"{report.kept[:1].upper()}{report.kept[1:]}."
    return Group("", *warnings, *([""] if warnings else []), results, "", kept, "", stages, "")


def _generated_rows(config: RunConfig, outcome: Outcome) -> list[tuple[str, str, str]]:
    """What generated images changed, if the same job ran without them. The table shows the two classes that changed
    most; `deltas.json`, beside the report, has all."""
    report, without = outcome.report, outcome.without_generated
    if config.generate is None or report is None:
        return []
    if without is None:
        return [("without generated images", "not measured: run the job with generate=null", "")]
    rows, found = [], {}
    for split in report.student:
        found[split] = recall_deltas(report.student[split], without.student[split])
        deltas = {name: of_class["points"] for name, of_class in found[split].items()}
        ends = [min(deltas, key=deltas.__getitem__), max(deltas, key=deltas.__getitem__)]
        change = 100 * (report.student[split]["accuracy"] - without.student[split]["accuracy"])
        classes = ", ".join(f"{name} {deltas[name]:+.1f}" for name in dict.fromkeys(ends))
        rows.append((f"{split} by generated images", f"{change:+.1f} points ({classes})", ""))
    write_bytes(f"{report.path}/deltas.json", json.dumps(found, indent=2, ensure_ascii=False).encode())
    return rows


def recall_deltas(now: dict[str, Any], then: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By class with images: its recall without and with generated images, and the difference in points."""
    found = {}
    for name, of_class in now["per_class"].items():
        if of_class["images"]:
            before, after = then["per_class"][name]["recall"], of_class["recall"]
            found[name] = {
                "images": of_class["images"], "without": before, "with": after, "points": 100 * (after - before)
            }  # fmt: skip
    return found


def _accuracy(measures: dict[str, Any] | None) -> str:
    if measures is None:
        return ""
    low, high = measures["interval"]
    return f"{measures['accuracy']:.3f} ({low:.3f} to {high:.3f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"

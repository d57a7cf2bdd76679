"""What the engine reaches of bare loops of the same work, on a CPU or a GPU, in one run and without Ray.

    python benchmarks/engine.py --device cuda --compile --json engine.json

Rows: the teacher, a step of the student with each loss, drawing and rendering views, reading shards, host to device,
generation. A bare loop has the same network, batch and precision, and finds its data ready on the device. Ours and bare
take turns, so that drift hits both; a figure is the median of the turns. The share of the peak is that of a matrix
product in the same precision, measured in the same run. Waits are operations whose result the host has to know.

With --json it writes `teach_ratio`, `distill_ratio` (the default loss), `syncs_per_step` (the most of all losses),
`shard_read_speedup`, `view_draw_speedup` and all `rows`. `difference` in a row is how far ours and bare are apart in
what they compute. It is meant to take at most 6 minutes on a GPU; --losses, --seconds and --repeats shorten it. --tiny
shows that all works; its ratios say nothing, because a step of its networks takes hardly longer than the calls of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so it runs as a file, too
os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command does, before torch loads

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.engine_bench import DTYPES, SIZES, TERMS, Bench, Meter, Row, new_config, worker, write_data
from benchmarks.engine_data import copying_row, drawing_row, reading_row, rendering_row
from benchmarks.engine_networks import generation_row, run_between, student_rows, teacher_rows
from raydistill.data.views import WHOLE_IMAGE
from raydistill.engine.frozen_teacher import FrozenTeacher
from raydistill.engine.precision import described
from raydistill.identity import student_pin, teacher_pin

STDOUT = 1  # its file descriptor
ALL = ("default", *TERMS)


def new_bench(root: Path, options: argparse.Namespace) -> tuple[Bench, FrozenTeacher]:
    """What is measured, and the teacher. What a precision of `auto` stands for is settled as in a run."""
    meter, sizes = Meter(options), SIZES["tiny" if options.tiny else options.device]
    config = new_config(root, sizes, options.precision)
    assert config.teacher is not None
    with meter.all_threads():
        teacher = FrozenTeacher(config.teacher, meter.device, meter.threads, teacher_pin(str(root), config))
    one = np.zeros((1, sizes.side, sizes.side, 3), np.uint8)
    data = write_data(root, config, sizes, teacher.features(one, WHOLE_IMAGE[None, None]).shape[-1])
    run_between(data.job("default", 2), worker(meter), iter(()))
    settled = described(options.precision, teacher_pin(str(root), config))[0]
    student = described(options.precision, student_pin(str(root), config))[0]
    needed = {"fp32", "bf16" if options.device == "cuda" else "fp32", settled, student}
    peaks = {precision: meter.peak(sizes.matmul, precision) for precision in sorted(needed)}
    return Bench(meter, sizes, data, settled, student, peaks, options.compile), teacher


def all_rows(bench: Bench, teacher: FrozenTeacher, losses: Sequence[str]) -> Iterator[Row]:
    for precision, peak in bench.peaks.items():
        yield Row(f"peak, {precision}", "TFLOP", peak / 1e12)
    yield from teacher_rows(bench, teacher)
    for loss in losses:
        yield from student_rows(bench, loss)
    for row in (drawing_row, rendering_row, reading_row, copying_row, generation_row):
        yield row(bench)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Prints each ratio and the table, and gives what --json writes."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        bench, teacher = new_bench(Path(scratch), options)
        for row in all_rows(bench, teacher, options.losses):
            rows.append(row)
            console.print(f"{row.name}: {row.note or _shown(row.ratio or row.ours, '.3g')}")
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    precisions = f"teacher in {bench.teacher_precision}, student in {bench.precision}"
    console.print(_table(rows, f"{name}, {bench.meter.threads} threads, torch {torch.__version__}; {precisions}"))
    ratios = {row.name: row.ratio for row in rows}
    return {
        "teach_ratio": ratios["teacher"],
        "distill_ratio": ratios.get("student, default"),
        "syncs_per_step": max(row.waits or 0 for row in rows if row.name.startswith("student")),
        "shard_read_speedup": ratios["reading shards"],
        "view_draw_speedup": ratios["drawing views"],
        "device": name,
        "precision": {"teacher": bench.teacher_precision, "student": bench.precision},
        "rows": [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows],
    }


def _table(rows: Sequence[Row], title: str) -> Table:
    table = Table("", "ours", "bare", "ratio", "to CE", "of peak", "waits", title=title, box=SIMPLE_HEAD)
    table.caption = "images, views or TFLOP a second; to CE: over a bare step with cross-entropy alone; waits in a step"
    table.columns[0].no_wrap = True
    for row in rows:
        rates = (_shown(rate, ",.0f" if rate and 100 < rate < 1e6 else ".3g") for rate in (row.ours, row.bare))
        ratios = (_shown(ratio, ".2f") for ratio in (row.ratio, row.over_cross_entropy))
        table.add_row(row.name, *rates, *ratios, _shown(row.share_of_peak, ".1%"), _shown(row.waits, ".1f"))
    return table


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def parse_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="the smallest networks and one short turn each")
    parser.add_argument("--compile", action="store_true", help="also bare loops of a compiled teacher and student")
    parser.add_argument(
        "--losses", nargs="+", choices=ALL, default=ALL, help="of the student; all of them if not given"
    )
    parser.add_argument("--precision", choices=("auto", *DTYPES), default="auto", help="of teacher and student")
    parser.add_argument("--seconds", type=float, help="of one turn; 0.5, or 0 with --tiny")
    parser.add_argument("--repeats", type=int, help="turns; 5, or 1 with --tiny")
    parser.add_argument(
        "--json", nargs="?", const=STDOUT, metavar="FILE", help="write the figures; without FILE, to stdout"
    )
    options = parser.parse_args(words)
    options.seconds = options.seconds if options.seconds is not None else 0.0 if options.tiny else 0.5
    options.repeats = options.repeats or (1 if options.tiny else 5)
    return options


def main() -> None:
    options = parse_options()
    figures = measure(options, Console(stderr=options.json == STDOUT))
    if options.json:
        with open(options.json, "w") as sink:
            json.dump(figures, sink, indent=2)


if __name__ == "__main__":
    main()

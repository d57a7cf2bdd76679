"""compare and tune."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from raydistill.cli.arguments import CONTINUES, STARTED, Arguments, announce, app, tune_settings
from raydistill.escaping import plain_console
from raydistill.runtime import interrupts


@app.command()
def compare(
    words: Arguments = None,
    learning_curve: Annotated[
        bool, typer.Option("--learning-curve", help="Also train with fewer labels (compare.label_shares).")
    ] = False,
) -> None:
    """Train the student in several ways with several seeds, and say which to ship (compare.arms, compare.seeds)."""
    from rich.table import Table

    from raydistill.config import load_config
    from raydistill.preflight import refuse_early
    from raydistill.runtime.progress import Progress

    interrupts.resume_hint(CONTINUES)
    config, console = load_config(words or []), plain_console()
    announce(f"compare: {', '.join(config.compare.arms)} on {config.images.path}, into {config.workspace}")
    refuse_early(config)
    from raydistill.search.compare import compare_arms

    comparison, path = compare_arms(config, Progress(console), learning_curve)
    titles, rows = comparison.table()
    table = Table(*titles, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    wide = plain_console(width=max(console.width, 160))  # a cell that is cut off is useless
    wide.print("", table, "")
    console.print(comparison.verdict, soft_wrap=True)
    if comparison.curve_verdict:
        console.print(comparison.curve_verdict, soft_wrap=True)
    console.print(f"report: {path}/compare.html, also as compare.md and compare.json", soft_wrap=True)
    console.print(f"compare is done after {time.monotonic() - STARTED:.0f} s")


@app.command()
def tune(
    words: Arguments = None,
    space: Annotated[
        str | None, typer.Option("--space", help="A search space, such as loss, or a file of yours (tune.space).")
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", help="Trials in all; more of them continue a search (tune.trials).")
    ] = None,
) -> None:
    """Search for better settings: each trial trains a student, and all share one pass of the teacher. Writes
    best.yaml."""

    from raydistill.config import load_config
    from raydistill.preflight import refuse_early
    from raydistill.runtime.progress import Progress

    interrupts.resume_hint(CONTINUES)
    config, console = load_config([*(words or []), *tune_settings(space, trials)]), plain_console()
    announce(f"tune: {config.tune.space or 'no space'} on {config.images.path}, into {config.workspace}")
    refuse_early(config)
    from raydistill.search.tune import tune_job

    search = tune_job(config, Progress(console))
    console.print(search.verdict, soft_wrap=True)
    if search.front:
        console.print(f"on the Pareto front: trials {', '.join(map(str, search.front))}", soft_wrap=True)
    console.print(f"best settings, figures and JSON: {search.path}/best.yaml, search.html, search.json", soft_wrap=True)
    bill = "" if search.cost is None else f", {search.cost:.2f} at {config.cluster.price_per_hour:g} an hour"
    console.print(f"trials and confirmation took {search.seconds:.0f} s in all, over all commands{bill}")
    console.print(f"tune is done after {time.monotonic() - STARTED:.0f} s")

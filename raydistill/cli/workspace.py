"""ls, open and clean: the jobs of a workspace."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raydistill.cli.arguments import app
from raydistill.errors import ConfigError, StageError
from raydistill.escaping import counted, one_line, plain_console, shortened
from raydistill.runtime import interrupts

if TYPE_CHECKING:
    from raydistill.cleaning import Waste

Workspace = Annotated[
    str,
    typer.Argument(
        metavar="WORKSPACE",
        help="The job's `workspace` folder.",
        callback=lambda text: text.removeprefix("workspace="),  # as all other commands take it
    ),
]


@app.command("ls")
def list_jobs(
    workspace: Workspace = "./workspace",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list, for programs.")] = False,
) -> None:
    """List the jobs of a workspace: when they ran, how they ended, accuracy, size on disk."""
    from rich.filesize import decimal
    from rich.table import Table

    from raydistill.storage.directory import absolute_root, folder_bytes
    from raydistill.storage.jobs import read_jobs, state_of

    root = absolute_root(workspace)
    runs = sorted((run for _, run in read_jobs(root)), key=lambda run: run.started)
    users = Counter(name for run in runs for name in set(run.directories.values()))
    sizes = {name: folder_bytes(f"{root}/{name}") for name in users}
    rows: list[dict[str, Any]] = []
    for run in runs:
        mine = set(run.directories.values())
        shared = sum(sizes[name] for name in mine if users[name] > 1)
        rows.append(
            run.model_dump(exclude={"process", "page"})
            | {
                "state": state_of(root, run),
                "bytes": sum(map(sizes.__getitem__, mine)) - shared,
                "shared_bytes": shared,
            }
            | {"report": f"{root}/{run.page}" if run.page else None}
        )
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    console = plain_console()
    table = Table(
        "", "job", "", "began", "state", "student val, test", "teacher val, test", "its own", "shared", box=None
    )
    for number, row in enumerate(rows, 1):
        began = datetime.fromtimestamp(row["started"]).strftime("%Y-%m-%d %H:%M")
        accuracies = [_accuracy(row["accuracies"].get(who, {})) for who in ("student", "teacher")]
        told = [one_line(shortened(row[key], 40)) for key in ("name", "title")]
        table.add_row(
            str(number), *told, began, row["state"], *accuracies, decimal(row["bytes"]), decimal(row["shared_bytes"])
        )
    plain_console(width=max(console.width, 150)).print(table)
    for number, row in enumerate(rows, 1):  # rows of one name differ in their settings
        if row["report"] or row["error"]:
            console.print(one_line(f"{number} {row['name']}: {row['error'] or row['report']}"), soft_wrap=True)
    console.print(f"{counted(len(rows), 'runs')} in {root}, {decimal(sum(sizes.values()))}", soft_wrap=True)


def _accuracy(of_split: dict[str, float]) -> str:
    return ", ".join(f"{of_split[split]:.3f}" for split in ("val", "test") if split in of_split)


@app.command("open")
def open_report(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A job's name; without one, the latest job.")] = "",
    workspace: Annotated[str, typer.Option("--workspace", help="Where the job ran.")] = "./workspace",
) -> None:
    """Open the report of the latest job, or of a named one, and print its path."""
    import webbrowser

    from raydistill.storage.directory import absolute_root
    from raydistill.storage.filesystems import exists
    from raydistill.storage.jobs import named_runs, read_jobs
    from raydistill.storage.local import refuse_link

    root = absolute_root(workspace)
    runs = list(read_jobs(root, wanted=name))
    wanted = named_runs(runs, name) if name else runs
    pages = [(run.ended or run.started, f"{root}/{run.page}") for _, run in wanted if run.page]
    page = next((page for _, page in sorted(pages, reverse=True) if exists(page)), None)
    if page is None:
        raise ConfigError(
            f"{name or root}: no report yet; `raydistill run` writes one, and `raydistill ls` shows the state"
        )
    print(one_line(page))
    has_screen = sys.platform in ("win32", "darwin") or any(
        map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    )
    if has_screen and "://" not in page:
        from pathlib import Path

        for place in (os.path.dirname(page), page):
            refuse_link(place)
        if not webbrowser.open(Path(page).as_uri()):
            print("no browser could be started; open the file yourself")


@app.command()
def clean(
    workspace: Workspace = "./workspace",
    job: Annotated[str | None, typer.Option("--job", metavar="NAME", help="Delete this job too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what it would delete.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete what no job of a workspace needs, after asking.

    That is directories of no job, superseded checkpoints, and files that killed processes left half-written.
    """
    from rich.filesize import decimal
    from rich.table import Table

    from raydistill.cleaning import delete, find_waste
    from raydistill.storage.directory import absolute_root
    from raydistill.storage.jobs import forget

    root, console = absolute_root(workspace), plain_console()
    found, records = find_waste(root, job)
    waste = [item for item in found if not item.kept]
    table = Table("", "", "", box=None, show_header=False, pad_edge=False)
    for item in found:
        name, size = os.path.relpath(item.path, root), decimal(item.size)
        table.add_row(name, "" if item.kept else size, f"stays: {item.kept}" if item.kept else item.why)
    wide = plain_console(width=max(console.width, 120))
    wide.print(table)
    total, free = _total(waste, root), {item.path for item in waste}
    if not waste and not records:
        console.print(f"nothing to delete in {root}", soft_wrap=True)
        return
    if dry_run:
        console.print(f"would delete {total}", soft_wrap=True)
        return
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"clean: would delete {total}; it cannot ask here, so add --yes, or --dry-run to only look"
            )
        if not typer.confirm(f"Delete {one_line(total)}" + (f", and the job {one_line(job)}?" if job else "?")):
            raise typer.Exit(1)
        again, records = find_waste(root, job)  # a job may have begun before the answer came
        free = {item.path for item in again if not item.kept}
    interrupts.resume_hint("the same command deletes the rest")
    gone: list[Waste] = []
    try:
        for item in waste:
            if item.path in free and delete(item):
                gone.append(item)
            else:
                console.print(f"{item.path} stays: another command began to use it", soft_wrap=True)
        forget(root, records)
    except OSError as error:
        raise StageError(
            f"{error.filename}: cannot be deleted ({error.strerror}); deleted before that: {_total(gone, root)}"
        ) from None
    console.print(f"deleted {_total(gone, root)}", soft_wrap=True)


def _total(waste: list[Waste], root: str) -> str:
    from rich.filesize import decimal

    return f"{counted(len(waste), 'things')}, {decimal(sum(item.size for item in waste))}, of {root}"

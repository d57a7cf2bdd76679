"""run, each stage by its own name, and show."""

from __future__ import annotations

import io
import shlex
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from raydistill.cli.arguments import CONTINUES, STARTED, Arguments, announce, app
from raydistill.errors import ConfigError, UselessStudentError
from raydistill.escaping import counted, one_line, plain_console
from raydistill.graph import STAGES, find_work
from raydistill.runtime import interrupts

if TYPE_CHECKING:
    from raydistill.results import Outcome


@app.command()
def run(words: Arguments = None) -> None:
    """Run all stages in order: prepare, adapt, teach, distill, evaluate, export. Finished ones are skipped."""
    _run(words, None, "run")


def generate(
    words: Arguments = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print every prompt, the counts and the cost.")
    ] = False,
) -> None:
    """Make images with a diffusion pipeline and keep the good ones. Runs the stages that this needs first."""
    if not dry_run:
        _run(words, "generate", "generate")
        return

    from raydistill.config import load_config

    config = load_config(words or [])
    announce(f"generate: {config.images.path}, a forecast")
    from raydistill.generation.forecast import forecast

    console = plain_console()
    for line in forecast(config):
        console.print(line, markup=False, soft_wrap=True)


def teach(
    words: Arguments = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FOLDER", help="Also write them as an open folder for others.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", metavar="TEXT", help="What that folder says of its licence.")
    ] = None,
    logits_only: Annotated[bool, typer.Option("--logits-only", help="Leave the features out of that folder.")] = False,
) -> None:
    """Run every view through the teacher and store its soft targets. Runs the stages that this needs first."""
    if out is None and (licence is not None or logits_only):
        raise ConfigError("teach: --licence and --logits-only are for the folder of --out; name it, or leave them out")
    if out is None:
        _run(words, "teach", "teach")
        return

    from raydistill.config import load_config
    from raydistill.runtime.progress import Progress
    from raydistill.stages.open_folder import refuse_out, write_folder

    config = load_config(words or [])
    refuse_out(config, out)
    outcome = _run(words, "teach", "teach")
    written = write_folder(config, outcome, out, licence, not logits_only, Progress(plain_console()))
    views = f"{written.num_views} views of {written.num_images:,} images"
    print(one_line(f"wrote {views} to {out}; teacher.model=targets:{out} reads it"))


def _command(until: str) -> Callable[[list[str] | None], None]:
    def command(words: Arguments = None) -> None:
        _run(words, until, until)

    return command


_OWN: dict[str, Callable[..., None]] = {"generate": generate, "teach": teach}  # they have their own options
for _stage in STAGES:
    app.command(_stage.name, help=_stage.help)(_OWN.get(_stage.name) or _command(_stage.name))


@app.command()
def show(words: Arguments = None) -> None:
    """Show the resolved config, the stage directories, what is done and what would run. Writes nothing."""
    from rich.table import Table

    from raydistill.cluster.bill import bill_words
    from raydistill.config import load_config, shown_yaml
    from raydistill.storage.directory import read_bill
    from raydistill.tracking.experiments import experiment_name
    from raydistill.tracking.stores import tracking_uri

    config = load_config(words or [])
    plain_console().print(shown_yaml(config.resolved), markup=False)
    work = find_work(config)
    table = Table("stage", "directory", "state", box=None, pad_edge=False)
    for stage, directories in work.directories.items():
        if directories is None:
            table.add_row(stage, "named when the earlier stages are done", "would run")
        for directory in directories or []:
            state = "would continue" if directory.started() else "would run"
            if directory.done() is not None:
                took = bill_words(read_bill(directory.path), config.cluster.prices)
                state = f"done, {took}" if took else "done"
            table.add_row(directory.stage, directory.path, state)
    told = plain_console(width=2000, file=io.StringIO())
    if config.tracking.enabled:
        (uri, named), (experiment, named_too) = tracking_uri(config), experiment_name(config)
        where = f"{uri} (by {named}), experiment {experiment} (by {named_too})" if uri else "nowhere: set tracking.uri"
        told.print(f"MLflow: {where}", markup=False)
    told.print(f"images: {len(work.listing.entries)} in {len(work.listing.classes)} classes")
    for what, count in work.listing.ignored.items():
        told.print(f"ignored: {counted(count, what)}", markup=False)
    for what, count in work.listing.notes.items():
        told.print(f"note: {counted(count, what)}", markup=False)
    told.print(table)
    for line in told.file.getvalue().splitlines():  # as comments, so that the output of `show` is a job again
        print(f"# {line}".rstrip())


def _run(words: list[str] | None, until: str | None, command: str) -> Outcome:
    from raydistill.cluster.session import RayStart
    from raydistill.config import load_config
    from raydistill.preflight import refuse_early
    from raydistill.runtime.progress import Progress
    from raydistill.storage.directory import check_writable

    interrupts.resume_hint(CONTINUES)
    config = load_config(words or [])
    announce(f"{command}: {config.images.path}, into {config.workspace}")
    console = plain_console()
    refuse_early(config)
    work, ray = find_work(config, until), RayStart(config, of_command=True)
    if work.undone:
        check_writable(config)
    if work.needs_ray:
        ray.begin()  # it starts while torch and the models' libraries load, below
    from raydistill.run import run_stages

    again, refusal = shlex.join(["raydistill", *sys.argv[1:]]), None
    try:
        outcome = run_stages(config, Progress(console), until, work, ray, again)
    except UselessStudentError as error:
        outcome, refusal = error.outcome, error
    if outcome.report is not None:
        from raydistill.pages.summary import closing_table

        console.print(closing_table(config, outcome))
        console.print(f"report: {outcome.page}", soft_wrap=True, markup=False)
    if refusal is not None:
        raise refusal
    console.print(f"{command} is done after {time.monotonic() - STARTED:.0f} s")
    return outcome

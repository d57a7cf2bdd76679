"""check: the images, the teacher, the cluster."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from raydistill.cli.arguments import Arguments, announce, app
from raydistill.escaping import counted, plain_console
from raydistill.runtime import interrupts


@app.command()
def check(
    words: Arguments = None,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Check the job's teacher too, on some of the images, on this machine.")
    ] = False,
    teachers: Annotated[
        str | None, typer.Option("--teachers", help="Compare several teachers: timm:A,hf:B,timm:C=WEIGHTS.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be used.")] = False,
    out: Annotated[str | None, typer.Option("--out", help="Also write a .html page with pictures, or .json.")] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Check every node of the running cluster.")] = False,
    file: Annotated[str | None, typer.Option("--file", help="Check a cluster.yaml, or a KubeRay file.")] = None,
) -> None:
    """Check every image, and say what is wrong and what to do. Exit code 2 if a run would refuse them.

    With --cluster or --file: would this job run on the cluster?
    """

    from raydistill.config import load_config

    console = plain_console()
    wide = plain_console(width=max(console.width, 160))
    if cluster or file is not None:
        _check_cluster(words, cluster, file, wide)
        return
    from raydistill.runtime.progress import Progress

    interrupts.resume_hint("the same command looks at all images again")
    config, progress = load_config(words or []), Progress(console)
    announce(f"check: {config.images.path}")
    from raydistill.doctor.images import check_images
    from raydistill.pages.check import findings_table, write_checkup

    checkup = check_images(config, progress, strict)
    wide.print("", findings_table(checkup), "")
    if out is not None:
        write_checkup(config, checkup, out)
        console.print(f"written: {out}", markup=False, soft_wrap=True)
    if checkup.is_interrupted:
        raise KeyboardInterrupt
    if teacher or teachers is not None:
        from raydistill.doctor.teachers import check_teachers, teachers_table

        names = teachers.split(",") if teachers else []
        wide.print(teachers_table(check_teachers(config, names, progress)), "")
    stops = sum(finding.severity == "stop" for finding in checkup.findings)
    used = sum(sum(counts.values()) for counts in checkup.counts.values())
    console.print(
        f"{counted(stops, 'findings')} would stop a run" if stops else f"a run would start, and use {used:,} images"
    )
    if stops:
        raise typer.Exit(2)


def _check_cluster(words: list[str] | None, cluster: bool, file: str | None, console: Any) -> None:
    from rich.table import Table

    from raydistill.config import load_config
    from raydistill.doctor.cluster import check_cluster, check_offers

    config = load_config(words or []) if words or cluster else None
    announce(f"check: {file or (config and config.cluster.address) or 'this machine'}")
    findings = [] if file is None else check_offers(config, file)
    if cluster:
        assert config is not None
        findings += check_cluster(config)
    table = Table("", "what", "found", "what to do", box=None, pad_edge=False)
    for finding in findings:
        table.add_row("fix" if finding.advice else "ok", finding.about, finding.found, finding.advice or "")
    console.print(table)
    if any(finding.advice for finding in findings):
        raise typer.Exit(2)

"""init: a first job for a folder of images."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from raydistill.cli.arguments import announce, app
from raydistill.errors import ConfigError
from raydistill.escaping import one_line, printable
from raydistill.runtime import interrupts


@app.command()
def init(
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="A folder of images, a table, a bucket.")],
    out: Annotated[str, typer.Option("--out", help="The job file to write; it must not exist yet.")] = "job.yaml",
) -> None:
    """Look at the images and the machine, and write a job file that fits, with reasons."""
    announce(f"init: {images}")
    from raydistill.doctor.first_job import choose, job_text, look

    images = os.path.expanduser(images)
    situation = look(images)  # first: its mistakes matter more than that of the name
    if os.path.lexists(out):
        raise ConfigError(f"--out {out}: the file exists, and init overwrites nothing; give another name")
    text = job_text(images, situation, choose(situation))
    from raydistill.config import load_config
    from raydistill.storage.local import create_here
    from raydistill.yaml_files import parse

    load_config([], next(iter(parse(text, out))))  # never write a job that cannot be read back
    try:
        create_here(out, text.encode())
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror}); give another place") from None
    interrupts.resume_hint(one_line(f"{out} is written"))
    print(printable(text))
    print(one_line(f"written: {out}. Look at the images with: raydistill check {out}"))
    print(one_line(f"Then: raydistill run {out}"))

"""What the commands share: the job as words, the first line, the program."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from raydistill.strangers import one_line

STARTED = time.time()
GOES_ON = "the same command goes on from here"
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[JOB.yaml] [OVERLAY.yaml] [key=value] …",
        help="A job file, overlays and single settings, merged from left to right; the later one wins.",
    ),
]
app = typer.Typer(
    help="Distil a small image classifier on your task from a large pre-trained teacher.\n\n"
    "Start with: raydistill run images.path=./my_images",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def announce(words: str, stream: Any = None) -> None:
    """The first line, before anything that takes time to load."""
    print(one_line(words), file=stream, flush=True)

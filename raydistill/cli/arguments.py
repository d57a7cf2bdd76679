"""The Typer app, and what all commands share: their arguments and their first line of output."""

from __future__ import annotations

import shutil
import time
from typing import Annotated, Any

import typer

from raydistill.escaping import one_line

STARTED = time.time()
CONTINUES = "the same command continues from here"
Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[IMAGES] [JOB.yaml] [OVERLAY.yaml] [key=value] …",
        help="A folder of images, job files, overlays and single settings; later ones override earlier ones.",
    ),
]
app = typer.Typer(
    help="Distil a small image classifier on your task from a large pre-trained teacher.\n\n"
    "Start with: raydistill run ./my_images",
    no_args_is_help=True,
    context_settings={
        "terminal_width": max(100, shutil.get_terminal_size().columns),
        "help_option_names": ["-h", "--help"],
    },
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        from raydistill.runtime.versions import installed

        print("raydistill", installed(["raydistill"])["raydistill"])
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def tune_settings(space: str | None, trials: int | None) -> list[str]:
    """The options of `tune` as settings."""
    return [f"tune.{key}={value}" for key, value in (("space", space), ("trials", trials)) if value is not None]


def announce(words: str, stream: Any = None) -> None:
    """Print the first line, before any slow import."""
    print(one_line(words), file=stream, flush=True)

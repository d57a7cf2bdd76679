"""The Typer app, and what all commands share: their arguments and their first line of output."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from raydistill.errors import ConfigError
from raydistill.escaping import one_line

STARTED = time.monotonic()
CONTINUES = "the same command continues from here"
Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[IMAGES] [JOB.yaml] [OVERLAY.yaml] [key=value] …",
        help="A folder of images, job files, overlays and single settings; later ones override earlier ones.",
    ),
]


class _Commands(TyperGroup):
    """A setting that is written as an option is told in one line."""

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except Exception as error:
            option = getattr(error, "option_name", None)  # click's NoSuchOption, which typer has a copy of
            if option and set(getattr(error, "possibilities", None) or ()) <= {"--help"}:  # it is like no option
                from raydistill.config.keys import known_keys, suggest_key

                typed = next((word for word in sys.argv if word.startswith(option)), option)
                key, equals, value = typed.strip("-").partition("=")
                near = suggest_key(key.replace("-", "_")).partition("did you mean ")[2].rstrip("?")
                if meant := key if key in known_keys() else near:
                    words = f"{typed}: a setting is written without dashes: {meant}={value if equals else 'VALUE'}"
                    raise ConfigError(words) from None
            raise


app = typer.Typer(
    cls=_Commands,
    help="Distil a small image classifier on your task from a large pre-trained teacher.\n\n"
    "Start with: raydistill init ./my_images",
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

"""keys: lists the settings of a job."""

from __future__ import annotations

from typing import Annotated

import typer

from raydistill.cli.arguments import app
from raydistill.errors import ConfigError
from raydistill.escaping import plain_console, printable


@app.command("keys")
def list_keys(
    terms: Annotated[
        list[str] | None, typer.Argument(metavar="[WORD]…", help="Only settings whose name or meaning has these words.")
    ] = None,
) -> None:
    """List the settings of a job: default, allowed values, meaning."""
    import textwrap

    from raydistill.config.keys import describe_keys

    console, found = plain_console(), list(describe_keys(word := " ".join(terms or [])))
    if not found:
        raise ConfigError(f"no key has {word!r} in its name or meaning; `raydistill keys` lists all")
    before = ""
    for key in found:
        section = key.name.rpartition(".")[0].partition(".")[0]
        if section != before and not word:
            print(f"\n{section}\n")
        before = section
        console.print(key.head, markup=False, soft_wrap=True)
        print(printable(textwrap.fill(key.meaning, console.width, initial_indent="    ", subsequent_indent="    ")))

"""keys: lists the settings of a job."""

from __future__ import annotations

from typing import Annotated

import typer

from raydistill.cli.arguments import app
from raydistill.errors import ConfigError
from raydistill.escaping import plain_console


@app.command("keys")
def list_keys(
    terms: Annotated[
        list[str] | None, typer.Argument(metavar="[WORD]…", help="Only settings whose name or meaning has these words.")
    ] = None,
) -> None:
    """List the settings of a job: default, allowed values, meaning."""
    from rich.padding import Padding

    from raydistill.config.keys import describe_keys

    console, found = plain_console(), list(describe_keys(word := " ".join(terms or [])))
    if not found:
        raise ConfigError(f"no key has {word!r} in its name or meaning; `raydistill keys` lists all")
    for key in found:
        console.print(key.head, markup=False, soft_wrap=True)
        console.print(Padding(key.meaning, (0, 0, 0, 4)), markup=False)

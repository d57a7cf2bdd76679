"""The command line. Imports that take time stand inside the commands, so that config errors answer at once."""

from raydistill.cli.main import main

__all__ = ["main"]

"""The command line. Slow imports are inside the commands, so that config errors appear at once."""

from raydistill.cli.main import main

__all__ = ["main"]

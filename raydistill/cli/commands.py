"""All commands, in the order of --help."""

from raydistill.cli import init  # isort: split

from raydistill.cli import stages  # isort: split

from raydistill.cli import search  # isort: split

from raydistill.cli import check  # isort: split

from raydistill.cli import inference  # isort: split

from raydistill.cli import jobs  # isort: split

from raydistill.cli import workspace  # isort: split

from raydistill.cli import reference  # isort: split

from raydistill.cli.arguments import app

__all__ = ["app", "check", "inference", "init", "jobs", "reference", "search", "stages", "workspace"]

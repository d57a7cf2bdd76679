"""The entry point, and the one place that turns failures into exit codes: 2 for the config or the data, 1 for the run;
130, 143 and 129 after SIGINT, SIGTERM and SIGHUP."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback

from raydistill import errors
from raydistill.errors import RaydistillError
from raydistill.escaping import printable, truncated
from raydistill.runtime import interrupts
from raydistill.runtime.environment import open_streams, prepare_environment
from raydistill.secrets import RedactedStream, redacted


def main() -> None:
    open_streams()
    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    interrupts.handle_signals()
    code = 1
    try:
        code = _exit_code()
    finally:  # also for an interruption, at whatever moment it comes
        interrupts.exit_process(code)


def _exit_code() -> int:
    try:
        prepare_environment()
        logging.basicConfig(level=logging.WARNING)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_Plain("%(levelname)s %(message)s"))
        logging.getLogger("raydistill").setLevel(logging.INFO)
        from raydistill.cli.commands import app  # signals have been handled

        app()
    except SystemExit as stop:  # Typer exits this way
        if isinstance(stop.__context__, OSError):  # a pipe or a socket failed, which Typer does not report
            return _explain(stop.__context__)
        return stop.code if isinstance(stop.code, int) else 1
    except RaydistillError as error:
        if not interrupts.was_interrupted():
            _say(str(error))
        return error.exit_code
    except Exception as error:
        return _explain(error)
    return 0


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(truncated(super().format(record), redacted))


def _say(message: str) -> None:
    for line in truncated(message, redacted).splitlines():
        print(f"error: {printable(line)}", file=sys.stderr)


def _explain(error: Exception) -> int:
    """Ray wraps the error of a task or an actor in its own classes. The raydistill error inside is the one to print."""
    if interrupts.was_interrupted():
        return 1  # an error that happened while another was handled
    inner: BaseException | None = error
    while inner is not None:
        for candidate in (inner, getattr(inner, "cause", None)):
            if isinstance(candidate, RaydistillError):
                _say(str(candidate))
                return candidate.exit_code
        inner = inner.__cause__
    # Of an error in a task of Ray Data only the text comes back.
    if found := re.findall(r"^raydistill\.errors\.(\w+): (.+)$", str(error), re.MULTILINE):
        name, message = found[-1]
        _say(message)
        return int(getattr(errors, name, errors.StageError).exit_code)
    if os.environ.get("RAYDISTILL_TRACEBACK"):
        traceback.print_exception(error)
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    _say(f"{type(error).__name__}: {lines[-1] if lines else ''} (RAYDISTILL_TRACEBACK=1 shows where)")
    return 1

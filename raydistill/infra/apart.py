"""Work on items one by one in a process apart, so that what kills its process is known by name.

A process that dies of a signal, as of a decoder's fault or for want of memory, says nothing of what it was at. So the
work that it had begun is done again here, where each item's result comes back before the next is sent.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from raydistill.errors import StageError
from raydistill.infra.memory import limit_decoders

T = TypeVar("T")
KILLED = "kills the process that decodes it"
_SERVE = "import sys; from raydistill.infra.apart import serve; serve(int(sys.argv[1]))"


class Killed(str):
    """Why an item has no result, as a reason to refuse it."""


def one_by_one(work: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T | Killed]:
    """The work's result for each item, in order; Killed of one that two processes died of by a signal, since one may be
    killed by somebody else. `work`, items and results are pickled.

    Raises what the work raises, and StageError where a process ends in another way.
    """
    done, deaths = 0, 0
    while done < len(items):
        ours, theirs = socket.socketpair()
        places = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *sys.path]))
        with Connection(ours.detach()) as pipe, subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True,
            env={**os.environ, "PYTHONPATH": places},
        ) as process:  # fmt: skip
            theirs.close()
            try:
                pipe.send(work)
                while done < len(items):
                    pipe.send(items[done])
                    result, error = pipe.recv()
                    if error is not None:
                        raise error
                    done, deaths = done + 1, 0
                    yield result
            except (EOFError, BrokenPipeError, ConnectionResetError):
                number, deaths = process.wait(), deaths + 1
                if number >= 0:
                    raise StageError(f"a process at work on {items[done]!r:.200} ended with {number}") from None
                if deaths > 1:
                    done, deaths = done + 1, 0
                    of = "; memory may have run out" if number == -signal.SIGKILL else ""
                    yield Killed(f"{KILLED}, twice, by {signal.Signals(-number).name}{of}")
            finally:
                process.kill()


def serve(descriptor: int) -> None:
    """The process's own side, until the other closes its end."""
    limit_decoders()
    with Connection(descriptor) as pipe:
        work = pipe.recv()
        while True:
            try:
                item = pipe.recv()
            except EOFError:
                return
            answer: tuple[Any, Exception | None]
            try:
                answer = work(item), None
            except Exception as error:
                answer = None, error
            pipe.send(answer)

"""Repeats a call in the background, in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def repeated(call: Callable[[], object], seconds: float, name: str, patience: float | None = None) -> Iterator[None]:
    """Call it every `seconds` seconds during a `with` block. The end of the block waits for an open call, but no longer
    than `patience` seconds, if given."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(seconds):
            call()

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(patience)

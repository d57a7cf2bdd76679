"""What a stranger may put into a file of weights."""

from __future__ import annotations

from pathlib import Path


class Malicious:
    """Its pickle makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)

"""Progress that a person can follow: bars with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from raydistill.infra.stillness import noticed

_SECONDS_BETWEEN_LINES = 10.0


class _Rate(TextColumn):
    def render(self, task: Task):  # type: ignore[no-untyped-def]
        speed = task.finished_speed or task.speed
        self.text_format = f"{speed:,.0f} {task.fields['unit']}/s" if speed else ""
        return super().render(task)


class Progress:
    """Shows one task at a time. `advance(count)` moves it; `advance(count, note)` adds a word on how it goes. A task
    that does not move for long is said to stand still, with what it waits for.

    `images_again` and `seconds_again` add up what was begun again because a process or its node was lost.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.images_again, self.seconds_again = 0, 0.0

    def again(self, name: str, images: int, seconds: float) -> None:
        """Count, and say, what had been begun and was lost; nothing is said of nothing."""
        if images:
            self.images_again, self.seconds_again = self.images_again + images, self.seconds_again + seconds
            self.line(f"{name:<9} {images:,} image(s) begun again, {seconds:.0f} s: a process or its node was lost")

    def line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
        show = self._bar if self.console.is_terminal else self._lines
        still = noticed(lambda words: self.line(f"{name:<9} {words}"))
        with show(name, total, unit, done) as advance, still as move:

            def advance_and_note(count: int, note: str | None = None) -> None:
                move()
                advance(count, note)

            yield advance_and_note

    @contextlib.contextmanager
    def _bar(self, name: str, total: int, unit: str, done: int) -> Iterator[Callable[..., None]]:
        columns = (
            TextColumn("{task.description:<9}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            _Rate(""),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=self.console) as bars:
            task = bars.add_task(name, total=total, completed=done, unit=unit, note="")

            def advance(count: int, note: str | None = None) -> None:
                fields = {} if note is None else {"note": note}
                bars.update(task, advance=count, **fields)  # type: ignore[arg-type]

            yield advance

    @contextlib.contextmanager
    def _lines(self, name: str, total: int, unit: str, done: int) -> Iterator[Callable[..., None]]:
        started, position, last, latest, said = time.monotonic(), done, time.monotonic(), "", (-1, "")

        def say() -> None:
            nonlocal said
            said = position, latest
            elapsed = max(time.monotonic() - started, 1e-9)
            rate = (position - done) / elapsed
            left = f", {(total - position) / rate:.0f} s left" if rate and position < total else ""
            shown = f"{position:,}/{total:,} {unit}, {rate:,.0f}/s, {elapsed:.0f} s{left}"
            self.line(f"{name:<9} {shown}{f', {latest}' if latest else ''}")

        def advance(count: int, note: str | None = None) -> None:
            nonlocal position, last, latest
            position, latest = position + count, latest if note is None else note
            if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                say()

        yield advance
        if said != (position, latest):  # a last step that took long had its line
            say()

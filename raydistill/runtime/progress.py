"""Progress that a person can follow: bars with speed and time left on a terminal and in a notebook, plain lines
elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from raydistill.escaping import counted, printable
from raydistill.runtime.idle import idle_noticed
from raydistill.runtime.periodic import repeated

_SECONDS_BETWEEN_LINES, _SECONDS_BETWEEN_BARS = 10.0, 0.5


# A speed is measured over the last minute, or over the last marks if those are older. Marks closer together than this
# many seconds count as one.
_WINDOW_SECONDS, _FEWEST_MARKS, _SECONDS_BETWEEN_MARKS = 60.0, 8, 0.25


class SpeedMeter:
    """The speed of work that comes in lumps: a shard, a batch, an epoch at a time.

    A lump is the work of the time since the one before it. A wait for the next one lowers the speed only when it is
    longer than the longest wait before, so the speed falls while nothing moves.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._units, self._began = clock, 0.0, clock()
        self._marks = deque([(self._began, 0.0)])  # when that many units were done

    def add(self, units: float) -> None:
        """Add the units done since the last call. What an earlier run had done does not count."""
        if not units:
            return
        now, self._units = self._clock(), self._units + units
        if len(self._marks) > 1 and now - self._marks[-2][0] < _SECONDS_BETWEEN_MARKS:
            self._marks.pop()
        self._marks.append((now, self._units))
        while len(self._marks) > _FEWEST_MARKS and self._marks[1][0] < now - _WINDOW_SECONDS:
            self._marks.popleft()

    def rate(self) -> float | None:
        """Units a second; None before the first."""
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        seconds = last - first + max(self._waiting() - self._longest_wait(), 0.0)
        return (after - before) / seconds if after > before and seconds > 0 else None

    def left(self, units: float) -> float | None:
        """Seconds until that many more are done, at this speed. The time since the last lump is part of the next."""
        rate = self.rate()
        return None if rate is None else max(units / rate - min(self._waiting(), self._longest_wait()), 0.0)

    def mean(self) -> float | None:
        """Units a second from the beginning to the last of them."""
        seconds = self._marks[-1][0] - self._began
        return self._units / seconds if self._units > 0 and seconds > 0 else None

    def _waiting(self) -> float:
        return self._clock() - self._marks[-1][0]

    def _longest_wait(self) -> float:
        times = [when for when, _ in self._marks]
        return max((after - before for before, after in pairwise(times)), default=0.0)


def speed_words(rate: float | None, unit: str) -> str:
    """`1,234 images/s`, `2.5 steps/s` or, for slower work, `100 s/step`; empty if nothing is known."""
    if rate is None:
        return ""
    value, per = (rate, f"{unit}/s") if rate >= 1 else (1 / rate, f"s/{unit.removesuffix('s')}")
    return f"{value:,.0f} {per}" if value >= 10 else f"{value:.1f} {per}"


def time_words(seconds: float) -> str:
    """`119 s`, `90 min`, `7.6 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


class _Speed(ProgressColumn):
    """Speed and time left of a bar. It is redrawn all the time, so both change even while nothing moves."""

    def render(self, task: Task) -> Text:
        meter, unit = task.fields["meter"], task.fields["unit"]
        if task.finished:
            return Text(speed_words(meter.mean(), unit))
        left = meter.left(task.remaining or 0.0)
        return Text(
            speed_words(meter.rate(), unit) + ("" if left is None else f", {timedelta(seconds=round(left))} left")
        )


@contextlib.contextmanager
def _in_notebook(bars: Bars) -> Iterator[None]:
    """One output of the cell, which changes. rich's own way needs ipywidgets, and a saved notebook has none of it."""
    from IPython.display import display

    output = display(bars, display_id=True)
    try:
        with repeated(lambda: output.update(bars), _SECONDS_BETWEEN_BARS, "bars"):
            yield
    finally:
        output.update(bars)


class Progress:
    """Shows one task at a time. `advance(count)` moves it; `advance(count, note)` adds a note on how it goes.

    If a task does not move for long, it reports that, and what the task waits for. `images_again` and `seconds_again`
    count work that was repeated because a process or its node was lost.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.images_again, self.seconds_again = 0, 0.0

    def again(self, name: str, images: int, seconds: float) -> None:
        """Count work that was lost and repeated, and report it, if there is any."""
        if images:
            self.images_again, self.seconds_again = self.images_again + images, self.seconds_again + seconds
            self.line(
                f"{name:<9} {counted(images, 'images')} begun again, {seconds:.0f} s: a process or its node was lost"
            )

    def line(self, text: str) -> None:
        if self.console.is_jupyter:  # where rich makes each line an output of its own
            print(printable(text), flush=True)
        else:
            self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
        """Gives `advance(count, note, worked)`. Units `done` before, or found done (`worked=False`), move the task but
        do not count for the speed."""
        has_bars = self.console.is_terminal or self.console.is_jupyter
        show, meter = self._bar if has_bars else self._lines, SpeedMeter(time.monotonic)
        idle = idle_noticed(lambda words: self.line(f"{name:<9} {words}"))
        with show(name, total, unit, done, meter) as advance, idle as move:

            def advance_and_note(count: int, note: str | None = None, worked: bool = True) -> None:
                move()
                meter.add(count if worked else 0)
                if count or note is not None:
                    advance(count, note)

            yield advance_and_note

    @contextlib.contextmanager
    def _bar(self, name: str, total: int, unit: str, done: int, meter: SpeedMeter) -> Iterator[Callable[..., None]]:
        columns = (
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _Speed(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        bars = Bars(*columns, console=self.console)
        task = bars.add_task(name, total=total, completed=done, unit=unit, note="", meter=meter)
        with _in_notebook(bars) if self.console.is_jupyter else bars:

            def advance(count: int, note: str | None = None) -> None:
                fields = {} if note is None else {"note": printable(note)}
                bars.update(task, advance=count, **fields)  # type: ignore[arg-type]

            yield advance

    @contextlib.contextmanager
    def _lines(self, name: str, total: int, unit: str, done: int, meter: SpeedMeter) -> Iterator[Callable[..., None]]:
        started, position, last, latest, said = time.monotonic(), done, time.monotonic(), "", (-1, "")

        def say() -> None:
            nonlocal said
            said = position, latest
            goes_on, elapsed = position < total, time.monotonic() - started
            speed = speed_words(meter.rate() if goes_on else meter.mean(), unit)
            left = meter.left(total - position) if goes_on else None
            parts = [f"{position:,}/{total:,} {unit}", speed, f"{elapsed:.0f} s"]
            parts += ["" if left is None else f"{time_words(left)} left", latest]
            self.line(f"{name:<9} {', '.join(part for part in parts if part)}")

        def advance(count: int, note: str | None = None) -> None:
            nonlocal position, last, latest
            position, latest = position + count, latest if note is None else note
            if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                say()

        yield advance
        if said != (position, latest):  # a slow last step has had its line
            say()

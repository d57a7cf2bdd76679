"""What a search shows while it runs: a live table or lines, an MLflow run for each trial, and the clock."""

from __future__ import annotations

import contextlib
import functools
import time
import uuid
from collections import Counter
from collections.abc import Iterator

import optuna
from rich.live import Live
from rich.table import Table

from raydistill.config import RunConfig
from raydistill.engine.records import read_epochs
from raydistill.escaping import one_line, shortened
from raydistill.runtime.progress import Progress
from raydistill.search.space import Choice
from raydistill.search.study import SECONDS_OF, Trial, directory_of, logged, ranked, seconds_noted
from raydistill.storage.directory import workspace_root
from raydistill.tracking.recording import ChildRun
from raydistill.tracking.tracker import Tracker

_SECONDS_BETWEEN_NOTES = 10.0


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class Clock:
    """The time that all commands have spent on a search. Each keeps storing its own time in the study, so a killed
    command counts too."""

    def __init__(self, study: optuna.Study) -> None:
        self._study, self._mine = study, f"{SECONDS_OF}{uuid.uuid4().hex}"
        self._began = self._noted = time.monotonic()

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *error: object) -> None:
        self.note()

    def tick(self) -> None:
        """Call it at every event; it stores the time now and then."""
        if time.monotonic() - self._noted > _SECONDS_BETWEEN_NOTES:
            self.note()

    def note(self) -> None:
        self._noted = time.monotonic()
        self._study.set_user_attr(self._mine, self._noted - self._began)

    @property
    def seconds(self) -> float:
        """The time of all commands, with this one's until now."""
        self.note()
        return seconds_noted(self._study)


class SearchDisplay:
    """Shows the search: a live table on a terminal, or else a line for each trial, and an MLflow run for each trial.

    `trials` are those begun so far; there will be `most`.
    """

    def __init__(self, config: RunConfig, progress: Progress, trials: list[Trial], most: int, clock: Clock) -> None:
        self._config, self._progress, self._most, self._clock = config, progress, most, clock
        self._ended = {t.number: t for t in trials if t.state != "running"}
        self._running: dict[int, tuple[dict[str, Choice], dict[str, float]]] = {}
        self._runs: dict[int, ChildRun] = {}
        self._tracker: Tracker | None = None
        self._live: Live | None = None
        self._began, self._ended_before = time.monotonic(), len(self._ended)

    @property
    def left(self) -> int:
        return max(self._most - len(self._ended), 0)

    def record_ended(self, tracker: Tracker) -> None:
        """Complete the MLflow runs of ended trials: MLflow's writer lags behind the study, so a killed command leaves
        some incomplete."""
        for trial in self._ended.values():
            run = ChildRun(tracker, _run_name(trial.number), ended=_status(trial))
            run.params({**trial.choices, "own values": trial.own})
            if directory := directory_of(trial, workspace_root(self._config)):
                run.log_each(functools.partial(_epochs, directory))
            self._close(run, trial)

    @contextlib.contextmanager
    def shown(self, tracker: Tracker) -> Iterator[None]:
        """Show the search while trials run. The MLflow run of an interrupted trial ends as killed."""
        self._tracker, self._began = tracker, time.monotonic()
        console = self._progress.console
        live = Live(self._table(), console=console, auto_refresh=False) if console.is_terminal else None
        try:
            with live or contextlib.nullcontext() as self._live:
                yield
        except BaseException:
            for run in self._runs.values():
                run.end("KILLED")
            raise
        finally:
            self._live = None

    def started(self, number: int, choices: dict[str, Choice], own: bool) -> None:
        self._running[number] = (choices, {})
        if self._tracker is not None:
            run = self._runs[number] = ChildRun(self._tracker, _run_name(number))
            run.params({**choices, "own values": own})
        self._news()

    def measured(self, number: int, record: dict[str, float]) -> None:
        choices, before = self._running[number]
        self._running[number] = (choices, {**before, **record})  # some epochs measure less
        if number in self._runs:
            self._runs[number].log(record, int(record.get("step", 0)))
        self._news()

    def ended(self, trial: Trial) -> None:
        self._running.pop(trial.number, None)
        self._ended[trial.number] = trial
        if run := self._runs.pop(trial.number, None):
            self._close(run, trial)
        if self._live is None:
            self._progress.line(f"tune  {self._line(trial)}; {self._summary()}")
        self._news()

    def _close(self, run: ChildRun, trial: Trial) -> None:
        names = self._config.tune.objectives
        run.log({"seconds": trial.seconds} | dict(zip(names, trial.values or (), strict=False)))
        run.note({"state": trial.state, "reason": trial.reason})
        run.end(_status(trial))

    def _line(self, trial: Trial) -> str:
        what = trial.state if trial.values is None else " ".join(f"{value:.4g}" for value in trial.values)
        if trial.state == "pruned":
            what += f" after epoch {trial.epochs}"
        own = ", the job's own values" if trial.own else ""
        return f"trial {trial.number}{own}: {what}, {trial.seconds:.0f} s{f' ({trial.reason})' if trial.reason else ''}"

    def _summary(self) -> str:
        counts = Counter(trial.state for trial in self._ended.values())
        words = [f"best {(best.values or [0.0])[0]:.4g} (trial {best.number})" for best in self._best()[:1]]
        words += [f"{len(self._ended)} of {self._most} ended"]
        words += [f"{counts[state]} {state}" for state in ("pruned", "failed") if counts[state]]
        now = len(self._ended) - self._ended_before
        if now and self.left:
            words.append(f"about {minutes((time.monotonic() - self._began) / now * self.left)} left")
        return ", ".join(words)

    def _best(self) -> list[Trial]:
        return ranked(self._ended.values(), self._config.tune.objectives)

    def _news(self) -> None:
        self._clock.tick()
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        table = Table(title=f"tune: {self._summary()}", box=None, pad_edge=False, title_justify="left")
        for title in ("trial", "state", self._config.tune.objectives[0], "seconds", "settings"):
            table.add_column(title)
        for number, (choices, record) in self._running.items():
            at = f"epoch {record['epoch']:.0f}" if record else "starting"
            value = record.get(self._config.tune.objectives[0])
            table.add_row(str(number), at, "" if value is None else f"{value:.4g}", "", settings_words(choices))
        for trial in self._best()[:5]:
            assert trial.values is not None
            words = "the job's own values" if trial.own else settings_words(trial.choices)
            table.add_row(str(trial.number), trial.state, f"{trial.values[0]:.4g}", f"{trial.seconds:.0f}", words)
        return table


def _epochs(directory: str) -> list[tuple[dict[str, float], int]]:
    return [(logged(record), int(record["step"])) for record in read_epochs(directory)]


def _run_name(number: int) -> str:
    return f"trial {number:05d}"


def _status(trial: Trial) -> str:
    return "FAILED" if trial.state == "failed" else "FINISHED"


def settings_words(choices: dict[str, Choice]) -> str:
    """Each by the last part of its key."""
    names = {key: one_line(key.rpartition(".")[2]) for key in choices}
    return " ".join(f"{names[k]}={v:.3g}" if isinstance(v, float) else f"{names[k]}={shortened(one_line(str(v)))}"
                    for k, v in choices.items())  # fmt: skip

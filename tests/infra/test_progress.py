"""What a person is told of work that goes on, and of work that does not."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from raydistill.infra import progress, stillness
from raydistill.infra.progress import Progress
from tests.processes import wait_for
from tests.stages.conftest import ray_session

__all__ = ["ray_session"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stillness, "_SECONDS", 0.3)
    monkeypatch.setattr(stillness, "_SECONDS_BETWEEN_LOOKS", 0.01)


@pytest.mark.usefixtures("impatient")
def test_what_stands_still_is_said_to_at_each_doubling_of_the_time() -> None:
    said = io.StringIO()
    with Progress(Console(file=said)).task("teach", 8, "images") as advance:
        for _ in range(20):
            advance(0)
            time.sleep(0.03)
        assert not said.getvalue(), "it moved all the time"
        time.sleep(2)
        advance(8)
    still = re.findall(r"teach     nothing has moved for (\d) s", said.getvalue())
    assert still == ["0", "1", "1"]  # 0.3, 0.6 and 1.2 seconds, rounded


@pytest.mark.parametrize(("note", "lines"), [(None, 1), ("val 0.5", 2)])
def test_the_last_line_is_said_once(note: str | None, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    said = io.StringIO()
    with Progress(Console(file=said)).task("export", 4, "steps") as advance:
        advance(4)
        monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 60.0)
        advance(0, note)
    assert said.getvalue().count("4/4 steps") == lines
    assert (note or "") in said.getvalue()


@pytest.mark.usefixtures("impatient")
def test_a_bar_goes_on_below_the_words() -> None:
    said = io.StringIO()
    with Progress(Console(file=said, force_terminal=True, width=100)).task("teach", 8, "images") as advance:
        wait_for(lambda: "nothing has moved" in said.getvalue())
        advance(8)
    assert "100%" in said.getvalue()


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session")
def test_what_waits_is_named_with_what_is_free() -> None:
    import ray

    @ray.remote(num_cpus=0, resources={"spot": 3})
    def never() -> None: ...

    asked = [never.remote(), never.remote()]
    wait_for(lambda: "waits" in stillness.waiting_words())
    assert stillness.waiting_words() == "; Ray waits to place 2 x {spot: 3}; free: none of it"
    for task in asked:
        ray.cancel(task)
    wait_for(lambda: stillness.waiting_words() == "; all that Ray was asked to place is running")
    cpus = [ray.remote(num_cpus=99)(lambda: None).remote()]
    wait_for(lambda: "waits" in stillness.waiting_words())
    assert re.fullmatch(r"; Ray waits to place 1 x \{CPU: 99\}; free: CPU \d of 2", stillness.waiting_words())
    ray.cancel(cpus[0])

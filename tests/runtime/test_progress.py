"""What a person is told of work that goes on, and of work that does not."""

from __future__ import annotations

import io
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from raydistill.runtime import idle, progress
from raydistill.runtime.progress import Progress, SpeedMeter, speed_words, time_words
from tests.processes import wait_for


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_SECONDS", 0.3)
    monkeypatch.setattr(idle, "_SECONDS_BETWEEN_LOOKS", 0.01)


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


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@settings(max_examples=40)
@given(rate=st.floats(0.005, 5e4), every=st.floats(0.01, 900), lumps=st.integers(1, 200), seen=st.floats(0, 1))
def test_a_steady_speed_is_told_as_it_is_however_large_the_lumps_are(rate, every, lumps, seen) -> None:
    """At any moment between two of them, for as long as the next is not late."""
    clock = Clock()
    meter = SpeedMeter(clock)
    for _ in range(lumps):
        assert meter.rate() == pytest.approx(rate, rel=1e-6) if meter.mean() else meter.rate() is None
        clock.now += every
        meter.add(rate * every)
    clock.now += seen * every
    assert meter.rate() == pytest.approx(meter.mean(), rel=1e-6) == pytest.approx(rate, rel=1e-6)
    assert meter.left(100 * rate * every) == pytest.approx((100 - seen) * every, rel=1e-6)


@given(every=st.floats(0.5, 100), stands=st.lists(st.floats(0.1, 1e4), min_size=2, max_size=9))
def test_the_time_left_moves_and_the_speed_falls_while_nothing_comes(every, stands) -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    for _ in range(5):
        clock.now += every
        meter.add(18)
    before = (meter.left(10**6), meter.rate())
    for seconds in stands:
        late = clock.now - (1000 + 5 * every) > 1.001 * every
        clock.now += seconds
        left, rate = meter.left(10**6), meter.rate()
        assert left != before[0]
        assert rate < before[1] if late else rate <= before[1] * (1 + 1e-9)
        before = left, rate


def test_a_speed_that_changes_is_followed_within_a_minute() -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    for rate in (400, 20):
        for _ in range(700):
            clock.now += 0.1
            meter.add(rate / 10)
        assert meter.rate() == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize(
    ("rate", "words"),
    [(None, ""), (0.01, "100 s/step"), (0.4, "2.5 s/step"), (1.0, "1.0 steps/s"), (18.2, "18 steps/s"),
     (28876.0, "28,876 steps/s"), (1e-5, "100,000 s/step")],
)  # fmt: skip
def test_a_speed_in_words_is_never_nothing_a_second(rate, words) -> None:
    assert speed_words(rate, "steps") == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (119, "119 s"), (121, "2 min"), (7199, "120 min"), (27416, "7.6 h")]
)
def test_times_are_said_in_the_unit_of_their_size(seconds, words) -> None:
    assert time_words(seconds) == words


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(("each", "seconds", "speed"), [(36, 2.0, "18 views/s"), (1, 100.0, "100 s/view")])
def test_what_was_done_before_is_no_speed(terminal, each, seconds, speed, monkeypatch) -> None:
    """Neither what a killed run had done, nor what is found done on the way: both are told of at once."""
    clock, said = Clock(), io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    monkeypatch.setattr(idle, "_SECONDS", 1e9)
    with Progress(Console(file=said, force_terminal=terminal, width=140)).task(
        "teach", 10**6, "views", 28876
    ) as advance:
        advance(50_000, worked=False)
        for _ in range(10):
            clock.now += seconds
            advance(each)
        if terminal:  # what stands there is drawn when the block ends
            clock.now += seconds / 2
    shown = said.getvalue()
    assert speed in shown
    assert set(re.findall(r"[\d,.]+ (?:views/s|s/view)", shown)) == {speed}
    left = (10**6 - 78_876 - 10 * each) / each * seconds
    if not terminal:
        assert (
            f"{78_876 + 10 * each:,}/1,000,000 views, {speed}, {10 * seconds:.0f} s, {left / 3600:,.1f} h left" in shown
        )


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session")
def test_what_waits_is_named_with_what_is_free() -> None:
    import ray

    @ray.remote(num_cpus=0, resources={"spot": 3})
    def never() -> None: ...

    asked = [never.remote(), never.remote()]
    wait_for(lambda: "waits" in idle.waiting_words())
    assert idle.waiting_words() == "; Ray waits to place 2 x {spot: 3}; free: none of it"
    for task in asked:
        ray.cancel(task)
    wait_for(lambda: idle.waiting_words() == "; all that Ray was asked to place is running")
    cpus = [ray.remote(num_cpus=99)(lambda: None).remote()]
    wait_for(lambda: "waits" in idle.waiting_words())
    assert re.fullmatch(r"; Ray waits to place 1 x \{CPU: 99\}; free: CPU \d of 2", idle.waiting_words())
    ray.cancel(cpus[0])

"""What kills its process is known by name, a process that somebody else killed costs nothing, and none is left over."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image, features

from raydistill.data.decode import working_images
from raydistill.data.isolation import Killed, end_processes, map_isolated, run_isolated
from raydistill.errors import StageError


def squares(
    items: Sequence[int], *, dies: dict[int, int] | None = None, once: str = "", ends: int | None = None
) -> Iterator[int]:
    """Here by name, since it is pickled. `once`: a file that says that it has died already."""
    for item in items:
        if item == ends:
            os._exit(3)
        if dies and item in dies and not (once and Path(once).exists()):
            if once:
                Path(once).touch()
            os.kill(os.getpid(), dies[item])
        if item < 0:
            raise ValueError(f"{item} is negative")
        yield item * item


def pids(items: Sequence[float]) -> Iterator[int]:
    for item in items:
        time.sleep(item)
        yield os.getpid()


def test_of_many_those_that_kill_are_named_and_the_others_have_results():
    dies: dict[int, int] = {1: signal.SIGSEGV, 2: signal.SIGABRT, 4: signal.SIGKILL}
    found = run_isolated(partial(squares, dies=dies), range(6))
    assert [None if isinstance(one, Killed) else one for one in found] == [0, None, None, 9, None, 25]
    assert ["SIGSEGV" in found[1], "SIGABRT" in found[2], "SIGKILL; memory may" in found[4]] == [True] * 3


def test_what_was_killed_once_by_somebody_else_has_its_result(tmp_path):
    for items in ([0, 1, 2], [1]):
        work = partial(squares, dies={1: signal.SIGKILL}, once=str(tmp_path / f"once{len(items)}"))
        assert run_isolated(work, items) == [item * item for item in items]
    (idle,) = set(run_isolated(pids, [0]))
    os.kill(idle, signal.SIGKILL)
    assert run_isolated(pids, [0, 0])[0] != idle


def test_other_ends_and_exceptions_are_no_killers():
    with pytest.raises(StageError, match="worked on 2 items, 0 the first, ended with 3"):
        run_isolated(partial(squares, ends=1), [0, 1])
    with pytest.raises(ValueError, match="-2 is negative"):
        run_isolated(squares, [1, -2])
    assert run_isolated(squares, []) == []
    assert run_isolated(squares, [3]) == [9], "the process whose work went wrong has the next"


def test_processes_outlive_their_work_and_parts_come_in_order():
    parts = [[k, k + 1] for k in range(0, 40, 2)]
    assert list(map_isolated(squares, parts, 3)) == [(part, [k * k for k in part]) for part in parts]
    used = {pid for _, found in map_isolated(pids, [[0.0]] * 20, 2) for pid in found}
    assert used & {pid for _, found in map_isolated(pids, [[0.0]] * 20, 2) for pid in found}
    assert len(used) <= 3


def test_work_that_is_left_is_ended_and_no_other():
    end_processes()  # of the tests before
    with ThreadPoolExecutor(1) as other:
        others = other.submit(run_isolated, pids, [2.0])
        began, many = time.monotonic(), map_isolated(pids, [[0.0], [60.0], [60.0], [60.0]], 2)
        next(many)
        many.close()
        assert time.monotonic() - began < 10
        (survivor,) = others.result()
    left = [one.pid for one in psutil.Process().children() if "raydistill.data.isolation" in " ".join(one.cmdline())]
    assert survivor in left
    assert len(left) <= 2, "the one that did the first part may not have had another"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGKILL, -9)])
def test_processes_at_work_end_with_their_command(number, code):
    script = """if True:
        import time
        from raydistill.runtime import interrupts
        from raydistill.data.isolation import map_isolated
        from tests.data.test_isolation import pids
        interrupts.handle_signals()
        try:
            for _, found in map_isolated(pids, [[0.0], [0.0], [0.0], [60.0], [60.0], [60.0]], 2):
                print(*found, flush=True)
        finally:
            interrupts.exit_process(0)
    """
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        command.stdout.readline()
        children = psutil.Process(command.pid).children()
        assert children
        command.send_signal(number)
        assert command.wait(timeout=15) == code
        assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.mark.skipif(
    sys.platform != "linux" or not features.check("avif") or (os.cpu_count() or 1) > 4,
    reason="no AVIF, no limit of this kind, or so many cores that their stacks alone are larger than the picture",
)
def test_an_avif_larger_than_its_header_says_finds_no_memory():
    rng, sink = np.random.default_rng(0), io.BytesIO()
    whole = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((5_000, 4_000))
    whole.save(sink, "AVIF", speed=10, quality=20)
    data = sink.getvalue()
    size = data.index(b"ispe") + 8
    false = data[:size] + struct.pack(">II", 64, 64) + data[size + 8 :]
    end_processes()  # what another picture has left behind may be used
    bad, good = run_isolated(partial(working_images, size=32, fit="crop", max_pixels=10**8), [false, data])
    assert np.abs(good.astype(int) - np.asarray(whole.resize((32, 32), box=(500, 0, 4500, 4000)))).mean() < 10
    assert "cannot be decoded" in bad


def test_no_file_of_the_folder_one_stands_in_is_imported(tmp_path):
    (tmp_path / "strange").mkdir()
    for name in ("PIL", "numpy", "selectors", "raydistill", "usercustomize"):
        (tmp_path / "strange" / f"{name}.py").write_text("open('ran', 'w')")
    (tmp_path / "script.py").write_text(
        "from operator import methodcaller\n"
        "from raydistill.data.isolation import run_isolated\n"
        "print(run_isolated(methodcaller('copy'), [1, 2]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", tmp_path / "script.py"], cwd=tmp_path / "strange", capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, check=False,
    )  # fmt: skip
    assert done.stdout == "[1, 2]\n", done.stderr
    assert not (tmp_path / "strange" / "ran").exists()

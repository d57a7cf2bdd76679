"""One command at a time in a stage directory: on a disk and in a bucket, in threads and in processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raydistill.errors import CheckpointError, StageError
from raydistill.storage import lease
from raydistill.storage.directory import StageDirectory
from raydistill.storage.filesystems import create_file, write_bytes
from raydistill.storage.lease import held, is_held
from tests.processes import wait_for

ELSEWHERE = "another-machine pid:[1] 7 1"


@pytest.fixture(params=["disk", "bucket"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> StageDirectory:
    root = str(tmp_path) if request.param == "disk" else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    return StageDirectory(f"{root}/teach-0123456789ab", "teach", "{}")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEATS": 0.1, "LOOKS": 0.05}.items():
        monkeypatch.setattr(lease, f"_SECONDS_BETWEEN_{name}", seconds)
    monkeypatch.setattr(lease, "_SILENT_SECONDS", 1.0)


def leases(directory: StageDirectory) -> list[str]:
    return [name for name in directory.fs.names(directory.place) if name.startswith("lease-")]


def test_of_many_that_come_at_once_one_works_and_the_others_find_it_done(directory: StageDirectory) -> None:
    working, done_by, said = threading.Semaphore(1), [], []

    def command(number: int) -> None:
        with held(directory, said.append) as is_to_do:
            assert working.acquire(blocking=False), "two hold the lease"
            if is_to_do:
                done_by.append(number)
                directory.finish({"path": directory.path, "by": number})
            working.release()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(command, range(6)))
    assert len(done_by) == 1
    assert directory.done() == {"path": directory.path, "by": done_by[0]}
    assert leases(directory) == []


def test_a_stage_that_failed_is_free_again(directory: StageDirectory) -> None:
    def command() -> None:
        with held(directory, print) as is_to_do:
            assert is_to_do
            raise ValueError("failed")

    for _ in range(2):
        with pytest.raises(ValueError, match="failed"):
            command()
    with held(directory, print) as is_to_do:
        assert is_to_do


def test_a_waiting_command_says_for_whom(directory: StageDirectory) -> None:
    said: list[str] = []
    with held(directory, print):
        waiting = threading.Thread(target=lambda: held(directory, said.append).__enter__(), daemon=True)
        waiting.start()
        wait_for(lambda: said, 20)
    waiting.join(20)
    assert len(said) == 1
    assert said[0].startswith("teach     waits for process ")
    assert directory.path in said[0]


HOLD = """
import sys
from raydistill.storage.directory import StageDirectory
from raydistill.storage.lease import held, is_held
with held(StageDirectory(sys.argv[1], "teach", "{}"), print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda n: n.name)
def test_a_process_of_this_machine_is_dead_or_alive(directory: StageDirectory, number: signal.Signals) -> None:
    """However long it is silent: one that stands still may go on."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, directory.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    holder.send_signal(number)
    entered, said = threading.Event(), []

    def wait() -> None:
        with held(directory, said.append):
            entered.set()

    waiting = threading.Thread(target=wait, daemon=True)
    try:
        if number is signal.SIGKILL:
            holder.wait()
            waiting.start()
            assert entered.wait(20)
        else:
            waiting.start()
            wait_for(lambda: said, 20)
            assert not entered.wait(2 * lease._SILENT_SECONDS)
    finally:
        holder.kill()
        holder.wait()
    waiting.join(20)
    assert entered.is_set()


def test_another_machine_s_lease_is_taken_over_when_it_is_silent(directory: StageDirectory) -> None:
    state = {"id": "theirs", "process": ELSEWHERE, "beats": 0}
    directory.begin()
    create_file(f"{directory.path}/lease-000001", json.dumps(state).encode())
    ended, entered = threading.Event(), threading.Event()

    def alive() -> None:
        while not ended.wait(0.2):
            state["beats"] += 1
            write_bytes(f"{directory.path}/lease-000001", json.dumps(state).encode())

    def command() -> None:
        with held(directory, print) as is_to_do:
            assert is_to_do
            entered.set()

    threads = [threading.Thread(target=alive), threading.Thread(target=command)]
    for thread in threads:
        thread.start()
    assert not entered.wait(2.5 * lease._SILENT_SECONDS), "it beats, whatever its clock says"
    ended.set()
    assert entered.wait(20)
    for thread in threads:
        thread.join(20)


def test_a_holder_that_was_taken_for_dead_does_not_end_well(directory: StageDirectory) -> None:
    def command() -> None:
        with held(directory, print):
            create_file(f"{directory.path}/lease-000002", b"{}")
            wait_for(lambda: not any(thread.name == "lease" for thread in threading.enumerate()), 20)

    with pytest.raises(StageError, match="another command took over this stage"):
        command()
    assert "lease-000002" in leases(directory), "the other's is left alone"


def test_the_holder_s_own_damaged_lease_is_written_again(directory: StageDirectory) -> None:
    with held(directory, print) as is_to_do:
        assert is_to_do
        write_bytes(f"{directory.path}/lease-000001", b"{")
        wait_for(lambda: lease._latest(directory)[1].get("beats"), 20)


@pytest.mark.parametrize("left", [b"", b"{", b"\xff", "a folder"])
def test_a_lease_that_is_cut_off_is_somebody_s_until_it_is_silent(tmp_path: Path, left: bytes | str) -> None:
    directory = StageDirectory(str(tmp_path / "teach-0123456789ab"), "teach", "{}")
    directory.begin()
    place = Path(directory.path, "lease-000001")
    if isinstance(left, str):
        place.mkdir()
        (place / "photo.png").touch()
    else:
        place.write_bytes(left)
    said: list[str] = []
    with held(directory, said.append) as is_to_do:
        assert is_to_do
        assert "lease-000002" in leases(directory)
        directory.finish({"path": directory.path})
    assert len(said) == 1
    assert f"{directory.path}/lease-000001 is damaged" in said[0]
    assert (place / "photo.png").exists() == (left == "a folder"), "what is no lease is nobody's to delete"


def test_who_looks_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "teach-0123456789ab").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"teach-0123456789ab is a link to .*elsewhere"):
        is_held(str(tmp_path / "teach-0123456789ab"))

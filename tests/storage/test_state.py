"""State files of a workspace that anybody may have written: what is of another form is one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from raydistill.engine.checkpoints import latest_step
from raydistill.engine.records import read_epochs, read_progress
from raydistill.errors import CheckpointError
from raydistill.stages.generate import generated_from_json
from raydistill.storage import filesystems
from raydistill.storage.directory import StageDirectory, read_bill
from raydistill.storage.lease import held
from raydistill.storage.state import parsed, read_state

DAMAGED = {
    "cut off": b'{"step": 1',
    "empty": b"",
    "another type": b"[1, 2]",
    "deep": b'{"step": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"step": ' * 50_000 + b"1" + b"}" * 50_000,
    "many digits": b'{"step": ' + b"9" * 5_000 + b"}",
    "no number": b'{"step": NaN}',
    "infinite": b'{"step": Infinity}',
    "infinite by its exponent": b'{"step": 1e999}',
    "a key twice": b'{"step": 1, "step": 2}',
    "one of many keys twice": json.dumps({f"k{k}": k for k in range(200_000)} | {"step": 1}).encode()[:-1]
    + b', "k7": 0}',
    "a key twice, inside": b'{"step": 1, "node_seconds": {"a": 1, "a": 2}}',
    "latin-1": b'{"step": 1, "caf\xe9": 1}',
    "utf-16": '{"step": 1}'.encode("utf-16"),
    "half a character": b'{"step": 1, "a": "\\ud800"}',
    "NULs": b"\0" * 64,
    "a NUL behind it": b'{"step": 1}\0',
    "too large": b'{"step": 1, "a": "' + b"x" * 2_000 + b'"}',
}


def make(place: Path, damage: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if damage == "a pipe":
        os.mkfifo(place)
    elif damage == "a folder":
        place.mkdir()
    elif damage == "a device":
        place.symlink_to("/dev/zero")
    else:
        place.write_bytes(DAMAGED[damage])


@pytest.mark.parametrize("damage", [*DAMAGED, "a pipe", "a folder", "a device"])
def test_what_is_damaged_is_named_in_one_sentence(tmp_path: Path, damage: str) -> None:
    make(tmp_path / "w/state.json", damage)
    most = 1_000 if damage == "too large" else 1_000_000
    with pytest.raises(CheckpointError) as refused:
        read_state(f"{tmp_path}/w/state.json", dict[str, Any], most_bytes=most)
    words = str(refused.value)
    assert words.startswith(f"{tmp_path}/w/state.json is not what raydistill writes (")
    assert words.endswith(f"; delete {tmp_path}/w and run the command again")
    assert len(words) < 400 + 2 * len(str(tmp_path))
    assert words.isprintable()
    assert refused.value.exit_code == 2


def test_too_many_values_are_refused_before_any_is_made(tmp_path: Path) -> None:
    names = ['tench, Tinca tinca, of class \\ {"a": []}'] * (1 << 19)
    assert parsed(json.dumps({"classes": names}), dict[str, Any]) == {"classes": names}
    (tmp_path / "DONE").write_bytes(b'{"path": "", "classes": [{}' + b",{}" * (1 << 20) + b"]}")
    tracemalloc.start()
    with pytest.raises(
        CheckpointError, match=r"DONE is not what raydistill writes \(it holds more than 2,097,152 values"
    ):
        read_state(f"{tmp_path}/DONE", dict[str, Any])
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 20e6


def test_what_is_whole_is_read_and_what_is_not_there_is_none(tmp_path: Path) -> None:
    tree = {"step": 3, "names": ["café", "a\tb"], "deep": [[[{"a": None}]]], "share": 0.25}
    (tmp_path / "state.json").write_text(json.dumps(tree))
    assert read_state(f"{tmp_path}/state.json", dict[str, Any]) == tree
    assert read_state(f"{tmp_path}/nothing.json", dict[str, Any]) is None


@pytest.mark.parametrize(("number", "passes"), [(errno.ESTALE, True), (errno.EMFILE, False), (errno.EACCES, False)])
def test_what_the_system_says_of_itself_has_nothing_deleted(tmp_path, monkeypatch, number: int, passes: bool) -> None:
    (tmp_path / "state.json").write_text("{}")
    really, failures = filesystems.open_file, [OSError(number, os.strerror(number))]

    def fails_once(path: str) -> Any:
        if failures:
            raise failures.pop()
        return really(path)

    monkeypatch.setattr(filesystems, "open_file", fails_once)
    with contextlib.nullcontext() if passes else pytest.raises(OSError, match=os.strerror(number)):
        assert read_state(f"{tmp_path}/state.json", dict[str, Any]) == {}


@pytest.mark.parametrize("damage", ["deep", "many digits", "no number", "a key twice", "half a character", "a pipe"])
@pytest.mark.parametrize("file", ["DONE", "seconds.json", "progress.json", "epochs/00001.json"])
def test_every_reader_of_a_stage_directory_refuses_it(tmp_path: Path, file: str, damage: str) -> None:
    make(tmp_path / "distill-0123456789ab" / file, damage)
    path = f"{tmp_path}/distill-0123456789ab"
    readers = {
        "DONE": StageDirectory(path, "distill", "{}").done,
        "seconds.json": lambda: read_bill(path),
        "progress.json": lambda: read_progress(path),
        "epochs/00001.json": lambda: read_epochs(path),
    }
    with pytest.raises(CheckpointError, match=f"{file} is not what raydistill writes"):
        readers[file]()


@pytest.mark.parametrize("record", [{"step": 4.0}, {"epoch": 1.0}, {"epoch": -1.0, "step": 4.0}])
def test_the_record_of_an_epoch_counts(tmp_path: Path, record: dict[str, float]) -> None:
    (tmp_path / "epochs").mkdir()
    good = {"epoch": 1.0, "step": 4.0, "loss": float("nan")}  # fp16 passes over steps whose loss is not a number
    (tmp_path / "epochs/00001.json").write_text(json.dumps(good))
    assert [set(one) for one in read_epochs(str(tmp_path))] == [set(good)]
    (tmp_path / "epochs/00002.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="is not a count"):
        read_epochs(str(tmp_path))


@pytest.mark.parametrize("damage", sorted(set(DAMAGED) - {"too large"}))
def test_damaged_checkpoints_are_passed_over_and_damaged_leases_end_nothing(tmp_path, caplog, damage) -> None:
    directory = StageDirectory(f"{tmp_path}/distill-0123456789ab", "distill", "{}")
    make(Path(directory.path, "checkpoints/newest.json"), damage)
    assert latest_step(directory.path) == 0
    assert "training starts from the first step" in caplog.text
    Path(directory.path, "checkpoints/newest.json").write_text('["step-000000004"]')
    make(Path(directory.path, "checkpoints/step-000000004/checkpoint.json"), damage)
    assert latest_step(directory.path) == 0
    assert "step-000000004" in caplog.text
    make(Path(directory.path, "lease-000001"), damage)
    Path(directory.path, "lease-000002").write_text(json.dumps({"id": "a", "process": "x", "released": True}))
    (Path(directory.path) / f"lease-{'9' * 5000}"[:200]).touch()
    released = {"id": "a", "process": "host - 1 2", "beats": 1, "released": True}
    Path(directory.path, "lease-000003").write_text(json.dumps(released))
    with held(directory, lambda line: None) as is_to_do:
        assert is_to_do


def test_the_samples_of_generated_images_lie_where_the_marker_does(tmp_path: Path) -> None:
    samples = {
        "path": "/home/ann/.ssh", "classes": ["a"], "size": 8, "shards": {"train": [1]}, "num_labelled": {"train": 1},
        "num_refused": 0, "ids": {"train": "i"}, "labels": {"train": "l"},
    }  # fmt: skip
    done = {"wanted": {"a": 1}, "kept": {"a": 1}, "missing": {}, "rejected": {}, "actor_seconds": 1.0}
    for told in (samples, {name: value for name, value in samples.items() if name != "path"}):  # today's, and before
        found = generated_from_json({**done, "samples": told, "path": "/elsewhere"}, str(tmp_path))
        assert dataclasses.asdict(found)["samples"]["path"] == str(tmp_path)

"""The SQLite store of a workspace that may be a stranger's."""

import contextlib
import shutil
import sqlite3
import struct
from pathlib import Path

import pytest

from raydistill.tracking.stores import UnusableError
from raydistill.tracking.workspace_store import refuse_programs


def store(folder: Path) -> Path:
    path = folder / "mlflow.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("create table runs (run_uuid text)")
        database.commit()
    return path


def journal(name: bytes) -> bytes:
    """A journal without pages that names another."""
    magic = bytes.fromhex("d9d505f920a163d7")
    head = (magic + struct.pack(">5I", 0, 0, 2, 512, 4096)).ljust(512, b"\0")
    return head + struct.pack(">I", 0) + name + struct.pack(">2I", len(name), sum(name)) + magic


@pytest.mark.parametrize("has_store", [True, False])
def test_a_journal_that_names_another_file_deletes_none(tmp_path, has_store) -> None:
    path, victim = store(tmp_path) if has_store else tmp_path / "mlflow.db", tmp_path / "precious"
    victim.write_text("all I have")
    (tmp_path / "mlflow.db-journal").write_bytes(journal(bytes(victim)))
    with pytest.raises(UnusableError, match=r"mlflow\.db-journal, that names another file, which SQLite would delete"):
        refuse_programs(f"sqlite:///{path}")
    assert victim.exists()
    assert (tmp_path / "mlflow.db-journal").exists()
    if has_store:  # else this test would show nothing
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("select * from runs").fetchall()
        assert not victim.exists()


def test_a_store_that_another_process_writes_to_is_used(tmp_path) -> None:
    path = store(tmp_path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("begin immediate")
        database.execute("insert into runs values ('a')")
        assert (tmp_path / "mlflow.db-journal").exists()
        refuse_programs(f"sqlite:///{path}")
    (tmp_path / "mlflow.db-journal").mkdir()
    with pytest.raises(UnusableError, match=r"has a journal, .* that cannot be read"):
        refuse_programs(f"sqlite:///{path}")


def test_a_store_that_a_killed_process_left_half_written_is_used(tmp_path) -> None:
    path, copy = store(tmp_path), tmp_path / "copy"
    copy.mkdir()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("insert into runs values ('whole')")
        database.execute("pragma cache_size = 1")  # so that pages are written before the end
        database.execute("begin")
        database.executemany("insert into runs values (?)", [("half" * 100,)] * 1000)
        for name in ("mlflow.db", "mlflow.db-journal"):  # as a disk holds them when the process is killed here
            shutil.copy(tmp_path / name, copy)
    assert b"half" in (copy / "mlflow.db").read_bytes()
    refuse_programs(f"sqlite:///{copy}/mlflow.db")
    with contextlib.closing(sqlite3.connect(copy / "mlflow.db")) as database:
        assert database.execute("select * from runs").fetchall() == [("whole",)]

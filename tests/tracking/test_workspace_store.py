"""The SQLite store of a workspace that may be a stranger's."""

import contextlib
import shutil
import sqlite3
import struct
from pathlib import Path

import pytest

from raydistill.tracking import workspace_store
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


def b_tree_without_end(path: Path, root: int) -> None:
    """The page becomes the top of ten levels. All children of a page are one page, so there are 400**10 rows."""
    size = 4096
    pages = bytearray(path.read_bytes())
    pages += pages[(root - 1) * size : root * size]
    for level in range(10):
        child = len(pages) // size
        cells = b"".join(struct.pack(">IB", child, min(k, 127)) for k in range(400))
        starts = [size - len(cells) + 5 * k for k in range(400)]
        page = struct.pack(">BHHHBI400H", 5, 0, 400, starts[0], 0, child, *starts)
        page = page.ljust(size - len(cells), b"\0") + cells
        if level < 9:
            pages += page
    pages[(root - 1) * size : root * size] = page
    pages[28:32] = struct.pack(">I", len(pages) // size)
    path.write_bytes(pages)


def test_pages_that_hold_rows_without_end_are_refused(tmp_path) -> None:
    path = store(tmp_path)
    refuse_programs(f"sqlite:///{path}")
    with contextlib.closing(sqlite3.connect(path)) as database:
        (root,) = database.execute("select rootpage from sqlite_master").fetchone()
    b_tree_without_end(path, root)
    with pytest.raises(UnusableError, match=r"is damaged .*: delete it, or name another store"):
        refuse_programs(f"sqlite:///{path}")


def test_a_schema_without_end_is_given_up(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(workspace_store, "_SECONDS", 0.5)
    path = tmp_path / "mlflow.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("create table runs (run_uuid text unique)")  # its second row is an index without a text
    pages = bytearray(path.read_bytes())
    starts = struct.unpack(">2H", pages[108:112])
    leaves = []
    for start in starts:
        cell = bytes(pages[start : min(end for end in (*starts, 4096) if end > start)])
        head = struct.pack(">BHHHBH", 13, 0, 1, 4096 - len(cell), 0, 4096 - len(cell))
        leaves.append(head.ljust(4096 - len(cell), b"\0") + cell)
    first = len(pages) // 4096 + 1
    pages += leaves[0] + leaves[1]
    path.write_bytes(pages)
    b_tree_without_end(path, first + 1)  # the index, again and again
    pages = bytearray(path.read_bytes())
    pages[100:4096] = struct.pack(">BHHHBIH", 5, 0, 1, 4091, 0, first + 1, 4091).ljust(3991, b"\0") + struct.pack(
        ">IB", first, 1
    )
    path.write_bytes(pages)
    with pytest.raises(UnusableError, match=r"cannot be read \(interrupted\)"):
        refuse_programs(f"sqlite:///{path}")


@pytest.mark.parametrize(
    "made",
    [
        "create table t (a check ('" + "a" * 99 + "' not like '" + "%a" * 40 + "%b'))",
        "create table t (a default (hex(zeroblob(400000000))))",
        'create table t (a, b as ("zeroblob"(400000000)))',
        "create index t on runs (length(printf('%900000000d', run_uuid)))",
        "create virtual table t using fts5(a)",
        "create view t as select 1",
    ],
)
def test_a_store_that_computes_while_it_is_used_is_refused(tmp_path, made: str) -> None:
    path = store(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(made)
        database.commit()
    with pytest.raises(UnusableError, match=r"holds a (table|index|view), 't.*', which would run when it is used"):
        refuse_programs(f"sqlite:///{path}")

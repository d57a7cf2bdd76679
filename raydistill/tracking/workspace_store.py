"""The SQLite store in a workspace: it may be untrusted, so nothing in it runs or leads files elsewhere."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from raydistill.errors import CheckpointError
from raydistill.escaping import one_line
from raydistill.storage.filesystems import open_file
from raydistill.storage.local import refuse_links
from raydistill.tracking.stores import UnusableError, engine_of, reason, sqlite_file

_OTHER_JOURNAL = bytes.fromhex("d9d505f920a163d7")  # the end of a journal that names one
# MLflow's and Optuna's tables call none of these. In a check or a default they take gigabytes, or have no end.
_CALLS = re.compile(
    r"\b(?:virtual|like|glob|match|regexp|zeroblob|randomblob|replace|printf|format|hex|char|quote|instr|json_\w+)\b",
    re.IGNORECASE,
)
_SECONDS, _BYTES_A_SECOND = 5.0, 50e6


def refuse_programs(uri: str) -> None:
    """Raises UnusableError if a workspace's own SQLite file is not one, is damaged, or has triggers, views or calls in
    its tables, which would run when it is used, perhaps without end. MLflow has one trigger of its own, on a table that
    nothing here writes to."""
    path = sqlite_file(uri)
    if path is not None:
        _refuse_other_journals(path)
    if path is None or not os.path.lexists(path):
        return
    if not os.path.isfile(path):
        raise UnusableError("is not a regular file: delete it, or name another store")
    end = time.monotonic() + _SECONDS + os.path.getsize(path) / _BYTES_A_SECOND
    # Open it to write too: what a killed process left half written is undone before it is read, from the store's
    # journal.
    with contextlib.closing(sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=rw", uri=True)) as store:
        store.set_progress_handler(lambda: time.monotonic() > end, 10_000)  # pages that lead back hold rows without end
        try:
            schema = store.execute("select type, name, tbl_name, sql from sqlite_master").fetchall()
            _refuse_odd(schema)
            store.execute("pragma ignore_check_constraints = on")
            (found,) = store.execute("pragma quick_check(1)").fetchone()
        except sqlite3.Error as error:
            raise UnusableError(f"cannot be read ({reason(error)}): delete it, or name another store") from None
    if found != "ok":
        raise UnusableError(f"is damaged ({one_line(found.splitlines()[-1])}): delete it, or name another store")


def _refuse_odd(schema: Iterable[tuple[Any, Any, Any, Any]]) -> None:
    for kind, name, table, text in schema:
        called = None if kind == "trigger" else _CALLS.search(str(text))
        if called or kind == "view" or (kind == "trigger" and table != "secrets"):
            raise UnusableError(
                f"holds a {kind}, {one_line(str(name))!r:.100}, which would run when it is used"
                f"{f' ({called[0]})' if called else ''}: drop it, or name another store"
            )


def _refuse_other_journals(path: str) -> None:
    """A journal that SQLite has not finished may name another one, of several databases together. SQLite deletes that
    one once it has read the first, and it may be any file. Nothing here writes such a journal."""
    journal = f"{path}-journal"
    try:
        with open_file(journal) as file:
            file.seek(max(file.seek(0, 2) - len(_OTHER_JOURNAL), 0))
            if file.read() != _OTHER_JOURNAL:
                return
    except FileNotFoundError:  # or another process has just finished it
        return
    except OSError as error:
        raise UnusableError(f"has a journal, {journal}, that cannot be read ({reason(error)}): delete it") from None
    raise UnusableError(
        f"has a journal, {journal}, that names another file, which SQLite would delete: delete the journal, or name "
        "another store"
    )


def refuse_links_of(uri: str) -> None:
    """Raises UnusableError if a workspace's own store, its lock and journal, or a file of its runs is a link."""
    path = Path(sqlite_file(uri) or "")
    try:
        for place in (*path.parent.glob("mlflow.*"), path.parent / "mlartifacts"):
            refuse_links(str(place))
    except CheckpointError as error:
        raise UnusableError(f"is not used: {error}") from None


def put_files(uri: str, experiment: str, place: str) -> list[str]:
    """Set the path of the files of an experiment's runs, in a workspace's own store: folders below `place`. Returns
    some of the other paths that it named."""
    import sqlalchemy

    told = {"experiment": experiment, "place": place}
    of_run = ":place || '/' || run_uuid || '/artifacts'"
    with engine_of(uri).begin() as connection:

        def execute(words: str) -> Any:
            return connection.execute(sqlalchemy.text(words), told)

        runs = f"where experiment_id = :experiment and artifact_uri != {of_run}"
        experiments = "where experiment_id = :experiment and artifact_location != :place"
        found = f"select artifact_location from experiments {experiments} union select artifact_uri from runs {runs}"
        odd = [str(one) for one in execute(f"{found} limit 5").scalars()]
        if odd:
            execute(f"update runs set artifact_uri = {of_run} {runs}")
            execute(f"update experiments set artifact_location = :place {experiments}")
    return odd

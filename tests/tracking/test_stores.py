"""Which store a job means, and what is said of one that cannot be used: servers that answer in other ways, databases of
other versions and of other programs."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from raydistill.config import load_config
from raydistill.tracking import stores
from raydistill.tracking.experiments import experiment_name
from raydistill.tracking.stores import UnusableError, connect, is_transient, reason, tracking_uri
from tests.processes import serving, together


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Its address, and a list of what it answers: a status and a body."""
    answers = [(200, "{}")]

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[0]
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Answers)) as address:
        yield address, answers


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, "login", r"does not let this user in \(HTTP 401\): set MLFLOW_TRACKING_USERNAME"),
        (401, '{"error_code": "UNAUTHENTICATED", "message": "who?"}', r"does not let this user in \(.*who\?\)"),
        (403, "", r"does not let this user in \(HTTP 403\)"),
        (404, "nginx", r"is not an MLflow server \(it answers 404\): look at host, port and path"),
        (302, "", r"is not an MLflow server \(it answers 302\)"),
        (200, "<html>It works!</html>", r"is not an MLflow server \(it does not answer in JSON\)"),
    ],
)
def test_a_server_that_is_none_or_refuses_is_said_at_once(server, status, body, words) -> None:
    address, answers = server
    answers[0] = status, body
    started = time.monotonic()
    with pytest.raises(UnusableError, match=words):
        connect(address)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(("port", "words"), [(9, "Connection refused"), (None, "error responses")])
def test_a_server_that_is_down_may_come(server, port, words) -> None:
    address, answers = server
    answers[0] = 503, "later"
    with pytest.raises(Exception, match=r"retries|refused") as caught:
        connect(f"http://127.0.0.1:{port}" if port else address)
    assert is_transient(caught.value)
    assert words in reason(caught.value)


def database(path: str, *tables: str, version: str = "") -> str:
    with sqlite3.connect(path) as connection:
        for table in tables:
            connection.execute(f"create table {table} (x)")
        if version:
            connection.execute("create table alembic_version (version_num)")
            connection.execute("insert into alembic_version values (?)", (version,))
    return f"sqlite:///{path}"


@pytest.mark.parametrize(
    ("tables", "version", "words"),
    [
        (("experiments", "runs"), "ffffffffffff", "was made by a newer MLflow .* install that version"),
        (
            ("experiments", "runs"),
            "0c779009ac13",
            "was made by an older MLflow .* run `mlflow db upgrade sqlite:///.*`",
        ),
        (
            ("studies", "trials"),
            "v3.2.0.a",
            r"belongs to another program \(it has alembic_version, studies, trials …\)",
        ),
    ],
)
def test_a_database_of_another_version_or_program_is_left_as_it_is(tmp_path, tables, version, words) -> None:
    uri = database(f"{tmp_path}/x.db", *tables, version=version)
    before, started = (tmp_path / "x.db").read_bytes(), time.monotonic()
    with pytest.raises(UnusableError, match=words):
        connect(uri)
    assert time.monotonic() - started < 20
    assert (tmp_path / "x.db").read_bytes() == before


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("sqlite:////proc/x.db", "cannot be (used|written)"),
        ("sqlite:///{folder}/text", r"cannot be used \(.*file is not a database"),
        ("postgresql+nodriver://h/x", "is not a database address"),
        ("mysql://h/x", "needs a driver that is not installed here: pip install mysqlclient"),
        ("./mlruns", "is a folder"),
        ("foo://x", "is not an MLflow store"),
        ("http://[x", "is not an address"),
    ],
)
def test_an_address_that_can_never_work_is_said_with_the_reason(tmp_path, uri, words) -> None:
    (tmp_path / "text").write_text("no database, but a text of some length " * 99)
    with pytest.raises(UnusableError, match=words):
        connect(uri.format(folder=tmp_path))


def test_the_environment_names_the_store_where_the_config_is_silent(tmp_path, monkeypatch) -> None:
    silent = load_config([f"workspace={tmp_path}", "images.path=x"])
    told = load_config([f"workspace={tmp_path}", "images.path=x", "tracking.uri=http://h:1", "name=mine"])
    remote = load_config(["workspace=s3://b/w", "images.path=x"])
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    assert tracking_uri(silent) == (f"sqlite:///{tmp_path}/mlflow.db", "the workspace")
    assert tracking_uri(remote)[0] == ""
    assert experiment_name(silent) == ("raydistill", "name")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://company")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "vision")
    assert tracking_uri(silent) == tracking_uri(remote) == ("http://company", "MLFLOW_TRACKING_URI")
    assert experiment_name(silent) == ("vision", "MLFLOW_EXPERIMENT_NAME")
    assert tracking_uri(told) == ("http://h:1", "tracking.uri")
    assert experiment_name(told) == ("mine", "name")


STUDY = """
import sys
from raydistill.config import load_config
from raydistill.identity import stage_directory
from raydistill.search.study import open_study

_, folder, uri = sys.argv
config = load_config([f"workspace={folder}", "images.path=x", f"tune.storage={uri}"])
print("ready", flush=True)
sys.stdin.readline()
print(len(open_study(config, stage_directory(config, "tune", {}), {"loss.temperature": 4.0}).trials))
"""


def test_searches_that_begin_together_share_one_new_database(tmp_path) -> None:
    uri = f"sqlite:///{tmp_path}/new.db"
    assert together(STUDY, *[(str(tmp_path), uri)] * 3) == [("1\n", "")] * 3


def test_one_process_at_a_time_is_alone(tmp_path) -> None:
    inside = []

    def enter() -> None:
        with stores.store_lock(f"sqlite:///{tmp_path}/a.db"):
            inside.append(+1)
            time.sleep(0.01)
            inside.append(-1)

    threads = [threading.Thread(target=enter) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == [+1, -1] * 5

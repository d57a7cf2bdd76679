"""A bucket on this machine, and a way to it on which connections are cut."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server


class Line:
    """What passes to the server: the kind and the key of each request, the prefix of a listing; and requests that are
    answered with an error of S3, by the code that `refuse` gives for them, or not at all, if that is CUT."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.refuse: Callable[[str, str], str | None] = _nothing

    def kinds(self) -> Counter[str]:
        return Counter(kind for kind, _ in self.requests)


def _nothing(kind: str, key: str) -> None:
    return None


STATUS = {"ExpiredToken": "400 Bad Request", "AccessDenied": "403 Forbidden", "RequestTimeTooSkewed": "403 Forbidden",
          "InvalidAccessKeyId": "403 Forbidden", "SignatureDoesNotMatch": "403 Forbidden",
          "PermanentRedirect": "301 Moved Permanently", "QuotaExceeded": "507 Insufficient Storage"}  # fmt: skip
CUT = "cut"
_LINE = Line()  # there is one server for all tests


def _passing(application: Any) -> Any:
    def answer(environ: dict[str, Any], start: Any) -> Any:
        query = parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
        kind, key = environ["REQUEST_METHOD"], environ["PATH_INFO"].strip("/").partition("/")[2]
        if kind == "GET" and not key:
            kind, key = "LIST", query.get("prefix", [""])[0]
        _LINE.requests.append((kind, key))
        if (code := _LINE.refuse(kind, key)) is None:
            return application(environ, start)
        if code == CUT:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start(STATUS[code], [("Content-Type", "application/xml"), ("x-amz-bucket-region", "eu-west-1")])
        body = f"<Error><Code>{code}</Code><Message>The server says {code}.</Message></Error>"
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body.encode()]

    return answer


@pytest.fixture
def s3_line(bucket: str) -> Iterator[Line]:
    """The way to the server, where nothing has passed yet."""
    _LINE.requests.clear()
    yield _LINE
    _LINE.refuse = _nothing


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server that speaks S3's protocol, on loopback."""
    application = _passing(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket; the keys are in the environment, also of the processes that a test starts."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    client, name = boto3.client("s3", endpoint_url=s3_server), "runs"
    client.create_bucket(Bucket=name)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=name)
    for key in [item["Key"] for page in pages for item in page.get("Contents", [])]:
        client.delete_object(Bucket=name, Key=key)
    return f"s3://{name}"


class CutConnections:
    """Stands before a server and cuts every `nth` connection: by turns before the request is passed on, and when it has
    been answered, so that nobody can tell whether it was done. `requests` are the first lines of those that were cut.
    """

    def __init__(self, server: str, nth: int) -> None:
        host, _, port = server.removeprefix("http://").partition(":")
        self._server, self._nth, self._numbers = (host, int(port)), nth, itertools.count(1)
        self.requests: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client, next(self._numbers)), daemon=True).start()

    def _serve(self, client: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self._server) as server:
            begin = client.recv(65536)
            cut, answered = number % self._nth == 0, number % (2 * self._nth) == 0
            if cut:
                self.requests.append(begin.partition(b"\r\n")[0].decode())
            if cut and not answered:
                return  # which closes it
            server.sendall(begin)
            up = threading.Thread(target=_pass_on, args=(client, server), daemon=True)
            up.start()
            _pass_on(server, client, drop=cut)
            client.shutdown(socket.SHUT_RDWR)  # to close it is not enough while another thread waits for it


def _pass_on(source: socket.socket, target: socket.socket, drop: bool = False) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if drop:
                return
            target.sendall(data)

"""A bucket on this machine, and a way to it on which connections are cut."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server that speaks S3's protocol, on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


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

"""What rows of a table may have fetched, by servers of this machine that note who asks."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from raydistill.config import Images
from raydistill.data.sources.listing import list_images
from raydistill.data.sources.reading import read_pictures
from raydistill.storage import addresses
from raydistill.storage.addresses import is_elsewhere, read_address


class Handler(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "/picture")
        elif self.path.startswith("/busy/"):
            self.send_response(int(self.path[6:]))
        elif self.path == "/slow":
            self.connection.recv(1)  # until the other side hangs up
            return
        else:
            self.send_response(200)
        body = b"path,label\npicture,a\nsub/picture,b\n" if self.path.endswith(".csv") else b"some bytes"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{http.server_port}"
        http.shutdown()


def why_not(path: str, source: str) -> str:
    ((_, data, reason),) = read_pictures([(path, None)], 10**6, source)
    assert data is None
    return reason


@pytest.mark.parametrize("source", ["/some/table.csv", "s3://bucket/table.csv", "https://example.org/table.csv"])
@pytest.mark.parametrize("host", ["{}", "localhost:{port}", "[::ffff:127.0.0.1]:{port}", "0.0.0.0:{port}"])
def test_no_row_asks_a_host_of_the_users_own_network(server, source, host):
    place = host.format(server, port=server.rpartition(":")[2])
    for address in (f"https://{place}/picture", f"http://{place}/picture", f"HTTP://{place}/picture"):
        assert why_not(address, source).startswith("cannot be read: ")
    assert why_not(f"http://{place}/picture", "http://example.org/t.csv").startswith("cannot be read: ")
    assert Handler.asked == []


def test_a_tables_own_host_is_asked_wherever_it_is(server):
    assert read_address(f"http://{server}/picture", f"http://{server}/t.csv", 100) == b"some bytes"
    assert read_address(f"http://{server}/away", f"http://{server}/t.csv", 100) == b"some bytes"
    listing = list_images(Images(path=f"http://{server}/sets/t.csv"))
    assert [entry.path for entry in listing.entries] == [f"http://{server}/sets/{p}picture" for p in ("", "sub/")]


OTHER_KINDS = ("ftp", "sftp", "github", "memory", "nothing", "reference")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        *[(f"{kind}://example.org/a.png", f"an address of {kind} is not read") for kind in OTHER_KINDS],
        ("https://[::1/a.png", "not an address"),
        ("s3://a]/b.png", "not an address"),
        ("https:///a.png", "not an address"),
        ("https://[::1]:1/a.png", "or of IPv6, is not followed"),
        ("HTTPS://127.0.0.1:1/a.png", "its host is in this machine's own network"),
        ("https://[::1]/simplecache::file:///a.png", "an address in another"),
        ("simplecache::s3://a/b.png", "an address in another"),
        ("zip://a.png::https://example.org/a.zip", "an address in another"),
        ("filecache::file:///etc/hostname", "an address in another"),
    ],
)
def test_other_addresses_are_refused_by_row(address, reason):
    assert reason in why_not(address, "/some/table.csv")


def test_a_host_that_lets_time_pass_is_asked_a_few_times_alone(server, monkeypatch):
    monkeypatch.setattr(addresses, "SECONDS", 0.3)
    monkeypatch.setattr(addresses, "_public", lambda where: socket.socket(*where[:3]))
    reasons = [why_not(f"http://{server}/slow", "http://example.org/t.csv") for _ in range(5)]
    assert "does not answer within" in reasons[0]
    assert "is asked no more" in reasons[4]


def test_rows_elsewhere_are_not_looked_at_before_they_are_read(server, tmp_path):
    (tmp_path / "t.csv").write_text(f"path,label\nhttps://{server}/a.png,a\nftp://{server}/b.png,b\nx::y://z,c\n")
    assert len(list_images(Images(path=str(tmp_path / "t.csv"))).entries) == 3
    assert Handler.asked == []


@pytest.mark.parametrize(
    ("address", "source", "found"),
    [
        ("a/b.png", "/t.csv", False),
        ("s3://other/b.png", "s3://bucket/t.csv", False),
        ("https://a.org/b.png", "https://a.org/t.csv", False),
        ("https://user@A.org/b.png", "https://a.org/t.csv", False),
        ("https://a.org:8443/b.png", "https://a.org/t.csv", True),
        ("http://a.org/b.png", "https://a.org/t.csv", True),
        ("s3://other/b.png", "/t.csv", True),
    ],
)
def test_what_is_elsewhere(address, source, found):
    assert is_elsewhere(address, source) == found


def test_a_row_with_half_an_address_takes_no_other_along(tmp_path):
    (tmp_path / "t.csv").write_text("path,label\na.png,a\nhttp://[::1,b\n")
    assert len(list_images(Images(path=str(tmp_path / "t.csv"))).entries) == 2


@pytest.mark.parametrize("code", [429, 503])
def test_a_busy_host_is_asked_for_every_row(code, server, monkeypatch):
    monkeypatch.setattr(addresses, "_public", lambda where: socket.socket(*where[:3]))
    monkeypatch.setattr(addresses, "SECONDS", code)  # so that fsspec makes a client for this test
    reasons = {why_not(f"http://{server}/busy/{code}", "http://example.org/t.csv") for _ in range(5)}
    assert reasons == {f"cannot be read: {server} answers with HTTP's code {code}; try again later"}
    assert Handler.asked.count(f"/busy/{code}") >= 5

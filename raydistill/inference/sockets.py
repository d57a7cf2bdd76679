"""Sockets, connections and timeouts of `serve`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from raydistill.errors import ConfigError

MOST_CONNECTIONS = 512
# Seconds for the head of a request; for all of a request, with its answer; for open requests when the server stops.
HEAD_SECONDS, EXCHANGE_SECONDS, GOODBYE_SECONDS = 10, 600, 3


@dataclass(frozen=True)
class ServeSettings:
    """Limits of a request's bytes and a picture's pixels, the seconds that collect requests into a batch, and further
    names of the server."""

    most_bytes: int
    most_pixels: int
    window_seconds: float
    allowed: Sequence[str] = ()


class _Protocol(H11Protocol):
    """HTTP/1.1 that closes stalled connections: uvicorn has no time limit for the head, nor for an answer that the
    client does not read. If there are too many, it closes the one that has waited longest for its request."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        self._end_in(HEAD_SECONDS)
        if len(self.connections) > MOST_CONNECTIONS:
            waiting = [one for one in self.connections if isinstance(one, _Protocol) and not one._is_busy()]
            min(waiting, key=lambda one: one._deadline.when() if one._deadline else 0.0, default=self)._end()

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self._is_busy():
            self._end_in(EXCHANGE_SECONDS)

    def on_response_complete(self) -> None:
        self._end_in(HEAD_SECONDS)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _end_in(self, seconds: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, self._end)

    def _end(self) -> None:
        self.transport.abort()


def listen(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of the host's name on this machine. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--host {host}: this name has no address ({reason}); use 127.0.0.1 for this machine, 0.0.0.0 for all"
        ) from None
    sockets, failure = [], OSError(errno.EADDRNOTAVAIL, "no address")
    for family, _, _, _, address in dict.fromkeys(found):
        # A single `::` means every IPv4 address too.
        both_kinds = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
        try:
            one = socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=both_kinds)
            sockets.append(one)
        except OSError as error:
            failure = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                break
    else:
        if sockets:
            return sockets
    for one in sockets:
        one.close()
    advice = "another --port" if failure.errno in (errno.EADDRINUSE, errno.EACCES) else "a --host of this machine"
    raise ConfigError(f"--host {host} --port {port}: {os.strerror(failure.errno or 0)}; choose {advice}")


def host_name(uri: str) -> str:
    """The name or address of a URI that is only a host, in lower case and without a port; else an empty text."""
    found = re.fullmatch(
        r"(?:[a-z][a-z0-9+.-]*:)?//(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d{0,5})?", uri.lower(), re.ASCII
    )
    if found is None:
        return ""
    try:
        return str(ipaddress.IPv6Address(found[1])) if found[1] else found[2]
    except ValueError:
        return ""


def check_name(name: str) -> str:
    """The name of `--allow-host` in the form that browsers send. Raises ConfigError: it is more than a name."""
    with contextlib.suppress(ValueError):  # not an address, or not a valid DNS name
        plain = name.strip("[]").lower()
        if ":" in plain:
            return str(ipaddress.ip_address(plain))
        if re.fullmatch(r"[a-z0-9_.-]+", plain := plain.encode("idna").decode()):
            return plain
    raise ConfigError(f"--allow-host {name}: give only a name or an address, such as models.example.org")


def own_names(sockets: list[socket.socket], host: str) -> set[str]:
    """The names of this server: its addresses, this machine's names, and `host`. A page of another site cannot make a
    browser send a request under these names."""
    bound = {one.getsockname()[0].partition("%")[0] for one in sockets}
    names = {"localhost", "127.0.0.1", "::1", host.lower().strip("[]"), *bound}
    if any(ipaddress.ip_address(address).is_unspecified for address in bound):
        names |= {one.address.partition("%")[0] for of_card in psutil.net_if_addrs().values() for one in of_card}
        names.add(socket.gethostname().lower())
    return names - {""}


def addresses(sockets: list[socket.socket]) -> tuple[list[str], bool]:
    """The addresses for a browser, and whether other machines reach the server."""
    urls, is_open = [], False
    for one in sockets:
        host, port = one.getsockname()[:2]
        address = ipaddress.ip_address(host.partition("%")[0])
        is_open |= not address.is_loopback
        if address.is_unspecified:
            urls += [f"http://127.0.0.1:{port}/", f"http://{socket.gethostname()}:{port}/"]
        else:
            urls.append(f"http://[{host}]:{port}/" if address.version == 6 else f"http://{host}:{port}/")
    return list(dict.fromkeys(urls)), is_open


def run(app: ASGIApp, sockets: list[socket.socket]) -> None:
    """Serve until a signal; open requests then have a few seconds."""
    config = uvicorn.Config(
        app, log_level="critical", http=_Protocol, ws="none", timeout_graceful_shutdown=GOODBYE_SECONDS,
        server_header=False, timeout_keep_alive=5,
        proxy_headers=False,  # otherwise a local client could write any address into the log
    )  # fmt: skip
    uvicorn.Server(config).run(sockets)

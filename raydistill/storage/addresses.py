"""Addresses in an untrusted table: which are read, and how. No row can reach the user's own network.

A row may name a bucket, or a path of the same kind as its table's. Its web addresses are fetched within a time limit,
and only from public hosts, whatever redirects and DNS say.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from raydistill.errors import StorageError
from raydistill.storage.filesystems import open_filesystem, too_large

_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf"})
_WEB = frozenset({"http", "https"})
SECONDS = 30
# After this many rows in succession have waited that long for a host, this process no longer asks the host.
_MOST_SILENT = 3
_silent = Counter[str]()


def is_elsewhere(address: str, source: str) -> bool:
    """Whether a row's address leads to another kind of storage than its table's, or to another web host."""
    if "://" not in address:
        return False
    own, other = _parts(address), _parts(source)
    return own[0] != other[0] or (own[0] in _WEB and own[1] != other[1])


def read_address(address: str, source: str, most_bytes: int) -> bytes:
    """The bytes at an address that a row of the table `source` names. Raises OSError with the reason."""
    scheme, host = _parts(address)
    if not scheme or (scheme in _WEB and not host):
        raise OSError(errno.EINVAL, "not an address")
    if "::" in address:
        raise OSError(
            errno.EPERM, "an address in another, or of IPv6, is not followed; write the picture's own address"
        )
    if not is_elsewhere(address, source) or scheme in _BUCKETS or (scheme == "file" and "://" not in source):
        fs, place = open_filesystem(address)
        return fs.read_at_most(place, most_bytes)
    if scheme not in {"https", *(_WEB & {_parts(source)[0]})}:
        raise OSError(errno.EPERM, f"an address of {scheme} is not read from such a table; copy the pictures beside it")
    if _silent[host] >= _MOST_SILENT:
        raise OSError(errno.ETIMEDOUT, f"{host} did not answer {_MOST_SILENT} times, and is asked no more")
    try:
        data = _fetch(scheme + address[len(scheme) :], most_bytes)
    except (StorageError, TimeoutError) as error:
        if status := getattr(error.__context__, "status", None):  # it answers, but is too busy
            raise OSError(errno.EREMOTEIO, f"{host} answers with HTTP's code {status}; try again later") from None
        _silent[host] += 1
        raise OSError(errno.ETIMEDOUT, f"{host} is not found, or does not answer within {SECONDS} seconds") from None
    _silent.pop(host, None)
    return data


def _fetch(address: str, most_bytes: int) -> bytes:
    import aiohttp

    limit = aiohttp.ClientTimeout(total=SECONDS, sock_connect=10)
    fs, place = open_filesystem(address, patience=0, get_client=_client, client_kwargs={"timeout": limit})
    data = bytearray()
    with fs.open(place, "rb", block_size=0, size=1) as file:  # read as it arrives: a stated size proves nothing
        while part := file.read(1 << 16):
            data += part
            if len(data) > most_bytes:
                raise too_large(len(data), most_bytes, address)
    return bytes(data)


async def _client(**kwargs: Any) -> Any:
    import aiohttp

    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=_public), **kwargs)


def _public(where: Any) -> socket.socket:
    """A socket to the address that a connection is about to use."""
    family, kind, protocol, _, (host, *_) = where
    if not ipaddress.ip_address(host).is_global:
        raise OSError(errno.EPERM, "its host is in this machine's own network, where no table may lead")
    return socket.socket(family, kind, protocol)


def _parts(address: str) -> tuple[str, str]:
    try:
        parts = urlsplit(address if "://" in address else "")
    except ValueError:  # brackets that hold no IPv6 address
        return "", ""
    return parts.scheme.lower(), parts.netloc.lower().rpartition("@")[2]

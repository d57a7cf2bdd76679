"""safetensors files: a limit on their headers, checked before a library makes objects of them, and a checksum."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

from raydistill.storage.state import parsed

_MOST_HEADER = 4 << 20  # bytes


def header_bytes(begin: bytes) -> int:
    """The length of the header, from the file's first 8 bytes. Raises ValueError if it is long enough for a million
    tensors: the largest models have thousands."""
    if (length := int.from_bytes(begin[:8], "little")) > _MOST_HEADER:
        raise ValueError(f"a header of {length:,} bytes, above {_MOST_HEADER:,}")
    return length


def bounded(data: bytes) -> bytes:
    """The file, if its header is not too long. Raises ValueError."""
    header_bytes(data)
    return data


def with_checksum(tensors: Mapping[str, np.ndarray]) -> bytes:
    """safetensors bytes whose metadata hold the CRC-32 of all that comes after the header."""
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return save(tensors, {"crc32": _checksum(save(tensors))})


def refuse_altered(data: bytes) -> None:
    """Raises ValueError if the file has a checksum, and it is another."""
    header = parsed(data[8 : 8 + header_bytes(data)], dict[str, Any])
    metadata = header.get("__metadata__")
    wanted = metadata.get("crc32") if isinstance(metadata, dict) else None
    if wanted is not None and wanted != _checksum(data):
        raise ValueError("its checksum is another")


def _checksum(data: bytes) -> str:
    return f"{zlib.crc32(memoryview(data)[8 + header_bytes(data) :]):08x}"

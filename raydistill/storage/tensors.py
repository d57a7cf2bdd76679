"""safetensors files: a limit on their headers, checked before a library makes objects of them."""

from __future__ import annotations

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

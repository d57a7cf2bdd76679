"""How the name of a file or a class is written where people and programs read it."""

from __future__ import annotations

import re
from functools import lru_cache

# Bytes that are no UTF-8 (Python holds them as lone surrogates), what terminals obey, ends of lines, and marks that
# turn the reading direction or show nothing. Joiners stay: Persian and emoji are written with them.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_ESCAPED = re.compile(rf"{_UNSAFE.pattern}|[\\']")


@lru_cache(maxsize=4096)
def written(name: str) -> str:
    r"""The name itself or, where it holds what cannot be shown, the form of `ls` and bash, which can be pasted back:
    `$'caf\xe9.png'`. No two names are written alike, and what comes out is always UTF-8 on one line."""
    if not _UNSAFE.search(name) and not name.startswith("$'"):
        return name
    return f"$'{_ESCAPED.sub(_escape, name)}'"


def _escape(match: re.Match[str]) -> str:
    sign = match.group()
    code = ord(sign)
    if sign in "\\'":
        return f"\\{sign}"
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}"

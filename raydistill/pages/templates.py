"""HTML pages from the templates beside this file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

from raydistill.secrets import on_page

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, finalize=on_page,
)  # fmt: skip


def page(template: str, **values: Any) -> bytes:
    """The template's page. Every value is escaped, printable and without secrets."""
    return _TEMPLATES.get_template(template).render(values).encode()


def data_uri(picture: bytes, kind: str = "png") -> str:
    """A picture as a page holds it, without a file of its own."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def file_name(path: str) -> str:
    """The last folder and the name."""
    return "/".join(path.split("/")[-2:])

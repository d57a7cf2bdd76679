"""Pages and cards from the templates beside this file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from raydistill.escaping import code_span, markdown
from raydistill.secrets import for_page, redacted

_PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, finalize=for_page,
)  # fmt: skip
_CARDS = _PAGES.overlay(autoescape=False, finalize=None)
_CARDS.filters = {**_CARDS.filters, "md": markdown, "code": code_span}


class Table(NamedTuple):
    """The first cell of a row names it. A cell is text or a bar: a `share`, and perhaps a `mark` at another one."""

    titles: Sequence[str]
    rows: Sequence[Sequence[object]]


def page(template: str, name: str, kind: str, when: datetime | None = None, **values: Any) -> bytes:
    """The page of a template, with the name and the time of the job on top. Every value is escaped, printable and
    without secrets."""
    shown = when and f"{when.astimezone():%-d %B %Y, %H:%M %Z}"
    return _PAGES.get_template(template).render(values, name=name, kind=kind, when=shown).encode()


def card(template: str, **values: Any) -> str:
    """The Markdown of a template, without secrets. The filters `md` and `code` escape text from others."""
    return redacted(_CARDS.get_template(template).render(values)).strip() + "\n"


def data_uri(picture: bytes, kind: str = "png") -> Markup:
    """A picture as a `data:` URI, so that the page needs no file. It is ours, so nothing in it is escaped or hidden."""
    return Markup(f"data:image/{kind};base64,{base64.b64encode(picture).decode()}")


def file_name(path: str) -> str:
    """The last folder and the name."""
    return "/".join(path.split("/")[-2:])

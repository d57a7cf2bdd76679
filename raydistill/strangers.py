"""Names that strangers gave to files and classes, and how our texts, pages and pictures show them.

A name may hold what a terminal, a browser or a reader takes for something else than text: escapes that clear the
screen or set a link, marks that turn the direction of writing, lines of its own. What is shown goes through
`printable`, in a card through `markdown`; what is stored and compared stays as it is.
"""

from __future__ import annotations

import html
import re
import unicodedata
from typing import Any

# No name of a file system is longer than 255 bytes; a label in a table may be.
_LONGEST_NAME = 300
_KEPT = "\n\t\u200c\u200d"  # the last two join and part letters in scripts that need them, and emoji
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats (marks of direction, tags), half characters, separators


def printable(text: str) -> str:
    """The text with each character that is no text as an escape: `\\x1b`, `\\u202e`; longer names than any file has cut
    in their middle. Line ends stay: a name of one line is for `one_line`."""
    if not text.isprintable():
        text = "".join(_escaped(c) if c not in _KEPT and unicodedata.category(c) in _HIDDEN else c for c in text)
    return re.sub(rf"[^\s/]{{{_LONGEST_NAME + 1},}}", lambda found: shorter(found[0], _LONGEST_NAME), text)


def one_line(text: str) -> str:
    """The same of what stands in a line of its own, whose line ends are escapes too."""
    return printable(text.replace("\n", "\\n").replace("\t", "\\t"))


def shorter(text: str, most: int = 60) -> str:
    """In one line, of so many characters at most and a word on how many there were: for pictures and headings."""
    line = text.replace("\n", "\\n")
    if len(line) <= most:
        return line
    return f"{line[: most // 2]}…{line[-(most // 4) :]} ({len(text):,} characters)"


def markdown(text: str) -> str:
    """The text as it is, in Markdown: no link, picture, table, heading or HTML begins in it."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:<-])", r"\\\1", html.escape(one_line(text), quote=False))


def code_span(text: str) -> str:
    """The text between as many backticks as end it nowhere sooner."""
    line = one_line(text).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def plain_console(**options: Any) -> Any:
    """rich's Console, to which every text is plain: neither markup nor escapes of strangers."""
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    return Plain(highlight=False, markup=False, emoji=False, **options)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()

"""Names and words of strangers, and how terminals, pages, cards and pictures show them.

They may hold what is taken for something else than text: escapes that clear the screen or set a link, marks that turn
the direction of writing, lines of their own, markup. What is stored and compared stays as it is. A file is named by
`written`, which tells any two names apart; `on_terminal` is the last look at all that is printed.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

# No name of a file system is longer than 255 bytes; a label in a table may be.
_LONGEST_NAME = 300
_JOINERS = "\u200c\u200d"  # which Persian, Indian scripts and emoji are written with; between Latin letters they hide
_SIGNS = re.compile("[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd]")  # formats, and yet seen
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats (marks of direction, tags), half characters, separators
_LINKED = re.compile(r"(?i)://|www\.|@|mailto:|xmpp:")  # which hubs make links of, escaped or not, but in code
# What progress bars and colours of libraries need: none of it clears a screen, sets a title, or makes a link.
_OF_BARS = re.compile(r"(\r|\x1b\[[\d;]*[mKAB]|\x1b\[\?25[hl])")


def _escaped(text: str, kept: str = "") -> str:
    """Each character that is no text as Python and bash write it: `\\x1b`, `\\u202e`."""
    if text.isprintable():
        return text
    return "".join(
        c if c in kept or (c in _JOINERS and not before.isascii()) or not _is_hidden(c) else _escape(ord(c))
        for before, c in zip(" " + text, text, strict=False)
    )


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN and not _SIGNS.match(character)


def _escape(code: int) -> str:
    if code < 0x80 or 0xDC80 <= code <= 0xDCFF:  # the latter: bytes that are no UTF-8, as Python holds them
        return f"\\x{code & 0xFF:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def written(name: str) -> str:
    r"""The name itself or, where it holds what cannot be shown, the form of `ls` and bash, which can be pasted back:
    `$'caf\xe9.png'`. No two names are written alike, and what comes out is always UTF-8 on one line."""
    if _escaped(name) == name and not name.startswith("$'"):
        return name
    return "$'" + _escaped(re.sub(r"[\\']", r"\\\g<0>", name)) + "'"


def printable(text: str) -> str:
    """The text with each character that is no text as an escape; longer names than any file has cut in their middle.
    Line ends stay: a name of one line is for `one_line`."""
    return re.sub(
        rf"[^\s/]{{{_LONGEST_NAME + 1},}}", lambda found: shorter(found[0], _LONGEST_NAME), _escaped(text, "\n\t")
    )


def one_line(text: str) -> str:
    """The same of what stands in a line of its own, whose line ends are escapes too."""
    return printable(text.replace("\n", "\\n").replace("\t", "\\t"))


def on_terminal(text: str) -> str:
    """What a terminal may get of libraries and of other machines: text, lines, colours and bars."""
    if text.isprintable():
        return text
    return "".join(part if k % 2 else _escaped(part, "\n\t") for k, part in enumerate(_OF_BARS.split(text)))


def in_figure(name: str) -> str:
    """For matplotlib, to which what stands between dollars is a formula; it leaves room for the picture."""
    return shorter(one_line(name), 40).replace("$", r"\$")


def shorter(text: str, most: int = 60) -> str:
    """In one line, of so many characters at most and a word on how many there were: for pictures and headings."""
    line = text.replace("\n", "\\n")
    if len(line) <= most:
        return line
    return f"{line[: most // 2]}…{line[-(most // 4) :]} ({len(text):,} characters)"


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of these names, and how many more there are."""
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def markdown(text: str) -> str:
    """The text as it is, in Markdown: no link, picture, table, heading or HTML begins in it."""
    if _LINKED.search(text):
        return code_span(text)
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

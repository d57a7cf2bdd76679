"""Makes names and texts from others safe to show on terminals, pages, cards and pictures.

They may hold escapes that clear the screen or set a link, marks that change the direction of writing, line ends, or
markup. Only what is shown changes, not what is stored and compared. `quoted` is for names of files: no two look alike.
Everything printed passes `for_terminal` last.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

# A file's name has at most 255 bytes; a label in a table may have more.
_LONGEST_NAME = 300
_LONGEST_LINE, _LONGEST_TEXT = 5_000, 1 << 16  # room for a path of 4,096 bytes and a sentence about it
# Both match at the beginning of a name or line only, which is fast.
_LONG_NAME = re.compile(rf"(?<![^\s/])[^\s/]{{{_LONGEST_NAME + 1},}}+")
_LONG_LINE = re.compile(rf"(?m)^[^\n]{{{_LONGEST_LINE + 1},}}+")
_PLURAL = re.compile(r"(?<=ss)es\b|(?<!s)s\b")
_JOINERS = "\u200c\u200d"  # Persian, Indian scripts and emoji need them; between Latin letters they are invisible
_SIGNS = re.compile("[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd]")  # visible formats
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats (direction marks, tags), half characters, separators
_LINKED = re.compile(r"(?i)://|www\.|@|mailto:|xmpp:")  # hubs make links of these, even escaped, except in code
# What libraries' progress bars and colours need. None of it clears a screen, sets a title or makes a link.
_OF_BARS = re.compile(r"(\r|\x1b\[[\d;]*[mKAB]|\x1b\[\?25[hl])")


def _escaped(text: str, kept: str = "") -> str:
    """The text with each character that is not visible text escaped as in Python and bash: `\x1b`, `\u202e`."""
    if text.isprintable():
        return text
    return "".join(
        c if c in kept or (c in _JOINERS and not before.isascii()) or not _is_hidden(c) else _escape(ord(c))
        for before, c in zip(" " + text, text, strict=False)
    )


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN and not _SIGNS.match(character)


def _escape(code: int) -> str:
    if code < 0x80 or 0xDC80 <= code <= 0xDCFF:  # the second range: bytes that are not UTF-8, as Python holds them
        return f"\\x{code & 0xFF:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def quoted(name: str) -> str:
    r"""The name itself or, if it cannot be shown, the form of `ls` and bash, which can be pasted back:
    `$'caf\xe9.png'`. No two names give the same text. The result is always UTF-8 on one line."""
    if _escaped(name) == name and not name.startswith("$'"):
        return name
    return "$'" + _escaped(re.sub(r"[\\']", r"\\\g<0>", name)) + "'"


def printable(text: str) -> str:
    """The text with non-text characters escaped, and shortened by `truncated`. Line ends stay; `one_line` is for
    names."""
    shown = truncated(_escaped(truncated(text), "\n\t"))
    return _LONG_NAME.sub(lambda found: shortened(found[0], _LONGEST_NAME), shown)


def truncated(text: str, clean: Callable[[str], str] = str) -> str:
    """The text with long names, long lines, and a long text itself, cut in the middle. It is cheap for any length, so
    it comes before code that looks at each character. The ends are `clean`ed before they are cut, because half a secret
    would not be recognised."""

    def short(line: re.Match[str]) -> str:
        names = _LONG_NAME.sub(lambda found: _ends(found[0], _LONGEST_NAME, clean), line[0])
        return _ends(names, _LONGEST_LINE, clean)

    return _ends(_LONG_LINE.sub(short, text), _LONGEST_TEXT, clean)


def _ends(text: str, most: int, clean: Callable[[str], str]) -> str:
    if len(text) <= most:
        return text
    return f"{clean(text[:most])[: most // 2]}…{clean(text[-most:])[-(most // 4) :]} ({len(text):,} characters)"


def one_line(text: str) -> str:
    """Like `printable`, with line ends escaped too."""
    return printable(text.replace("\n", "\\n").replace("\t", "\\t"))


def for_terminal(text: str) -> str:
    """The output of libraries and other machines for a terminal: text, lines, colours and progress bars."""
    if text.isprintable():
        return text
    return "".join(part if k % 2 else _escaped(part, "\n\t") for k, part in enumerate(_OF_BARS.split(text)))


def for_figure(name: str) -> str:
    """For matplotlib, which reads a formula between dollar signs. Short enough to leave room for the picture."""
    return shortened(one_line(name), 40).replace("$", r"\$")


def shortened(text: str, most: int = 60) -> str:
    """The text in one line of about `most` characters, with its full length: for pictures and headings."""
    line = text.replace("\n", "\\n")
    if len(line) <= most:
        return line
    return f"{line[: most // 2]}…{line[-(most // 4) :]} ({len(text):,} characters)"


def first_few(names: Sequence[str], most: int = 5) -> str:
    """The first of the names, and how many more there are."""
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def counted(count: int, plural: str) -> str:
    """`1 file in a folder`, `2,000 files in a folder`: the first plural word is the one that is counted."""
    return f"{count:,} {plural if count != 1 else _PLURAL.sub('', plural, count=1)}"


def most_common(counts: Counter[str], most: int = 50) -> dict[str, int]:
    """The counts; if there are very many, the rare ones are counted together."""
    if len(counts) <= most:
        return dict(counts)
    kept = dict(counts.most_common(most))
    return {**kept, f"others, of {len(counts) - most:,} further kinds": counts.total() - sum(kept.values())}


def markdown(text: str) -> str:
    """The text as plain Markdown: it begins no link, picture, table, heading or HTML."""
    if _LINKED.search(text):
        return code_span(text)
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:<-])", r"\\\1", html.escape(one_line(text), quote=False))


def code_span(text: str) -> str:
    """The text between enough backticks that none in it ends the span."""
    line = one_line(text).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def plain_console(**options: Any) -> Any:
    """rich's Console for plain text, without markup and without escapes from others."""
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    return Plain(highlight=False, markup=False, emoji=False, **options)

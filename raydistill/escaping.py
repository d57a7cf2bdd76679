"""How terminals, pages, cards and pictures show the names and words of strangers.

They may hold more than text: escapes that clear the screen or set a link, marks that change the direction of writing,
line ends, markup. What is stored and compared stays as it is. `quoted` names files, no two alike; `for_terminal` is the
last look at all that is printed.
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
# Each is looked for at its beginning alone.
_LONG_NAME = re.compile(rf"(?<![^\s/])[^\s/]{{{_LONGEST_NAME + 1},}}+")
_LONG_LINE = re.compile(rf"(?m)^[^\n]{{{_LONGEST_LINE + 1},}}+")
_JOINERS = "\u200c\u200d"  # Persian, Indian scripts and emoji need them; between Latin letters they hide
_SIGNS = re.compile("[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd]")  # formats, and yet seen
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats (marks of direction, tags), half characters, separators
_LINKED = re.compile(r"(?i)://|www\.|@|mailto:|xmpp:")  # hubs make links of these, escaped or not, except in code
# What progress bars and colours of libraries need. None of it clears a screen, sets a title or makes a link.
_OF_BARS = re.compile(r"(\r|\x1b\[[\d;]*[mKAB]|\x1b\[\?25[hl])")


def _escaped(text: str, kept: str = "") -> str:
    """With each character that is no text as Python and bash write it: `\\x1b`, `\\u202e`."""
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


def quoted(name: str) -> str:
    r"""The name itself or, where it cannot be shown, the form of `ls` and bash, which can be pasted back:
    `$'caf\xe9.png'`. No two names are written alike. The result is always UTF-8 on one line."""
    if _escaped(name) == name and not name.startswith("$'"):
        return name
    return "$'" + _escaped(re.sub(r"[\\']", r"\\\g<0>", name)) + "'"


def printable(text: str) -> str:
    """The text with escapes for characters that are no text, `truncated`. Names longer than any file's are cut in the
    middle. Line ends stay; `one_line` is for names."""
    shown = truncated(_escaped(truncated(text), "\n\t"))
    return _LONG_NAME.sub(lambda found: shortened(found[0], _LONGEST_NAME), shown)


def truncated(text: str, clean: Callable[[str], str] = str) -> str:
    """The text with long lines, the names in them first, and a long text itself, cut in the middle. Cheap for any
    length: it comes before all that looks at each character. The ends are `clean`ed before they are cut: half a secret
    is known by nothing."""

    def short(line: re.Match[str]) -> str:
        names = _LONG_NAME.sub(lambda found: _ends(found[0], _LONGEST_NAME, clean), line[0])
        return _ends(names, _LONGEST_LINE, clean)

    return _ends(_LONG_LINE.sub(short, text), _LONGEST_TEXT, clean)


def _ends(text: str, most: int, clean: Callable[[str], str]) -> str:
    if len(text) <= most:
        return text
    return f"{clean(text[:most])[: most // 2]}…{clean(text[-most:])[-(most // 4) :]} ({len(text):,} characters)"


def one_line(text: str) -> str:
    """The same with escapes for line ends too."""
    return printable(text.replace("\n", "\\n").replace("\t", "\\t"))


def for_terminal(text: str) -> str:
    """What a terminal may get from libraries and other machines: text, lines, colours and bars."""
    if text.isprintable():
        return text
    return "".join(part if k % 2 else _escaped(part, "\n\t") for k, part in enumerate(_OF_BARS.split(text)))


def for_figure(name: str) -> str:
    """For matplotlib, which reads a formula between dollars; short enough to leave room for the picture."""
    return shortened(one_line(name), 40).replace("$", r"\$")


def shortened(text: str, most: int = 60) -> str:
    """In one line of about `most` characters, with the number that there were: for pictures and headings."""
    line = text.replace("\n", "\\n")
    if len(line) <= most:
        return line
    return f"{line[: most // 2]}…{line[-(most // 4) :]} ({len(text):,} characters)"


def first_few(names: Sequence[str], most: int = 5) -> str:
    """The first of these names, and how many more there are."""
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def most_common(counts: Counter[str], most: int = 50) -> dict[str, int]:
    """The counts, of which the rarer are one where there are very many: the words of strangers make kinds."""
    if len(counts) <= most:
        return dict(counts)
    kept = dict(counts.most_common(most))
    return {**kept, f"others, of {len(counts) - most:,} further kinds": counts.total() - sum(kept.values())}


def markdown(text: str) -> str:
    """The text as it is, in Markdown: no link, picture, table, heading or HTML begins in it."""
    if _LINKED.search(text):
        return code_span(text)
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:<-])", r"\\\1", html.escape(one_line(text), quote=False))


def code_span(text: str) -> str:
    """The text between so many backticks that none in it ends the span."""
    line = one_line(text).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def plain_console(**options: Any) -> Any:
    """rich's Console for plain text: neither markup nor escapes of strangers."""
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    return Plain(highlight=False, markup=False, emoji=False, **options)

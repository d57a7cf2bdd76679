"""Names of strangers, as terminals, pages, pictures and cards show them."""

from __future__ import annotations

import io
import logging
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from rich.table import Table

from raydistill.escaping import (
    code_span,
    counted,
    for_figure,
    for_terminal,
    markdown,
    one_line,
    plain_console,
    printable,
    quoted,
    shortened,
)
from raydistill.runtime.progress import Progress
from raydistill.secrets import for_page

HOSTILE = {
    "clears the screen": "\x1b[2J\x1b[Hcat",
    "a link of a terminal": "\x1b]8;;http://evil.example\x1b\\cat\x1b]8;;\x1b\\",
    "a title": "\x1b]0;owned\x07cat",
    "an 8-bit escape": "\x9b31mcat",
    "writes over the line": "cat\rdog",
    "back": "cat\b\b\bdog",
    "other direction": "cat\u202egnp.exe",
    "isolates": "\u2066cat\u2069",
    "a mark": "\u200fcat\u200e\u061c",
    "nothing to see": "c\u200bat\ufeff\u2060",
    "tags": "cat\U000e0041\U000e007f",
    "lines": "cat\u2028dog\u2029",
    "bytes that are no text": "cat\udcff",
    "zero": "cat\x00dog",
    "markup of rich": "[bold]cat[/bold] [/] [link=http://evil.example]x[/link]",
    "emoji of rich": ":smiley:",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "quotes": "\"'><svg/onload=alert(1)>",
}
ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


@given(st.text(st.characters(exclude_categories=()), max_size=400))
def test_nothing_but_text_is_left(text: str) -> None:
    shown = printable(text)
    assert not ODD.search(shown)
    assert {unicodedata.category(c) for c in shown} & {"Cs", "Zl", "Zp"} == set()
    assert printable(shown) == shown
    assert "\n" not in one_line(text)


@pytest.mark.parametrize(
    "name", ["café", "猫", "ネコ", "قطة", "👩‍🔬", "n̈", "red fox", "a-b_c.d", "می‌خواهم", "क्‍ष", "٪؀١", "❤️"]
)
def test_names_of_all_languages_stay_as_they_are(name: str) -> None:
    assert printable(name) == one_line(name) == shortened(name) == quoted(name) == for_terminal(name) == name


def test_joiners_that_join_nothing_are_shown() -> None:
    assert printable("c\u200dat \u200c") == "c\\u200dat \\u200c"


BARS = ["\x1b[31m", "\x1b[0m", "\x1b[2K", "\x1b[1A", "\r", "\x1b[?25l", "\n", "\t", "50% ━━"]
ORDERS = [
    "\x1b[2J", "\x1b[H", "\x1b]0;t\x07", "\x1bc", "\x9b2J", "\x1b[?1049h", "\x1bP", "\x1b[6n", "\x07", "\x1b", "[2J",
]  # fmt: skip


@given(st.lists(st.sampled_from([*BARS, *ORDERS, "\u202e"]) | st.text(max_size=3), max_size=12))
def test_what_libraries_print_orders_a_terminal_nothing_but_colours_and_bars(parts: list[str]) -> None:
    shown = for_terminal("".join(parts))
    left = re.sub(r"\x1b\[[\d;]*[mKAB]|\x1b\[\?25[hl]|[\r\n\t]", "", shown)
    assert not ODD.search(left)
    assert "\x1b" not in left
    assert for_terminal("".join(BARS)) == "".join(BARS)


def test_a_name_is_no_formula() -> None:
    from matplotlib.text import Text

    for name in ("$x$", r"$\frac{1}{2}$", "a$b", "$$", r"\$x$", "cat"):
        assert Text(text=for_figure(name))._preprocess_math(for_figure(name)) == (name.replace(r"\$", r"\$"), False)


def test_long_names_are_cut_and_long_paths_are_not() -> None:
    shown = printable(f"class {'a' * 10_000} has one image")
    assert len(shown) < 400
    assert "10,000 characters" in shown
    path = "/".join(["x" * 255] * 12)
    assert printable(path) == path
    assert len(shortened("words of a name " * 700)) < 90


@pytest.mark.parametrize("unit", ["a b/", "\u202e /", "a b\n", "x" * 300 + "/", "x" * 4_999 + "\n"])
def test_a_text_of_any_length_is_cut_before_each_character_is_looked_at(unit: str) -> None:
    start = time.process_time()
    shown = printable(unit * (4_000_000 // len(unit)))
    assert len(shown) < 100_000
    assert max(map(len, shown.splitlines())) < 5_000
    assert re.search(r"\((3,999|4,000),\d\d\d characters\)", shown)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_terminal_gets_no_escape_of_a_stranger(case: str, terminal: bool) -> None:
    name, sink = HOSTILE[case], io.StringIO()
    console = plain_console(file=sink, force_terminal=terminal, width=200)
    table = Table("class", "images", box=None, title=name)
    table.add_row(name, "3")
    console.print(table)
    console.print(f"{name} is said")
    progress = Progress(console)
    progress.line(name)
    with progress.task("check", 2, "images") as advance:
        advance(1, name)
        advance(1)
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", sink.getvalue())  # what rich itself colours and moves
    assert not ODD.search(shown.replace("\r", ""))
    assert shown.count(printable(name)) >= 3


@pytest.mark.parametrize("case", HOSTILE)
def test_a_page_shows_a_name_as_text(case: str) -> None:
    environment = jinja2.Environment(autoescape=True, finalize=for_page)
    page = environment.from_string('<p title="{{ name }}">{{ name }}</p>').render(name=HOSTILE[case])
    assert not ODD.search(page)
    assert re.findall(r"<\s*/?\s*(\w+)", page) == ["p", "p"]


def test_a_name_that_looks_like_a_picture_keeps_no_secret() -> None:
    environment = jinja2.Environment(autoescape=True, finalize=for_page)
    assert "hunter2" not in environment.from_string("{{ name }}").render(name="data:https://me:hunter2@host/?x")


LINKED = re.compile("http|www|@")
MARKS = [
    *HOSTILE.values(), "a|b", "`code`", "a ``b", "[x](http://evil.example)", "![x](http://evil.example/pixel.png)",
    "# heading", "---", "- item", "1. one", "> quote", "*bold* _so_", "a\n\n---\nlicense: mit\n---\n", "<b>", "&lt;",
    "https://evil.example", "~~gone~~", "a\\|b", "$x$", "    code", "\tcode", "+ a", "|---|", "www.evil.example",
    "ann@evil.example",
]  # fmt: skip


@pytest.mark.parametrize("name", MARKS)
def test_markdown_shows_a_name_as_text(name: str) -> None:
    """By a parser of CommonMark with tables: one paragraph of text, or one span of code, that reads like the name."""
    parse = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse
    opening, inline, closing = parse(f"Names {markdown(name)}.")
    assert (opening.type, closing.type) == ("paragraph_open", "paragraph_close")
    kinds = {token.type for token in inline.children}
    # Hubs make links of addresses, too, wherever they stand but in code.
    assert kinds == {"text", "code_inline"} if LINKED.search(name) else kinds <= {"text", "text_special"}
    assert "".join(token.content for token in inline.children) == f"Names {one_line(name)}."
    _, inline, _ = parse(f"by {code_span(name)}.")
    assert [token.type for token in inline.children] == ["text", "code_inline", "text"]
    assert inline.children[1].content.strip() == one_line(name).replace("|", "\\|").strip()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"a/plain name.png", "a/plain name.png"),
        ("猫/naïve '\"\\ %$HOME.png".encode(), "猫/naïve '\"\\ %$HOME.png"),
        ("می\u200cخواهم 👩\u200d🔬.png".encode(), "می\u200cخواهم 👩\u200d🔬.png"),
        (b"caf\xe9.png", r"$'caf\xe9.png'"),
        (b"it's \xff\\", r"$'it\'s \xff\\'"),
        (b"a\x1b]0;title\x07b", r"$'a\x1b]0;title\x07b'"),
        (b"two\nlines\r\t", r"$'two\x0alines\x0d\x09'"),
        ("gpj.\u202eexe".encode(), r"$'gpj.\u202eexe'"),
        ("a\u2028b\x85c\ufeff".encode(), r"$'a\u2028b\u0085c\ufeff'"),
        (b"$'caf\\xe9.png'", r"$'$\'caf\\xe9.png\''"),
    ],
)
def test_names_are_written_as_the_shell_reads_them(name, shown):
    assert quoted(name.decode(errors="surrogateescape")) == shown


@given(st.lists(st.binary(min_size=1, max_size=12) | st.sampled_from([b"$'", "\u202e".encode(), b"\x9b", b"\\x41"])))
def test_every_name_is_safe_and_no_two_are_written_alike(parts):
    names = {part.decode(errors="surrogateescape") for part in (*parts, b"".join(parts))}
    shown = {quoted(name) for name in names}
    assert len(shown) == len(names)
    assert all(text.encode().decode() == text for text in shown)
    assert not any(sign in text for text in shown for sign in "\0\n\r\x1b\x9b\u202e")


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is the reference")
def test_bash_gives_the_names_bytes_back():
    names = [bytes([k]) * 2 + b"x" for k in range(1, 256)] + ["é\u202e\u200b".encode(), b"$'a'", b"\\'\xe9'\\n"]
    shown = [quoted(name.decode(errors="surrogateescape")) for name in names]
    words = " ".join(text if text.startswith("$'") else "'" + text.replace("'", "'\\''") + "'" for text in shown)
    command = ["bash", "-c", f"printf '%s\\0' {words}"]
    done = subprocess.run(command, env={"LC_ALL": "C.UTF-8"}, capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == names


def test_what_is_logged_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    from raydistill.cli.main import _Plain

    record = logging.LogRecord("raydistill", logging.WARNING, "", 0, "%s is damaged", ("\x1b[2Jx\u202e",), None)
    assert _Plain("%(levelname)s %(message)s").format(record) == r"WARNING \x1b[2Jx\u202e is damaged"


def test_a_command_shows_hostile_folders_as_text(tmp_path: Path) -> None:
    """Names that a file system takes, through the dataset doctor: its table, its page and its errors."""
    names = [name.replace("/", "_") for name in HOSTILE.values() if "\x00" not in name and "\udcff" not in name]
    for number, name in enumerate(names):
        folder = tmp_path / "set" / name
        folder.mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (16, 16), (9 * number, 99 * k, 0)).save(folder / f"{k}.png")
        (folder / f"broken{name}.png").write_bytes(b"\x89PNG")
    page = tmp_path / "page.html"
    words = ["check", f"images.path={tmp_path / 'set'}", "images.size=16", "--out", str(page)]
    ended = subprocess.run([sys.executable, "-m", "raydistill", *words], capture_output=True, timeout=120)
    shown = (ended.stdout + ended.stderr).decode()
    assert r"\x1b[2J" in shown, shown
    assert shown.count("$'") >= 3  # what bash reads back
    assert not ODD.search(shown)
    assert not re.search(f"{ODD.pattern}|<script>alert|onerror=alert.1.>", page.read_text())
    wrong = [sys.executable, "-m", "raydistill", "check", "images.path=/nowhere/\x1b]0;owned\x07"]
    ended = subprocess.run(wrong, capture_output=True, timeout=120)
    assert ended.returncode == 2
    assert not ODD.search(ended.stderr.decode())


@pytest.mark.parametrize(
    ("count", "plural", "said"),
    [
        (1, "files ending in .txt", "1 file ending in .txt"), (2000, "empty folders", "2,000 empty folders"),
        (1, "hidden and system files", "1 hidden and system file"), (1, "classes", "1 class"),
        (1, "pictures beside files of many images", "1 picture beside files of many images"),
    ],
)  # fmt: skip
def test_one_is_not_many(count: int, plural: str, said: str) -> None:
    assert counted(count, plural) == said

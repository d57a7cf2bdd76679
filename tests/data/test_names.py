"""Names as they are written: bash itself reads them back."""

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.data.names import written


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
    assert written(name.decode(errors="surrogateescape")) == shown


@given(st.lists(st.binary(min_size=1, max_size=12) | st.sampled_from([b"$'", "\u202e".encode(), b"\x9b", b"\\x41"])))
def test_every_name_is_safe_and_no_two_are_written_alike(parts):
    names = {part.decode(errors="surrogateescape") for part in (*parts, b"".join(parts))}
    shown = {written(name) for name in names}
    assert len(shown) == len(names)
    assert all(text.encode().decode() == text for text in shown)
    assert not any(sign in text for text in shown for sign in "\0\n\r\x1b\x9b\u202e")


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is the reference")
def test_bash_gives_the_names_bytes_back():
    names = [bytes([k]) * 2 + b"x" for k in range(1, 256)] + ["é\u202e\u200b".encode(), b"$'a'", b"\\'\xe9'\\n"]
    shown = [written(name.decode(errors="surrogateescape")) for name in names]
    words = " ".join(text if text.startswith("$'") else "'" + text.replace("'", "'\\''") + "'" for text in shown)
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {words}"], env={"LC_ALL": "C.UTF-8"}, capture_output=True, check=True
    )
    assert done.stdout.split(b"\0")[:-1] == names

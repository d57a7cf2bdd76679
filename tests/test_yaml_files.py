"""Files that people write: strange ones load as they are meant, or are refused at once by one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.errors import ConfigError
from raydistill.yaml_files import JobLoader, Loader, TextLoader, as_yaml, parse, read_mapping

# A file of these few lines that is asked of each loader in a process of its own, which may take 500 MB and a second.
LIMITED = """
import json, resource, sys, time
from raydistill import yaml_files
from raydistill.errors import ConfigError
resource.setrlimit(resource.RLIMIT_DATA, (500 * 1024**2,) * 2)
for path in sys.argv[1:]:
    for loader in (yaml_files.Loader, yaml_files.JobLoader, yaml_files.TextLoader):
        began = time.process_time()
        try:
            yaml_files.read_mapping(path, "give one", loader)
            said = "loads"
        except ConfigError as error:
            said = str(error)
        print(json.dumps([path, loader.__name__, said, time.process_time() - began]))
"""
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 30))
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{k}: &a{k}\n  <<: [{', '.join([f'*a{k - 1}'] * 9)}]\n  k{k}: 1\n" for k in range(1, 30)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}]\n" for k in range(1, 5_000))
HOSTILE = {
    "laughs": (LAUGHS, "line"),
    "laughs by merging": (MERGES, "line"),
    "a chain of aliases": (CHAIN, "nested too deeply"),
    "a circle": ("a: &a\n  b: *a\n", "line"),
    "brackets": ("a: " + "[" * 100_000, "nested too deeply"),
    "dashes": ("- " * 100_000, "nested too deeply"),
    "braces that close": ("a: " + "{a: " * 900 + "1" + "}" * 900, "nested too deeply"),
    "a large scalar": ("a: " + "x" * 40_000_000, "bytes, above "),
    "twice, deep": ("a:\n  - {b: 1, c: 2, b: 3}\n", "'b' is there twice"),
    "a list within itself": ("a: &a [*a]\n", "contains it"),
    "no anchor": ("a: *nowhere\n", "undefined alias"),
    "a merge of nothing": ("<<: 3\n", "merging"),
    "a name of a module": ("a: !!python/name:os.system\n", "could not determine"),
    "no day": ("a: !!timestamp 2024-99-99\n", "not YAML"),
    "twice": ("a: 1\nb: 2\na: 3\n", "line 3: not YAML: the key 'a' is there twice"),
    "twice, of two types": ("a: {1: x, '1': y}\n", "line 1: not YAML: the key '1' is there twice"),
    "an object": ("a: 1\nb: !!python/object/apply:os.system [touch RAN]\n", "line 2: not YAML: could not determine"),
    "a new object": ("a: !!python/object/new:os.system [touch RAN]\n", "line 1"),
    "a module": ("a: !!python/module:antigravity\n", "line 1"),
    "a tab": ("a:\n\tb: 1\n", "line 2"),
    "a zero": ("a: 1\nb: \x00\n", "line 2"),
    "an escape": ("a: 1\nb: \x1b[2J\n", "line 2"),
    "a set": ("images: !!set {a}\n", "line 1: not YAML: !!set makes a value that no key accepts"),
    "pairs": ("a: 1\nb: !!omap [a: 1]\n", "line 2: not YAML: !!omap"),
    "bytes": ("a:\n- !!binary aGVsbG8=\n", "line 2: not YAML: !!binary"),
    "a set as a key": ("{? !!set {a} : 1}\n", "not YAML: "),
    "tags": ("".join(f"%TAG !k{k}! a\n" for k in range(200_000)) + "---\na: 1\n", "more than 100 lines of %TAG"),
    "a long number to the base 60": ("a: !!int 1" + ":1" * 1_000_000, "not YAML: '1:1"),
    "no number": ("a: !!int x\n", "not YAML"),
    "no truth": ("a: !!bool x\n", "not YAML"),
    "no date": ("a: !!timestamp x\n", "not YAML"),
    "two documents": ("a: 1\n---\nb: 2\n", "2 documents"),
    "a list as a key": ("? [1]\n: 2\n", "line 1"),
}  # fmt: skip


def test_hostile_files_are_refused_at_once(tmp_path: Path) -> None:
    for case, (text, _) in HOSTILE.items():
        (tmp_path / f"{case}.yaml").write_text(text)
    (tmp_path / "UTF-16.yaml").write_text("a: 1\n", encoding="utf-16")
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9\n")
    told = {**{case: said for case, (_, said) in HOSTILE.items()}, "UTF-16": "save it as UTF-8", "latin": "as UTF-8"}
    command = [sys.executable, "-c", LIMITED, *(str(path) for path in tmp_path.iterdir())]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(lines) == 3 * len(told)
    for path, loader, said, seconds in lines:
        assert said.startswith(path), said
        assert "\n" not in said
        assert len(said) < len(path) + 400
        assert told[Path(path).stem] in said, loader
        assert seconds < 1, (path, loader)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("number", ["0x" + "f" * 5_000, "!!int 1" + ":59" * 3_000, "9" * 5_000])
def test_numbers_longer_than_python_writes_are_refused(number: str) -> None:
    with pytest.raises(ConfigError, match=r"^job: .*not YAML: .* is not a valid int"):
        parse(f"a: {number}", "job")


@pytest.mark.parametrize("word", ["1:30", "-1:30.5", "1" + ":1" * 1_000_000, "1" * 200_000 + "x"])
@pytest.mark.parametrize("loader", [Loader, JobLoader])
def test_what_looks_like_a_time_is_text_also_a_very_long_one(word: str, loader: type[Loader]) -> None:
    began = time.process_time()
    assert parse(f"a: {word}", "job", loader) == parse(as_yaml({"a": word}), "job", loader) == [{"a": word}]
    assert time.process_time() - began < 5


def test_names_are_text_as_they_are_written(tmp_path: Path) -> None:
    names = ["NO", "yes", "017", "0x1F", "1_000", "1e3", "2024-01-01", "12:30:45", "null", "~", "=", "3.10", "猫"]
    path = tmp_path / "names.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(f"{name}: {name} words" for name in names).encode())
    assert read_mapping(str(path), "", TextLoader) == {name: f"{name} words" for name in names}
    path.write_text("".join(f"{name}: 1\n" for name in names))
    assert list(read_mapping(str(path), "", JobLoader)) == names
    path.write_text("cat: NO\ndog: 017\nfox: {words: 2024-01-01, description: }\n")
    found = {"cat": "NO", "dog": "017", "fox": {"words": "2024-01-01", "description": None}}
    assert read_mapping(str(path), "", TextLoader) == found


def test_as_many_names_as_a_set_has_classes_load(tmp_path: Path) -> None:
    names = {f"class {k}": f"word {k}, other {k}" for k in range(100_000)}
    for path in (tmp_path / "names.yaml", tmp_path / "names.json"):
        lines = "".join(f"{name}: {words}\n" for name, words in names.items())
        path.write_text(json.dumps(names) if path.suffix == ".json" else lines)
        assert read_mapping(str(path), "", TextLoader) == names
    names["class 0"] = ",:[{" * 200_000  # signs in quotes are no values
    path.write_text(json.dumps(names))
    assert read_mapping(str(path), "", TextLoader) == names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": "b",\n "a": "c"}', "is there twice"),
        ('{"a":\n}', "line 2"),
        ("[" * 100_000, "deeply"),
        ('{"a": [' + "{}," * 400_000 + "{}]}", "more than 400,000 values"),
        ('{"a\\' + '"\\' * 400_000, "Unterminated"),
    ],
)
def test_json_is_held_to_the_same(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "names.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_mapping(str(path), "", TextLoader)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_what_is_written_is_read_back(tree: object) -> None:
    assert parse(as_yaml({"a": tree}), "it") == [{"a": tree}]


@given(st.text(st.sampled_from("ab01:-,[]{}&*!<>|?'\"#%@`\n \t.~eE_="), max_size=40))
def test_any_text_loads_or_is_refused(text: str) -> None:
    for loader in (Loader, JobLoader, TextLoader):
        said = "it: "
        try:
            parse(text, "it", loader)
        except ConfigError as error:
            said = str(error)
        assert said.startswith("it: "), text
        assert "\n" not in said, text

"""The tests that docs/cases.md names are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES = (ROOT / "docs" / "cases.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"(tests/[\w/]+\.py)::(\w+)", CASES)))


@cache
def functions_of(file: str) -> frozenset[str]:
    """Of the module and of its classes."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_that_a_case_names_exists(file: str, name: str) -> None:
    assert name.startswith("test_")
    assert name in functions_of(file)


def test_the_names_were_found() -> None:
    assert len(NAMED) >= 20


def test_every_case_is_there() -> None:
    sections = re.findall(r"^### (C\d\d) ", CASES, flags=re.MULTILINE)
    assert sections == [f"C{number:02d}" for number in range(1, 29)]

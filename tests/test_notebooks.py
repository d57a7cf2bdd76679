"""The notebooks are small, name no machine, and do what they say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from raydistill.config import RunConfig, known_keys
from tests import notebooks

KEYS = set(known_keys())


def code(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def named(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Every name that is given a value: of keyword arguments and of dictionaries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg:
            yield node.arg, node.value
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value, value


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_cells_parse_and_name_keys_that_there_are(name: str) -> None:
    found = 0
    for source in code(notebooks.read(name)):
        for section, value in named(ast.parse(source)):
            if section in RunConfig.model_fields and isinstance(value, ast.Dict):
                for key in value.keys:
                    if isinstance(key, ast.Constant):
                        assert f"{section}.{key.value}" in KEYS
                        found += 1
    assert found >= 10


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_outputs_are_kept_small_and_name_no_machine(name: str) -> None:
    file = notebooks.FOLDER / f"{name}.ipynb"
    notebook, text = notebooks.read(name), file.read_text(encoding="utf-8")
    nbformat.validate(notebook)
    assert file.stat().st_size < 200_000
    words = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.findall(r"(?<![\w.:/])/(?:home|root|tmp|Users|usr|opt|var|work|mnt)\b[^\s\"]*", words)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data", "execute_result"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs), "no warning is kept"
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    notebooks.tidy(notebook)
    assert nbformat.writes(notebook) == text.rstrip("\n"), "it is as `python -m tests.notebooks` leaves it"


def executed(name: str, folder: Path) -> Any:
    notebook = notebooks.read(name)
    notebooks.execute(notebook, folder)
    return notebook


def printed(notebook: Any) -> str:
    """What the cells print, and the tables that they show."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text", "") + output.get("data", {}).get("text/markdown", "") for output in outputs)


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, pattern
    return list(map(float, found.groups()))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_folder_becomes_a_student_that_is_shipped(tmp_path: Path) -> None:
    notebook = executed("folder_to_student", tmp_path)
    said = printed(notebook)
    (student,) = numbers(r"\btest_accuracy +([\d.]+)", said)
    (teacher,) = numbers(r"teacher_test_accuracy +([\d.]+)", said)
    assert 0.2 < student < teacher, "well above a guess, and below its teacher"
    low, high = numbers(r"interval of test accuracy: ([\d.]+) to ([\d.]+)", said)
    assert low < student < high
    assert "the same answers: True" in said
    (largest,) = numbers(r"the largest difference of a probability: ([\d.]+)", said)
    assert largest <= 5e-3, "as the graph rounds where it makes a picture smaller"
    page = next(o.data["text/html"] for c in notebook.cells for o in c.get("outputs", ()) if "<iframe" in str(o))
    assert "&lt;html" in page[:300]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_result_is_read_and_improved(tmp_path: Path) -> None:
    said = printed(executed("improve_a_student", tmp_path))
    kinds = ("both are right", "only the teacher is right", "only the student is right", "both are wrong")
    shares = [numbers(rf"{words} +([\d.]+)", said)[0] for words in kinds]
    assert sum(shares) == pytest.approx(1, abs=0.03)
    val = {name: numbers(rf"{name} +val ([\d.]+)", said)[0] for name in ("first run", "a pre-trained student")}
    assert val["a pre-trained student"] > val["first run"] + 0.05, "it stands out"
    assert "| distill_pretrained |" in said
    assert re.search(r"^Trial \d of", said, re.MULTILINE)

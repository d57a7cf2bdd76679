"""Folders that are named as exported students: what is wrong with one is said without loading torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raydistill.errors import ConfigError
from raydistill.models.metadata import check_export, read_metadata

WHOLE: dict[str, Any] = {
    "model": "timm:resnet10t", "library": "timm", "classes": ["a", "b"], "input": "pixels",
    "preprocessing": {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "interpolation": "bilinear"},
    "image": {"size": 32, "fit": "crop", "max_pixels": 1000},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "export"
    place.mkdir()
    (place / "raydistill.json").write_text(json.dumps(WHOLE))
    return place


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": "cat"}, "classes has to be a list"),
        ({"classes": []}, "classes has to have at least 1 item"),
        ({"classes": ["a", 1]}, "classes.1 has to be text"),
        ({"image": []}, "image has to be a mapping"),
        ({"image": WHOLE["image"] | {"size": "32"}}, "image.size has to be a whole number"),
        ({"image": WHOLE["image"] | {"size": 0}}, "image.size has to be greater than or equal to 1"),
        ({"image": WHOLE["image"] | {"fit": "\x1b[2J"}}, "image.fit has to be 'crop' or 'pad'"),
        ({"preprocessing": None}, "preprocessing has to be a mapping"),
        ({"preprocessing": WHOLE["preprocessing"] | {"mean": [1, 2]}}, "preprocessing.mean.2 is missing"),
        ({"input": 3}, "input has to be 'pixels' or 'normalised'"),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(folder: Path, changes: dict[str, Any], said: str) -> None:
    (folder / "raydistill.json").write_text(json.dumps(WHOLE | changes))
    with pytest.raises(ConfigError) as refused:
        read_metadata(str(folder))
    words = f"{folder} is not an exported student: its raydistill.json is damaged ({said}); export the student again"
    assert str(refused.value) == words


def test_what_is_no_folder_of_an_export_is_said_to_be_what_it_is(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "empty" / "model.onnx")
    for name, said in {
        "none": "no such file or folder", "link": "no such file or folder", "file": "it is not a folder",
        "pipe": "it is not a folder", "empty": "it has no raydistill.json",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=f"{name} is not an exported student: {said}; give the folder"):
            check_export(str(tmp_path / name), "onnx")
    os.mkfifo(folder / "model.onnx")
    with pytest.raises(ConfigError, match=r"/model\.onnx is not a regular file; use --engine torch"):
        check_export(str(folder), "onnx")
    (folder / "model.onnx").unlink()
    with pytest.raises(ConfigError, match=r"has no model\.onnx; use --engine torch"):
        check_export(str(folder), "onnx")
    with pytest.raises(ConfigError, match=r"has no config\.json; export the student again"):
        check_export(str(folder), "torch")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has no model\.safetensors; export the student again"):
        check_export(str(folder), "torch")
    with pytest.raises(ConfigError, match="--engine tensorrt: use onnx or torch"):
        check_export(str(folder), "tensorrt")


@pytest.mark.parametrize("command", [["predict", "x.png"], ["serve"]])
def test_a_wrong_folder_loads_no_torch(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "torch.py").write_text("print('torch is loaded')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from raydistill.cli import main; main()"
    words = [sys.executable, "-c", code, command[0], str(tmp_path), *command[1:]]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "it has no raydistill.json; give the folder that `raydistill export` printed" in ended.stderr
    assert "is loaded" not in ended.stdout + ended.stderr

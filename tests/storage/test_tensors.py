"""Headers of safetensors files of other users' workspaces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydistill.data.targets import read_all_targets, read_sample_ids
from raydistill.errors import CheckpointError
from raydistill.models.heads import HEAD_FILE, load_head
from raydistill.models.student import STUDENT_FILE, read_student

ABOUT = {
    "model": "timm:resnet10t", "library": "timm", "classes": ["a", "b"], "image": {"size": 32, "fit": "crop"},
    "preprocessing": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (HEAD_FILE, lambda path: load_head(str(path.parent))),
        ("t.safetensors", lambda path: read_all_targets(str(path))),
        ("t.safetensors", lambda path: read_sample_ids(str(path))),
        ("student.safetensors", lambda path: read_student(str(path.parent))),
    ],
)  # fmt: skip
def test_a_header_of_very_many_tensors_is_refused_by_its_length(
    tmp_path: Path, name: str, read: Callable[[Path], Any]
) -> None:
    (tmp_path / STUDENT_FILE).write_text(json.dumps(ABOUT))
    header = json.dumps({f"{k:06d}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for k in range(70_000)})
    (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(CheckpointError, match=r"a header of [0-9,]* bytes, above 4,194,304"):
        read(tmp_path / name)

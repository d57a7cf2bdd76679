"""Folders of soft targets as strangers send them: what the page describes is read, all else is refused by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydistill.data.open_targets import read_head_table, read_rows, read_settings
from raydistill.errors import DataError

IDS = [hashlib.blake2b(bytes([n]), digest_size=16).hexdigest() for n in range(3)]
CROP = [0.1, 0.2, 0.5, 0.25, 1, 1, 0.9, 1.1]
LOGITS, FEATURES = np.arange(12, dtype=np.float16).reshape(6, 2), np.arange(18, dtype=np.int8).reshape(6, 3)


def columns() -> dict[str, Any]:
    """Two views of three images, of two classes and three features, written without our code."""
    return {
        "sample_id": pa.array([name for name in IDS for _ in range(2)]),
        "view": pa.array([0, 1] * 3, pa.int32()),
        "parameters": pa.array([CROP] * 6, pa.list_(pa.float32(), 8)),
        "logits": pa.array(list(LOGITS), pa.list_(pa.float16())),
        "features": pa.array(FEATURES.tolist(), pa.list_(pa.int8())),
        "scale": pa.array([0.5] * 6, pa.float32()),
    }


def head() -> dict[str, Any]:
    weights = pa.array([[1, 2, 3], [4, 5, 6]], pa.list_(pa.float32()))
    return {"class": ["cat", "dog"], "weight": weights, "bias": pa.array([0, 1], pa.float32())}


def write(folder: Path, table: dict[str, Any], of_head: dict[str, Any], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(table), folder / "a.parquet")
    pq.write_table(pa.table(of_head), folder / "head.parquet")
    pins = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("a.parquet", "head.parquet")}
    unit = [1.0, 2.0, 0.25]
    parts = ["cat", "dog", pins["a.parquet"], pins["head.parquet"], repr(unit)]
    about = {
        "format": "soft targets of views", "version": 1, "made_by": "somebody", "teacher": {"model": "theirs"},
        "images": {"size": 24}, "views": {"per_image": 2}, "classes": ["cat", "dog"],
        "features": {
            "width": 3, "type": "int8", "unit": unit,
            "head": {"name": "head.parquet", "rows": 2, "sha256": pins["head.parquet"]},
        },
        "num_images": 3, "licence": None, "files": [{"name": "a.parquet", "rows": 6, "sha256": pins["a.parquet"]}],
        "fingerprint": hashlib.sha256("\n".join(parts).encode()).hexdigest(),
    }  # fmt: skip
    (folder / "soft_targets.json").write_text(json.dumps({**about, **changes}))
    return folder


def test_a_folder_that_another_program_wrote_is_read(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "theirs", columns(), head()))
    settings = read_settings(folder)
    rows = read_rows(folder, settings, settings.files[0])
    assert rows.sample_ids == [name for name in IDS for _ in range(2)]
    assert rows.views_V.tolist() == [0, 1] * 3
    np.testing.assert_array_equal(rows.parameters_VP, np.float32([CROP] * 6))
    np.testing.assert_array_equal(rows.logits_VC, LOGITS)
    np.testing.assert_array_equal(rows.teacher_values(settings), FEATURES * 0.5 * np.array([1, 2, 0.25]))
    weights, bias = read_head_table(folder, settings)
    assert (weights.tolist(), bias.tolist()) == ([[1, 2, 3], [4, 5, 6]], [0, 1])


def with_list(column: str, kind: Any, *values: list[Any]) -> Callable[[], dict[str, Any]]:
    return lambda: columns() | {column: pa.array([*values] + [columns()[column][0].as_py()] * (6 - len(values)), kind)}


F16, F32 = pa.list_(pa.float16()), pa.list_(pa.float32())
NOT_A_CROP = "parameters of a view"


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (lambda: {k: v for k, v in columns().items() if k != "logits"}, "no column logits"),
        (lambda: columns() | {"logits": pa.array(["1"] * 6)}, "no column logits of the type list"),
        (lambda: columns() | {"logits": pa.array([[1.0, 2]] * 6, F32)}, "no column logits of the type list"),
        (with_list("logits", F16, [1, 2, 3]), "a row does not have 2 numbers"),
        (with_list("logits", F16, [1, float("nan")]), "missing or not finite"),
        (with_list("logits", F16, [1, None]), "missing or not finite"),
        (with_list("logits", F16, None), "some of them empty"),
        (with_list("features", pa.list_(pa.int8()), []), "a row does not have 3 numbers"),
        (with_list("view", pa.int32(), 2), "a view is none of 0 to 1"),
        (with_list("view", pa.int32(), -1), "a view is none of 0 to 1"),
        (with_list("sample_id", pa.string(), "../../etc"), "not a sample id"),
        (with_list("sample_id", pa.string(), None), "some of them empty"),
        (with_list("scale", pa.float32(), float("inf")), "a scale is not finite"),
        (with_list("parameters", F32, [0.6, 0, 0.5, 0.5, 0, 1, 1, 1]), NOT_A_CROP),
        (with_list("parameters", F32, [-0.1, 0, 0.5, 0.5, 0, 1, 1, 1]), NOT_A_CROP),
        (with_list("parameters", F32, [0, 0, 0, 0.5, 0, 1, 1, 1]), NOT_A_CROP),
        (with_list("parameters", F32, [0, 0, 1, 1, 0.5, 1, 1, 1]), NOT_A_CROP),
        (with_list("parameters", F32, [0, 0, 1, 1, 0, 1, 1, 1e9]), NOT_A_CROP),
        (with_list("parameters", F32, [0, 0, 1, 1]), "a row does not have 8 numbers"),
        (lambda: {name: pa.chunked_array([column])[:5] for name, column in columns().items()}, "5 rows"),
    ],
)  # fmt: skip
def test_rows_that_no_view_has_are_refused(tmp_path: Path, table: Callable[[], dict[str, Any]], reason: str) -> None:
    folder = str(write(tmp_path / "theirs", table(), head()))
    settings = read_settings(folder)
    with pytest.raises(DataError, match=reason) as refused:
        read_rows(folder, settings, settings.files[0])
    assert "a.parquet" in str(refused.value)


# Degrees, hue, bits, share inverted, sigma, and left, top, width, height of the erased rectangle.
STRONGER = [-180, 0.5, 4, 0.5, 2 / 224, 0.75, 0, 0.25, 1]


def test_version_2_has_the_numbers_of_stronger_views(tmp_path: Path) -> None:
    stronger = with_list("parameters", F32, *[CROP + STRONGER] * 5, CROP + [0] * 9)()
    folder = str(write(tmp_path / "theirs", stronger, head(), version=2))
    settings = read_settings(folder)
    expected = np.float32([CROP + STRONGER] * 5 + [CROP + [0] * 9])
    np.testing.assert_array_equal(read_rows(folder, settings, settings.files[0]).parameters_VP, expected)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 181), (0, -181), (1, 0.51), (1, -0.51), (2, 9), (2, -1), (2, 4.5), (3, 1.1), (3, -0.1), (4, 0.01),
        (4, -0.001), (5, -0.1), (6, 0.1), (7, 0.3), (8, 1.1),
    ],
)  # fmt: skip
def test_numbers_of_stronger_views_have_bounds(tmp_path: Path, place: int, value: float) -> None:
    odd = [*STRONGER]
    odd[place] = value
    folder = str(write(tmp_path / "theirs", with_list("parameters", F32, *[CROP + odd] * 6)(), head(), version=2))
    settings = read_settings(folder)
    with pytest.raises(DataError, match="beyond the bounds of the format"):
        read_rows(folder, settings, settings.files[0])


@pytest.mark.parametrize(("version", "row"), [(1, CROP + STRONGER), (2, CROP)])
def test_each_version_has_its_own_number_of_numbers(tmp_path: Path, version: int, row: list[float]) -> None:
    folder = str(write(tmp_path / "theirs", with_list("parameters", F32, *[row] * 6)(), head(), version=version))
    settings = read_settings(folder)
    with pytest.raises(DataError, match="a row does not have"):
        read_rows(folder, settings, settings.files[0])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "other"}, "it is other, version 1; this version reads soft targets of views, version 1 or 2"),
        ({"version": 3}, "version 3; this version reads"),
        ({"surprise": 1}, "'surprise' does not belong to it"),
        ({"classes": ["dog", "cat"]}, "its fingerprint is not that of"),
        ({"classes": "cat"}, "classes has to be a list"),
        ({"views": {}}, "views.per_image is not a count"),
        ({"views": {"per_image": 10**9}}, "views.per_image is not a count"),
        ({"files": [{"name": "../a.parquet", "rows": 6, "sha256": ""}]}, "not the plain name"),
        ({"files": [{"name": "/etc/a.parquet", "rows": 6, "sha256": ""}]}, "not the plain name"),
        ({"files": [{"name": "a.parquet", "rows": -1, "sha256": ""}]}, "rows has to be greater"),
        ({"features": {"width": 3, "type": "pickle", "unit": None, "head": None}}, "features.type has to be"),
    ],
)
def test_settings_of_another_form_are_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    folder = write(tmp_path / "theirs", columns(), head(), **changes)
    with pytest.raises(DataError, match=reason) as refused:
        read_settings(str(folder))
    assert "soft_targets.json" in str(refused.value)


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", columns(), head())
    settings = read_settings(str(folder))
    data = (folder / "a.parquet").read_bytes()
    (folder / "a.parquet").write_bytes(data[:-1] + b"x")
    with pytest.raises(DataError, match=r"another SHA-256\); copy the folder again"):
        read_rows(str(folder), settings, settings.files[0])
    (folder / "a.parquet").unlink()
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        read_rows(str(folder), settings, settings.files[0])
    with pytest.raises(DataError, match="no such file; name a folder"):
        read_settings(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"class": ["dog", "cat"]}, "its rows are not the classes"),
        ({"weight": pa.array([[1, 2], [3, 4]], F32)}, "a row does not have 3 numbers"),
        ({"bias": pa.array([0, float("nan")], pa.float32())}, "a bias is not finite"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    folder = str(write(tmp_path / "theirs", columns(), head() | change))
    with pytest.raises(DataError, match=reason):
        read_head_table(folder, read_settings(folder))

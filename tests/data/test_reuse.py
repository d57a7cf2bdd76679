"""Stored soft targets of images that another set had too: found by image, whatever the files and their order."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from raydistill.data.reuse import find_known, read_known
from raydistill.data.targets import encode_targets, read_sample_ids
from raydistill.errors import CheckpointError


def name(number: int) -> str:
    return f"{number:032x}"


def stored(path: Path, numbers: list[int]) -> str:
    """Two views of three features; each is the number of its image, the view and the feature."""
    features = np.array([[[100 * n + 10 * k + d for d in range(3)] for n in numbers] for k in range(2)])
    path.write_bytes(encode_targets([name(n) for n in numbers], features))
    return str(path)


def test_rows_are_found_by_image_in_whatever_file_they_are(tmp_path: Path) -> None:
    files = [stored(tmp_path / "a", [5, 1, 9]), stored(tmp_path / "none", []), stored(tmp_path / "b", [3, 1])]
    known = find_known(files)
    asked = [3, 8, 9, 1, 4, 5]
    is_known, features = read_known(known.find([name(n) for n in asked]), len(asked))
    assert is_known.tolist() == [True, False, True, True, False, True]
    for row, number in enumerate(asked):
        if is_known[row]:
            np.testing.assert_array_equal(
                features[:, row], [[100 * number + 10 * k + d for d in range(3)] for k in range(2)]
            )


def test_where_nothing_is_known_there_are_no_features(tmp_path: Path) -> None:
    for files in ([], [stored(tmp_path / "a", [1])], [stored(tmp_path / "none", [])]):
        is_known, features = read_known(find_known(files).find([name(2), name(3)]), 2)
        assert is_known.tolist() == [False, False]
        assert features.shape == (0, 2, 0)


def test_ids_are_read_without_the_features(tmp_path: Path) -> None:
    assert read_sample_ids(stored(tmp_path / "a", [5, 255])) == bytes.fromhex(name(5) + name(255))


def test_a_damaged_file_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, damaged = stored(tmp_path / "whole", [1]), tmp_path / "damaged"
    data = Path(stored(damaged, [2])).read_bytes()
    deep, endless = b"[" * 200_000, (1 << 62).to_bytes(8, "little")
    for content in (*(data[:length] for length in range(len(data))), len(deep).to_bytes(8, "little") + deep, endless):
        damaged.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged is damaged"):
            read_sample_ids(str(damaged))
    with caplog.at_level(logging.WARNING):
        places = find_known([str(damaged), whole]).find([name(1), name(2)])
    assert places == {whole: [(0, 0)]}
    assert f"{damaged} is damaged" in caplog.text

"""Soft targets on disk: what was written, for these very images, or a refusal."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from raydistill.data.sample import sample_id
from raydistill.data.targets import decode_targets, encode_targets, read_views
from raydistill.errors import CheckpointError


def ids(count: int) -> list[str]:
    return [sample_id(bytes([n])) for n in range(count)]


@given(
    views=st.integers(1, 4), rows=st.integers(0, 6), features=st.integers(1, 7), order=st.permutations(range(3)),
    backwards=st.booleans(), kind=st.sampled_from([np.float16, np.float32, np.float64]),
)  # fmt: skip
def test_targets_come_back_as_they_were_however_they_lie_in_memory(views, rows, features, order, backwards, kind):
    values = np.random.default_rng(0).normal(size=(views, rows, features)).astype(np.float16).astype(kind)
    stored_order = np.ascontiguousarray(values.transpose(order))
    same = stored_order.transpose(np.argsort(order))
    if backwards:
        same = np.ascontiguousarray(same[:, ::-1])[:, ::-1]
    found = decode_targets(encode_targets(ids(rows), same), ids(rows), "train-00000")
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(("count", "is_read"), [(8, True), (17, True), (7, False), (12, False)])
def test_views_of_another_program_come_back_with_as_many_numbers_as_views_have(tmp_path, count, is_read):
    parameters_KRP = np.random.default_rng(0).random((2, 4, count), np.float32)
    (tmp_path / "train-00000.safetensors").write_bytes(
        encode_targets(ids(4), np.ones((2, 4, 3)), parameters_KRP=parameters_KRP)
    )
    if is_read:
        np.testing.assert_array_equal(read_views(str(tmp_path), "train", 0, ids(4))[1], parameters_KRP)
        return
    with pytest.raises(CheckpointError, match="parameters"):
        read_views(str(tmp_path), "train", 0, ids(4))


STORED = encode_targets(ids(4), np.ones((2, 4, 3)))


@pytest.mark.parametrize(
    "expected",
    [ids(3), ids(5), list(reversed(ids(4))), [*ids(3), sample_id(b"other")], []],
    ids=["fewer", "more", "another order", "another image", "none"],
)
def test_other_ids_are_refused(expected):
    decode_targets(STORED, ids(4), "train-00000")
    with pytest.raises(CheckpointError, match="train-00000"):
        decode_targets(STORED, expected, "train-00000")


def test_bytes_cut_off_anywhere_are_refused():
    for length in range(len(STORED)):
        with pytest.raises(CheckpointError, match="train-00000"):
            decode_targets(STORED[:length], ids(4), "train-00000")


@given(place=st.integers(0, 200), value=st.integers(0, 255))
def test_a_changed_header_is_refused_or_harmless(place, value):
    data = bytearray(STORED)
    data[place] = value
    try:
        found = decode_targets(bytes(data), ids(4), "train-00000")
    except CheckpointError:
        return
    assert found.shape == decode_targets(STORED, ids(4), "train-00000").shape
    assert found.dtype == np.float16


@pytest.mark.parametrize(
    "tensors",
    [
        {}, {"features": np.ones(3)}, {"sample_ids": np.zeros((4, 16), np.uint8)},
        *[
            {"sample_ids": ids_, "features": features}
            for ids_, features in [
                (np.zeros((4, 16), np.uint8), np.ones((4, 2), np.float16)),
                (np.zeros((4, 16), np.uint8), np.ones((2, 3, 8), np.float16)),
                (np.zeros((4, 16), np.uint8), np.ones((2, 4, 8), np.float32)),
                (np.zeros((4, 4), np.float32), np.ones((2, 4, 8), np.float16)),
            ]
        ],
    ],
)  # fmt: skip
def test_another_kind_of_file_is_refused(tensors):
    with pytest.raises(CheckpointError, match="train-00000"):
        decode_targets(save(tensors), ids(4), "train-00000")

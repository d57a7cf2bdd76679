"""Compact soft targets: the head's answers stay, distances stay nearly, and damaged files are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save
from scipy.special import softmax

from raydistill.data.compact import PROJECTION_FILE, Projection, fit_projection, read_projection, same
from raydistill.data.sample import sample_id
from raydistill.data.targets import decode_targets, encode_targets
from raydistill.errors import CheckpointError
from raydistill.models.heads import LinearHead, projection_loss

WIDTH, CLASSES = 48, 5


def features(rows: int, seed: int) -> np.ndarray:
    """Two views of features whose directions differ much in variance, away from zero."""
    rng = np.random.default_rng(seed)
    turned, _ = np.linalg.qr(np.random.default_rng(9).normal(size=(WIDTH, WIDTH)))
    return (rng.normal(size=(2, rows, WIDTH)) * 0.8 ** np.arange(WIDTH) @ turned + 3).astype(np.float16)


def fickle_head() -> LinearHead:
    """A head that weighs what varies least as much as the rest."""
    turned, _ = np.linalg.qr(np.random.default_rng(9).normal(size=(WIDTH, WIDTH)))
    weights = 0.05 * np.random.default_rng(1).normal(size=(CLASSES, WIDTH)) * 1.25 ** np.arange(WIDTH) @ turned
    return LinearHead(weights.astype(np.float32), -3 * weights.sum(axis=1).astype(np.float32))


def ids(count: int) -> list[str]:
    return [sample_id(bytes([n % 256, n // 256])) for n in range(count)]


def stored(projection: Projection, features_KRD: np.ndarray) -> np.ndarray:
    """Written and read again."""
    names = ids(features_KRD.shape[1])
    return decode_targets(encode_targets(names, projection.project(features_KRD), projection), names, "train-00000")


def test_a_heads_answers_to_images_that_it_was_not_fitted_to_stay() -> None:
    head = fickle_head()
    projection = fit_projection([features(500, 0), features(300, 1)], head.weight_CD)
    assert len(projection.deviations_J) < WIDTH / 2
    unseen = features(400, 2)
    full = softmax(head.logits(unseen), axis=2)
    compact = softmax(head.of(projection).logits(stored(projection, unseen)), axis=2)
    assert (full.argmax(2) == compact.argmax(2)).mean() > 0.97
    assert np.abs(full - compact).max() < 0.05
    one_view = unseen[0]
    equal, difference = projection_loss(head, projection, one_view)
    assert equal == (full[0].argmax(1) == compact[0].argmax(1)).sum()
    assert difference == pytest.approx(np.abs(full[0] - compact[0]).max(), abs=1e-5)


def test_principal_components_alone_would_lose_these_answers() -> None:
    """Otherwise the test above would show nothing."""
    head, seen, unseen = fickle_head(), features(800, 0), features(400, 2)
    mean = seen.astype(np.float64).mean(axis=(0, 1))
    *_, directions = np.linalg.svd(seen.reshape(-1, WIDTH) - mean, full_matrices=False)
    kept = directions[: WIDTH // 2]
    rebuilt = (unseen - mean) @ kept.T @ kept + mean
    assert (head.logits(unseen).argmax(2) == head.logits(rebuilt).argmax(2)).mean() < 0.9


def test_distances_keep_the_variance_that_components_hold() -> None:
    projection = fit_projection([features(800, 0)], fickle_head().weight_CD)
    np.testing.assert_allclose(
        projection.components_JD @ projection.components_JD.T, np.eye(len(projection.deviations_J)), atol=1e-5
    )
    unseen = features(400, 3)
    coordinates = stored(projection, unseen).astype(np.float64)
    share = coordinates.var(axis=1).sum() / unseen.astype(np.float64).var(axis=1).sum()
    assert 0.78 < share < 1


@given(rows=st.integers(0, 5), width=st.integers(2, 9), classes=st.integers(2, 12), seed=st.integers(0, 9))
def test_any_shape_comes_back(rows: int, width: int, classes: int, seed: int) -> None:
    """Also of few images, of classes that outnumber features, and of features that are all the same."""
    rng = np.random.default_rng(seed)
    seen = rng.normal(size=(2, rows + 1, width)).astype(np.float16) * (seed % 3)
    projection = fit_projection([seen], rng.normal(size=(classes, width)).astype(np.float32))
    kept = len(projection.deviations_J)
    assert 1 <= kept <= width
    found = stored(projection, seen[:, :rows])
    assert found.shape == (2, rows, kept)
    assert found.dtype == np.float16
    step = np.abs(projection.project(seen) / projection.deviations_J).max(initial=0) / 127
    errors = np.abs(found - projection.project(seen[:, :rows]).astype(np.float32))
    assert (errors <= (0.51 * step * projection.deviations_J + 1e-2)).all()


def test_a_copy_of_stored_coordinates_stays_the_same() -> None:
    projection = fit_projection([features(800, 0)], fickle_head().weight_CD)
    names, once = ids(30), projection.project(features(30, 4))
    again = decode_targets(encode_targets(names, once, projection), names, "a")
    twice = decode_targets(encode_targets(names, again, projection), names, "b")
    np.testing.assert_allclose(again, twice, rtol=2e-3)


def test_a_view_takes_a_byte_for_each_component_and_two() -> None:
    projection = fit_projection([features(800, 0)], fickle_head().weight_CD)
    small, large = (
        len(encode_targets(ids(rows), projection.project(features(rows, 5)), projection)) for rows in (1000, 2000)
    )
    assert large - small == pytest.approx(1000 * (2 * (len(projection.deviations_J) + 2) + 16), abs=64)


def test_a_projection_comes_back_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    assert read_projection(str(tmp_path)) is None
    projection = fit_projection([features(800, 0)], fickle_head().weight_CD)
    file = tmp_path / PROJECTION_FILE
    file.write_bytes(projection.encode())
    found = read_projection(str(tmp_path))
    assert found is not None
    assert same(found, projection)
    assert not same(found, fit_projection([features(800, 1)], fickle_head().weight_CD))
    for name, array in vars(projection).items():
        np.testing.assert_array_equal(getattr(found, name), array)
    whole = file.read_bytes()
    tensors = load(whole)
    others = [{}, {**tensors, "mean": tensors["mean"][:-1].copy()}, {**tensors, "components": tensors["mean"]}]
    others += [
        {**tensors, "deviations": tensors["deviations"].astype(np.float64)},
        {**tensors, "num_views": np.ones(0)},
    ]
    for data in (whole[:100], whole[:-1], b"", *map(save, others)):
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"projection\.safetensors is damaged"):
            read_projection(str(tmp_path))


def test_damaged_compact_targets_are_refused() -> None:
    projection = fit_projection([features(800, 0)], fickle_head().weight_CD)
    whole = encode_targets(ids(4), projection.project(features(4, 5)), projection)
    tensors = load(whole)
    others = [{**tensors, name: array[:-1].copy()} for name, array in tensors.items()]
    others += [{**tensors, name: array.astype(np.float64)} for name, array in tensors.items()]
    others += [{key: array for key, array in tensors.items() if key != name} for name in tensors]
    for data in (*map(save, others), *(whole[:length] for length in range(0, len(whole), 37))):
        with pytest.raises(CheckpointError, match="train-00000"):
            decode_targets(data, ids(4), "train-00000")

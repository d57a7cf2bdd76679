"""The linear probe is the convex optimum it claims to be, whatever the features' scale."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info

from raydistill.errors import CheckpointError
from raydistill.models.heads import LinearHead, encode_head, load_head
from raydistill.stages.adapt import INVERSE_STRENGTHS, fit_linear_probe, near_chance


def blobs(num_classes: int, count: int, rng: np.random.Generator, spread: float = 1.0):
    labels = np.arange(count) % num_classes
    centres = rng.normal(0, 1, (num_classes, 5))
    scale, shift = np.array([1e-3, 1, 50, 1, 0.1]), np.array([5, 0, -100, 1, 0])
    features = (centres[labels] + rng.normal(0, spread, (count, 5))) * scale + shift
    return features.astype(np.float32), labels


def test_probe_is_the_optimum_of_its_own_objective() -> None:
    """Against a general-purpose minimiser of the penalised cross-entropy, written out by hand."""
    rng = np.random.default_rng(0)
    features, labels = blobs(3, 60, rng)
    head, l2 = fit_linear_probe((features, labels), (features[:0], labels[:0]), 3, class_balanced=False)
    mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    scaled = (features - mean) / scale

    def objective(flat: np.ndarray) -> float:
        weight, bias = flat[:15].reshape(3, 5), flat[15:]
        logits = scaled @ weight.T + bias
        likely = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return float(-likely[np.arange(60), labels].sum() + l2 * 0.5 * (weight**2).sum())

    best = minimize(objective, np.zeros(18), method="BFGS", options={"gtol": 1e-7})
    weight = head.weight_CD * scale
    bias = head.bias_C + head.weight_CD @ mean
    assert objective(np.concatenate([weight.ravel(), bias])) == pytest.approx(best.fun, rel=1e-4)


def test_a_small_probe_is_fitted_by_one_thread(monkeypatch) -> None:
    """Several wait for each other where other processes work too."""
    seen, fit = [], LogisticRegression.fit

    def fit_and_look(self, *given):
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return fit(self, *given)

    monkeypatch.setattr(LogisticRegression, "fit", fit_and_look)
    features, labels = blobs(3, 60, np.random.default_rng(0))
    fit_linear_probe((features, labels), (features, labels), 3, class_balanced=False)
    assert seen
    assert set(seen) == {1}


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_probe_separates_what_is_separable(num_classes: int) -> None:
    rng = np.random.default_rng(1)
    features, labels = blobs(num_classes, 40 * num_classes, rng, spread=0.05)
    half = 20 * num_classes
    head, _ = fit_linear_probe((features[:half], labels[:half]), (features[half:], labels[half:]), num_classes, False)
    logits = head.logits(features[half:])
    assert logits.shape == (half, num_classes)
    assert (logits.argmax(1) == labels[half:]).mean() > 0.98


def test_two_class_logits_give_the_probe_probability() -> None:
    rng = np.random.default_rng(2)
    features, labels = blobs(2, 80, rng, spread=2.0)
    head, _ = fit_linear_probe((features, labels), (features, labels), 2, False)
    logits = head.logits(features)
    likely = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    assert 0.6 < (likely.round() == labels).mean() < 1  # noisy blobs overlap, so the probe cannot be saturated
    assert np.abs(likely.mean() - labels.mean()) < 0.02  # a fitted bias makes the mean probability the base rate


def test_strength_is_the_best_on_val() -> None:
    """Every strength fitted again through scikit-learn's own pipeline: none is likelier on val than the chosen one."""
    rng = np.random.default_rng(3)
    features, labels = blobs(4, 460, rng, spread=1.5)
    train, val = (features[:60], labels[:60]), (features[60:], labels[60:])
    head, l2 = fit_linear_probe(train, val, 4, False)
    losses = {}
    for c in INVERSE_STRENGTHS:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(*train)
        losses[1 / c] = log_loss(val[1], probe.predict_proba(val[0]))
    assert len(set(losses.values())) > 3  # the choice matters here
    assert log_loss(val[1], softmax(head.logits(val[0]), axis=1)) == pytest.approx(min(losses.values()), rel=1e-4)
    assert losses[l2] == min(losses.values())


def test_few_labels_in_many_dimensions_leave_probabilities_that_say_something() -> None:
    """The strongest penalty ranks these classes best, with probabilities of 0.1 each, of which no student learns."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (10, 800))
    labels = np.arange(600) % 10
    features = (centres[labels] + rng.normal(0, 9, (600, 800))).astype(np.float32)
    train, val, test = ((features[k : k + 200], labels[k : k + 200]) for k in (0, 200, 400))
    head, _ = fit_linear_probe(train, val, 10, False)
    likely = softmax(head.logits(test[0]), axis=1)
    accuracy, confidence = (likely.argmax(1) == test[1]).mean(), likely.max(axis=1).mean()
    assert accuracy > 0.4
    assert abs(confidence - accuracy) < 0.2


def test_class_balanced_raises_the_rare_class() -> None:
    rng = np.random.default_rng(4)
    labels = np.array([0] * 190 + [1] * 10)
    features = (labels[:, None] * 1.0 + rng.normal(0, 1.2, (200, 3))).astype(np.float32)
    recalls = []
    for balanced in (False, True):
        head, _ = fit_linear_probe((features, labels), (features[:0], labels[:0]), 2, balanced)
        recalls.append((head.logits(features).argmax(1)[labels == 1] == 1).mean())
    assert recalls[1] > recalls[0] + 0.3


def test_head_survives_being_stored_whatever_its_memory_layout(tmp_path) -> None:
    rng = np.random.default_rng(5)
    weight = np.asfortranarray(rng.normal(size=(3, 4)).astype(np.float32))
    (tmp_path / "head.safetensors").write_bytes(encode_head(LinearHead(weight, np.arange(3, dtype=np.float32)[::-1])))
    stored = load_head(str(tmp_path))
    np.testing.assert_array_equal(stored.weight_CD, weight)
    np.testing.assert_array_equal(stored.bias_C, [2, 1, 0])


@pytest.mark.parametrize(
    "head",
    [
        b"junk", save({}), save({"weight": np.ones((3, 4))}), save({"weight": np.ones(3), "bias": np.ones(3)}),
        save({"weight": np.ones((3, 4)), "bias": np.ones(4)}),
    ],
)  # fmt: skip
def test_a_damaged_head_is_named(tmp_path, head) -> None:
    (tmp_path / "head.safetensors").write_bytes(head)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/head.safetensors is damaged"):
        load_head(str(tmp_path))


def test_near_chance_lies_between_chance_and_perfect() -> None:
    assert near_chance(0.2) == pytest.approx(0.28)
    assert near_chance(1.0) == 1.0

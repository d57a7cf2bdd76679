"""Cross-entropy with the labels, over those images that have one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from raydistill.losses.task import UNLABELLED, ClassWeights, class_weights, cross_entropy, label_weight
from tests import reference

pytestmark = pytest.mark.usefixtures("one_thread")


def random_batch(seed: int, images: int, classes: int, unlabelled: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, classes, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    labels[torch.rand(images, generator=generator) < unlabelled] = UNLABELLED
    return logits, labels


def test_equal_logits_give_the_log_of_the_number_of_classes():
    labels = torch.tensor([0, 6])
    assert cross_entropy(torch.zeros(2, 7), labels).item() == pytest.approx(math.log(7), abs=1e-6)


def test_unlabelled_images_weigh_nothing():
    logits, labels = random_batch(0, 8, 5)
    alone = cross_entropy(logits, labels)
    more = torch.cat([logits, 100 * torch.randn(24, 5)])
    with_others = cross_entropy(more, torch.cat([labels, torch.full((24,), UNLABELLED)]))
    torch.testing.assert_close(with_others, alone, rtol=1e-6, atol=0)


def test_weights_are_those_of_single_images():
    logits, labels = random_batch(0, 8, 5)
    labels[3] = UNLABELLED
    weights = torch.tensor([1.0, 0.5, 0.0, 9.0, 1.0, 0.25, 1.0, 1.0])
    expected = sum(
        weights[k] * reference.cross_entropy(logits[k : k + 1].tolist(), labels[k : k + 1].tolist())
        for k in range(8)
        if k != 3
    )
    assert cross_entropy(logits, labels, weights).item() == pytest.approx(float(expected) / 7, abs=1e-6)
    torch.testing.assert_close(cross_entropy(logits, labels, torch.ones(8)), cross_entropy(logits, labels))
    nothing = cross_entropy(logits, torch.full((8,), UNLABELLED), weights)
    assert nothing.item() == 0


@pytest.mark.parametrize("images", [1, 6])
def test_a_batch_without_labels_gives_zero_and_no_gradient(images):
    logits = torch.randn(images, 3, requires_grad=True)
    loss = cross_entropy(logits, torch.full((images,), UNLABELLED))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_logits_far_apart_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert torch.isfinite(logits.grad).all()


def weighted(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, *more: object) -> torch.Tensor:
    return cross_entropy(logits, labels, *more, classes=ClassWeights(weights, label_weight(labels, weights)))


@given(
    seed=st.integers(0, 10**6),
    smoothing=st.sampled_from([0.0, 0.1, 0.7]),
    unlabelled=st.sampled_from([0.0, 0.5]),
    weights=st.one_of(st.none(), st.lists(st.floats(0.01, 100), min_size=5, max_size=5)),
)
def test_class_weights_and_smoothing_are_those_of_torch_and_of_the_formula(seed, smoothing, unlabelled, weights):
    logits, labels = random_batch(seed, 8, 5, unlabelled)
    labels[0] = 0  # torch's mean over no image is NaN
    weights = None if weights is None else torch.tensor(weights)
    torchs = nn.CrossEntropyLoss(weight=weights, ignore_index=UNLABELLED, label_smoothing=smoothing)
    own, its = (logits.clone().requires_grad_() for _ in range(2))
    if weights is None:
        value = cross_entropy(own, labels, label_smoothing=smoothing)
    else:
        value = weighted(own, labels, weights, None, smoothing)
    expected = torchs(its, labels)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    slow = reference.cross_entropy(
        logits.tolist(), labels.tolist(), smoothing, None if weights is None else weights.tolist()
    )
    assert value.item() == pytest.approx(slow, rel=1e-5, abs=1e-6)
    value.backward()
    expected.backward()
    torch.testing.assert_close(own.grad, its.grad, rtol=1e-5, atol=1e-6)


def test_weights_of_images_multiply_those_of_their_classes():
    """Of a generated image whose label weighs 0.5, the loss weighs half of its class; the divisor has its class whole,
    as with equal classes it counts the image as one."""
    logits, labels = random_batch(1, 6, 3)
    of_image, of_class = torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0, 2.0]), torch.tensor([4.0, 1.0, 0.25])
    losses = [
        reference.cross_entropy([row], [label]) for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    each = of_image * of_class[labels]
    expected = float((each * torch.tensor(losses)).sum() / of_class[labels].sum())
    assert weighted(logits, labels, of_class, of_image).item() == pytest.approx(expected, rel=1e-5)
    equal = weighted(logits, labels, torch.ones(3), of_image)
    torch.testing.assert_close(equal, cross_entropy(logits, labels, of_image))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_with_class_weights_a_batch_without_labels_gives_zero_and_no_gradient(smoothing):
    logits = torch.randn(6, 3, requires_grad=True)
    loss = weighted(logits, torch.full((6,), UNLABELLED), torch.tensor([1e-3, 1.0, 1e3]), None, smoothing)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_balanced_weights_are_those_of_scikit_learn(labels):
    """Also where a class has one image; a class without any, of which scikit-learn knows nothing, has weight 1."""
    classes = ("a", "b", "c", "d", "e")
    found = class_weights("balanced", classes, np.bincount(labels, minlength=5))
    present = np.unique(labels)
    expected = dict(zip(present, compute_class_weight("balanced", classes=present, y=np.array(labels)), strict=True))
    assert found == pytest.approx([expected.get(c, 1.0) for c in range(5)])
    assert np.mean([found[c] for c in labels]) == pytest.approx(1)


def test_a_class_that_is_not_named_has_weight_one():
    assert class_weights({"b": 3}, ("a", "b", "c"), np.array([5, 1, 1])) == (1.0, 3.0, 1.0)

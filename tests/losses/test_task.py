"""Cross-entropy with the labels, over those images that have one."""

import math

import pytest
import torch

from raydistill.losses.task import UNLABELLED, cross_entropy
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

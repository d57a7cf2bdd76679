"""InfoNCE between two networks: the reference, closed forms, symmetries, and batches of one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from raydistill.losses.info_nce import info_nce

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPERATURES = [0.07, 0.5, 2.0]


def on_sphere(seed: int, images: int, dimensions: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(images, dimensions, generator=generator), dim=1)


@pytest.mark.parametrize("images", [2, 5, 16])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_networks_that_agree_on_orthogonal_embeddings(images, temperature):
    loss = info_nce(torch.eye(16)[:images], torch.eye(16)[:images], temperature)
    expected = math.log1p((images - 1) * math.exp(-1 / temperature))
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("images", [1, 2, 16])
def test_the_log_of_the_batch_where_nothing_is_told_apart(images):
    student, teacher = on_sphere(0, 1, 8).repeat(images, 1), on_sphere(1, 1, 8).repeat(images, 1)
    assert info_nce(student, teacher, 0.07).item() == pytest.approx(math.log(images), abs=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_partners_swapped_cost_the_difference_of_their_similarities(temperature):
    own = math.log1p(math.exp(-1 / temperature))
    swapped = info_nce(torch.eye(2), torch.eye(2).flip(0), temperature)
    assert swapped.item() == pytest.approx(own + 1 / temperature, rel=1e-6)


@given(seed=st.integers(0, 10**6), images=st.integers(1, 9))
def test_it_does_not_matter_which_network_is_which_nor_the_order_nor_the_orientation(seed, images):
    student, teacher = on_sphere(seed, images, 5), on_sphere(seed + 1, images, 5)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(images, generator=generator)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    expected = info_nce(student, teacher, 0.5).item()
    assert info_nce(teacher, student, 0.5).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert info_nce(student[order], teacher[order], 0.5).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert info_nce(student @ turn, teacher @ turn, 0.5).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_teacher_matched_to_the_wrong_image_costs_more():
    student = on_sphere(0, 16, 32)
    assert info_nce(student, student, 0.07).item() < 0.1
    assert info_nce(student, student.roll(1, dims=0), 0.07).item() > 5


def test_a_temperature_near_zero_does_not_overflow():
    student = on_sphere(0, 8, 16).requires_grad_()
    loss = info_nce(student, on_sphere(1, 8, 16), 1e-4)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_it_splits_into_alignment_and_uniformity():
    """Of unit vectors: the own similarity is 1 - distance^2 / 2, which is what the alignment term measures; what is
    left is the log-sum over the batch, which is small where the two networks spread apart."""
    student, teacher = on_sphere(0, 32, 8), on_sphere(1, 32, 8)
    squared_BB = torch.cdist(student, teacher).square()
    pulled = squared_BB.diagonal().mean() / 2
    pushed = [torch.logsumexp(-squared_BB / 2, dim=dim).mean() for dim in (0, 1)]
    assert info_nce(student, teacher, 1.0).item() == pytest.approx((pulled + sum(pushed) / 2).item(), rel=1e-5)

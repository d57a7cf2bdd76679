"""Alignment and uniformity on the unit sphere: the reference, closed forms, symmetries, and batches of one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from raydistill.losses.alignment_uniformity import alignment, uniformity

pytestmark = pytest.mark.usefixtures("one_thread")


def on_sphere(seed: int, images: int, dimensions: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(images, dimensions, generator=generator), dim=1)


def test_the_regression_vector_of_the_papers_code():
    torch.manual_seed(0)
    x, y = normalize(torch.randn(8, 128), dim=1), normalize(torch.randn(8, 128), dim=1)
    assert alignment(x, y, 2.0).item() == pytest.approx(2.037556, abs=1e-6)
    assert uniformity(x, 2.0).item() == pytest.approx(-4.000425, abs=1e-6)
    assert uniformity(y, 2.0).item() == pytest.approx(-3.867580, abs=1e-6)
    total = alignment(x, y, 2.0) + (uniformity(x, 2.0) + uniformity(y, 2.0)) / 2
    assert total.item() == pytest.approx(-1.896446, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0])
def test_alignment_of_known_angles(alpha):
    north, east = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert alignment(north, -north, alpha).item() == pytest.approx(2**alpha, rel=1e-6)
    assert alignment(north, east, alpha).item() == pytest.approx(math.sqrt(2) ** alpha, rel=1e-6)


@pytest.mark.parametrize("t", [0.5, 2.0])
def test_uniformity_of_known_arrangements(t):
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(opposite, t).item() == pytest.approx(-4 * t, rel=1e-6)
    assert uniformity(torch.eye(12), t).item() == pytest.approx(-2 * t, rel=1e-6)  # all pairs at the distance sqrt 2
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    expected = math.log((4 * math.exp(-2 * t) + 2 * math.exp(-4 * t)) / 6)
    assert uniformity(square, t).item() == pytest.approx(expected, rel=1e-6)


def test_uniformity_is_largest_where_all_points_are_one():
    point = on_sphere(0, 1, 8)
    collapsed = point.repeat(6, 1).requires_grad_()
    loss = uniformity(collapsed, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(collapsed.grad).all()
    assert uniformity(on_sphere(1, 6, 8), 2.0).item() < -0.5


@given(seed=st.integers(0, 10**6))
def test_uniformity_does_not_depend_on_order_or_orientation(seed):
    points = on_sphere(seed, 7, 5)
    generator = torch.Generator().manual_seed(seed)
    turned = points @ torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    shuffled = points[torch.randperm(7, generator=generator)]
    expected = uniformity(points, 2.0).item()
    assert uniformity(turned, 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert uniformity(shuffled, 2.0).item() == pytest.approx(expected, rel=1e-6)

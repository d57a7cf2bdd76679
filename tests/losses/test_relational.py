"""Distances and angles among the images of a batch: the reference, shapes by hand, and motions that change nothing."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydistill.losses.relational import rkd_angle, rkd_distance
from tests import reference

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = [rkd_distance, rkd_angle]
TRIANGLE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])  # equilateral
LINE = torch.tensor([[0.0], [1.0], [2.0]])


def random_features(seed: int, images: int, dimensions: int) -> torch.Tensor:
    return torch.randn(images, dimensions, generator=torch.Generator().manual_seed(seed))


def of_reference(loss: Callable[..., torch.Tensor]) -> Callable[..., float]:
    return {rkd_distance: reference.rkd_distance, rkd_angle: reference.rkd_angle}[loss]


def test_the_distances_of_a_line_and_a_triangle():
    """Relative to their mean: 1, 1, 1 of the triangle; 3/4, 3/4, 3/2 of the line."""
    expected = (2 * 0.25**2 / 2 + 0.5**2 / 2) / 3
    assert rkd_distance(LINE, TRIANGLE).item() == pytest.approx(expected, rel=1e-5)


def test_the_angles_of_a_line_and_a_triangle():
    """Cosines of the triangle: 1/2 at each corner. Of the line: 1 at its ends, -1 in its middle, past Huber's bend."""
    expected = (4 * 0.5**2 / 2 + 2 * (1.5 - 0.5)) / 27
    assert rkd_angle(LINE, TRIANGLE).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", BOTH)
def test_two_images_have_one_distance_and_no_angle(loss):
    assert loss(random_features(0, 2, 3), random_features(1, 2, 5)).item() == pytest.approx(0, abs=1e-6)


@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(0.01, 100),
    shift=st.floats(-3, 3),
    loss=st.sampled_from(BOTH),
)
def test_scale_rotation_and_shift_of_the_features_do_not_count(seed, scale, shift, loss):
    features, teacher = random_features(seed, 6, 5), random_features(seed + 1, 6, 7)
    turn = torch.linalg.qr(random_features(seed + 2, 5, 5))[0]
    moved = scale * (features @ turn + shift)
    assert loss(moved, features).item() == pytest.approx(0, abs=1e-6)
    assert loss(moved, teacher).item() == pytest.approx(loss(features, teacher).item(), rel=1e-3, abs=1e-5)
    assert loss(teacher, moved).item() == pytest.approx(loss(teacher, features).item(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("loss", BOTH)
def test_images_that_the_student_does_not_tell_apart_have_a_gradient_of_ordinary_size(loss):
    student, teacher = random_features(0, 6, 4), random_features(1, 6, 5)
    student[1] = student[0]
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(of_reference(loss)(student.tolist(), teacher.tolist()), rel=1e-5)
    assert 0 < student.grad.abs().max() < 1


@pytest.mark.parametrize("loss", BOTH)
@pytest.mark.parametrize("collapsed", ["student", "teacher", "both"])
def test_features_that_are_all_alike_stay_finite(loss, collapsed):
    alike, features = torch.full((6, 4), 0.3), random_features(0, 6, 4)
    student = (features if collapsed == "teacher" else alike).clone().requires_grad_()
    value = loss(student, features if collapsed == "student" else alike)
    value.backward()
    assert torch.isfinite(value)
    assert student.grad.abs().max() < 1

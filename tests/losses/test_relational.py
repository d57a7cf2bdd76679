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


@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 7),
    dimensions=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    spread=st.floats(0.1, 10),
    loss=st.sampled_from(BOTH),
)
def test_equals_the_reference(seed, images, dimensions, spread, loss):
    student = spread * random_features(seed, images, dimensions[0])
    teacher = random_features(seed + 1, images, dimensions[1])
    expected = of_reference(loss)(student.tolist(), teacher.tolist())
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss", BOTH)
@pytest.mark.parametrize("images", [2, 5])
def test_gradient_equals_differences_of_the_reference(loss, images):
    student, teacher = random_features(0, images, 3).requires_grad_(), random_features(1, images, 4)
    loss(student, teacher).backward()
    expected = reference.slopes(lambda x: of_reference(loss)(x, teacher.tolist()), student.tolist())
    torch.testing.assert_close(student.grad, torch.tensor(expected), rtol=1e-5, atol=1e-6)


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


@given(seed=st.integers(0, 10**6), images=st.integers(1, 7), loss=st.sampled_from(BOTH))
def test_never_negative_and_the_order_of_images_does_not_matter(seed, images, loss):
    student, teacher = random_features(seed, images, 5), random_features(seed + 1, images, 7)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    plain = loss(student, teacher).item()
    assert plain >= 0
    assert loss(student[order], teacher[order]).item() == pytest.approx(plain, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss", BOTH)
def test_zero_without_gradient_where_the_student_has_the_teachers_features(loss):
    teacher = random_features(0, 6, 5)
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(teacher))


@pytest.mark.parametrize("loss", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_batch_of_one_has_no_loss_and_no_gradient(loss, dtype):
    student = random_features(0, 1, 8).to(dtype).requires_grad_()
    value = loss(student, random_features(1, 1, 5).to(dtype))
    value.backward()
    assert value.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


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


@pytest.mark.parametrize("loss", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_features_stay_finite(loss, dtype):
    student, teacher = ((1e4 * random_features(seed, 6, 5)).to(dtype) for seed in (0, 1))
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("loss", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_computed_in_fp32(loss, dtype):
    student, teacher = random_features(0, 8, 32).to(dtype), random_features(1, 8, 48).to(dtype)
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(of_reference(loss)(student.tolist(), teacher.tolist()), rel=1e-5)

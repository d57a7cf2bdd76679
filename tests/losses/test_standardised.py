"""Soft targets with standardised logits: the reference, and that neither scale nor shift of the logits counts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydistill.losses.soft_targets import soft_target_kl
from raydistill.losses.standardised import standardised_kl
from tests import reference

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPERATURES = [1.0, 2.0, 4.0]


def random_logits(seed: int = 0, images: int = 6, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, classes, generator=generator), torch.randn(images, classes, generator=generator)


@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 9),
    classes=st.integers(2, 12),
    temperature=st.floats(0.5, 4),
    spread=st.floats(0.1, 10),
)
def test_equals_the_reference(seed, images, classes, temperature, spread):
    student, teacher = (spread * logits for logits in random_logits(seed, images, classes))
    expected = reference.standardised_kl(student.tolist(), teacher.tolist(), temperature) / temperature**2
    # Held before the factor T^2, which multiplies fp32's rounding too.
    found = standardised_kl(student, teacher, temperature).item() / temperature**2
    assert found == pytest.approx(expected, rel=5e-6, abs=2e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("images", [1, 4])
def test_gradient_equals_differences_of_the_reference(temperature, images):
    student, teacher = random_logits(1, images)
    student.requires_grad_()
    standardised_kl(student, teacher, temperature).backward()
    expected = reference.slopes(lambda x: reference.standardised_kl(x, teacher.tolist(), temperature), student.tolist())
    torch.testing.assert_close(student.grad, torch.tensor(expected), rtol=1e-5, atol=5e-6)


@given(
    seed=st.integers(0, 10**6),
    scales=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    shifts=st.tuples(st.floats(-10, 10), st.floats(-10, 10)),
    temperature=st.sampled_from(TEMPERATURES),
)
def test_neither_scale_nor_shift_of_either_network_counts(seed, scales, shifts, temperature):
    student, teacher = random_logits(seed)
    plain = standardised_kl(student, teacher, temperature).item() / temperature**2
    moved = standardised_kl(scales[0] * student + shifts[0], scales[1] * teacher + shifts[1], temperature)
    assert moved.item() / temperature**2 == pytest.approx(plain, rel=1e-3, abs=2e-5)
    same = standardised_kl(scales[0] * teacher + shifts[0], teacher, temperature)
    assert same.item() / temperature**2 == pytest.approx(0, abs=1e-6)


def test_of_logits_that_are_standardised_already_it_is_the_soft_target_loss():
    student, teacher = ((logits - logits.mean(1, True)) / logits.std(1, keepdim=True) for logits in random_logits())
    torch.testing.assert_close(standardised_kl(student, teacher, 2.0), soft_target_kl(student, teacher, 2.0))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_two_classes_are_told_apart_or_confused_and_nothing_between(temperature):
    """The standardised logits are 1/sqrt 2 and -1/sqrt 2, however sure a network is."""
    teacher = torch.tensor([[3.0, 1.0], [-0.1, 0.1]])
    apart = math.sqrt(2) / temperature
    sure = 1 / (1 + math.exp(-apart))
    confused = temperature**2 * (2 * sure - 1) * apart
    assert standardised_kl(9 * teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-5)
    assert standardised_kl(-9 * teacher, teacher, temperature).item() == pytest.approx(confused, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.3, -1e4])
def test_equal_logits_say_nothing_and_have_no_gradient(value):
    _, teacher = random_logits()
    student = torch.full((6, 5), value, requires_grad=True)
    loss = standardised_kl(student, teacher, 2.0)
    loss.backward()
    scores = [reference.z_score(row) for row in teacher.tolist()]
    assert loss.item() == pytest.approx(reference.soft_target_kl([[0.0] * 5] * 6, scores, 2.0), rel=1e-5)
    assert torch.equal(student.grad, torch.zeros(6, 5))


def test_a_teacher_without_an_opinion_teaches_equality():
    student, _ = random_logits()
    loss = standardised_kl(student, torch.full((6, 5), 0.3), 2.0)
    scores = [reference.z_score(row) for row in student.tolist()]
    assert loss.item() == pytest.approx(reference.soft_target_kl(scores, [[0.0] * 5] * 6, 2.0), rel=1e-5)


@given(seed=st.integers(0, 10**6), temperature=st.floats(0.5, 4))
def test_never_negative_and_the_order_of_images_and_classes_does_not_matter(seed, temperature):
    student, teacher = random_logits(seed)
    plain = standardised_kl(student, teacher, temperature).item()
    assert plain >= 0
    generator = torch.Generator().manual_seed(seed)
    order, classes = torch.randperm(6, generator=generator), torch.randperm(5, generator=generator)
    shuffled = standardised_kl(student[order][:, classes], teacher[order][:, classes], temperature).item()
    assert shuffled == pytest.approx(plain, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("images", [1, 6])
def test_logits_far_apart_stay_finite(dtype, images):
    generator = torch.Generator().manual_seed(0)
    student, teacher = ((1e4 * torch.randn(images, 5, generator=generator)).to(dtype) for _ in range(2))
    student.requires_grad_()
    loss = standardised_kl(student, teacher, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_fp32(dtype):
    student, teacher = (logits.to(dtype) for logits in random_logits(2, 32, 20))
    loss = standardised_kl(student, teacher, 4.0)
    assert loss.dtype == torch.float32
    expected = reference.standardised_kl(student.tolist(), teacher.tolist(), 4.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)

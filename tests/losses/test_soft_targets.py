"""The soft-target term: T^2 times the mean KL divergence, and what must not change it (case C05)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydistill.losses.soft_targets import soft_target_kl
from tests import reference

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPERATURES = [1.0, 2.0, 4.0, 8.0, 16.0]


def random_logits(seed: int = 0, images: int = 8, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, classes, generator=generator), torch.randn(images, classes, generator=generator)


def student_gradient(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    student = student.clone().requires_grad_()
    soft_target_kl(student, teacher, temperature).backward()
    return student.grad


@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 9),
    classes=st.integers(2, 12),
    temperature=st.floats(1, 4),
    spread=st.floats(0.1, 10),
)
def test_equals_the_reference(seed, images, classes, temperature, spread):
    student, teacher = (spread * logits for logits in random_logits(seed, images, classes))
    divergence = reference.soft_target_kl(student.tolist(), teacher.tolist(), temperature) / temperature**2
    # Held before the factor T^2, which multiplies fp32's rounding too.
    found = soft_target_kl(student, teacher, temperature).item() / temperature**2
    assert found == pytest.approx(divergence, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_equals_differences_of_the_reference(temperature):
    student, teacher = random_logits(1, images=4, classes=5)
    expected = reference.slopes(lambda x: reference.soft_target_kl(x, teacher.tolist(), temperature), student.tolist())
    gradient = student_gradient(student, teacher, temperature)
    torch.testing.assert_close(gradient, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_two_classes_by_hand():
    """Teacher 3/4 and 1/4, student 1/2 and 1/2: log 2 minus the teacher's entropy."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert soft_target_kl(student, teacher, 1.0).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_zero_without_gradient_where_student_and_teacher_agree(temperature):
    _, teacher = random_logits()
    assert soft_target_kl(teacher, teacher, temperature).item() == 0
    student = (teacher + torch.arange(8.0)[:, None]).requires_grad_()  # a constant per image changes no softmax
    loss = soft_target_kl(student, teacher, temperature)
    loss.backward()
    assert loss.item() / temperature**2 == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(student.grad, torch.zeros(8, 10), rtol=0, atol=1e-6)


@given(seed=st.integers(0, 10**6), temperature=st.floats(1, 4))
def test_never_negative(seed, temperature):
    assert soft_target_kl(*random_logits(seed), temperature).item() >= 0


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_same_for_the_batch_twice(temperature):
    student, teacher = random_logits()
    once = soft_target_kl(student, teacher, temperature)
    twice = soft_target_kl(student.repeat(2, 1), teacher.repeat(2, 1), temperature)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_same_with_classes_that_neither_believes_in(temperature):
    student, teacher = random_logits()
    nothing = torch.full((8, 90), -1e4)
    padded = soft_target_kl(torch.cat([student, nothing], 1), torch.cat([teacher, nothing], 1), temperature)
    torch.testing.assert_close(padded, soft_target_kl(student, teacher, temperature), rtol=1e-5, atol=0)


def test_gradient_keeps_its_size_whatever_the_temperature():
    student, teacher = random_logits()
    norms = [student_gradient(student, teacher, temperature).norm().item() for temperature in TEMPERATURES]
    # Without T^2 they would span a factor of 200.
    assert max(norms) / min(norms) < 1.25


def test_a_batch_of_one_is_finite():
    student, teacher = random_logits(images=1)
    expected = reference.soft_target_kl(student.tolist(), teacher.tolist(), 1.0)
    assert soft_target_kl(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(student_gradient(student, teacher, 4.0)).all()


def test_a_certain_teacher_does_not_overflow():
    student, teacher = torch.tensor([[-5e3, 5e3]]), torch.tensor([[5e3, -5e3]])
    assert soft_target_kl(student, teacher, 1.0).item() == pytest.approx(1e4)
    assert torch.isfinite(student_gradient(student, teacher, 1.0)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_fp32(dtype):
    student, teacher = (logits.to(dtype) for logits in random_logits(2, 32, 100))
    loss = soft_target_kl(student, teacher, 4.0)
    assert loss.dtype == torch.float32
    expected = reference.soft_target_kl(student.tolist(), teacher.tolist(), 4.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_autocast_changes_nothing():
    student, teacher = random_logits()
    with torch.autocast("cpu", torch.bfloat16):
        inside = soft_target_kl(student, teacher, 4.0)
    assert inside.item() == soft_target_kl(student, teacher, 4.0).item()

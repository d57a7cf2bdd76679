"""The soft-target term: T^2 times the mean KL divergence, and what must not change it (case C05)."""

import math

import pytest
import torch

from raydistill.losses.soft_targets import soft_target_kl

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPERATURES = [1.0, 2.0, 4.0, 8.0, 16.0]


def random_logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 10, generator=generator), torch.randn(8, 10, generator=generator)


def student_gradient(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    student = student.clone().requires_grad_()
    soft_target_kl(student, teacher, temperature).backward()
    return student.grad


def test_two_classes_by_hand():
    """Teacher 3/4 and 1/4, student 1/2 and 1/2: log 2 minus the teacher's entropy."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert soft_target_kl(student, teacher, 1.0).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_neither_the_batch_twice_nor_classes_that_nobody_believes_in_change_it(temperature):
    student, teacher = random_logits()
    once, nothing = soft_target_kl(student, teacher, temperature), torch.full((8, 90), -1e4)
    twice = soft_target_kl(student.repeat(2, 1), teacher.repeat(2, 1), temperature)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)
    padded = soft_target_kl(torch.cat([student, nothing], 1), torch.cat([teacher, nothing], 1), temperature)
    torch.testing.assert_close(padded, once, rtol=1e-5, atol=0)


def test_gradient_keeps_its_size_whatever_the_temperature():
    student, teacher = random_logits()
    norms = [student_gradient(student, teacher, temperature).norm().item() for temperature in TEMPERATURES]
    # Without T^2 they would span a factor of 200.
    assert max(norms) / min(norms) < 1.25


def test_a_certain_teacher_does_not_overflow():
    student, teacher = torch.tensor([[-5e3, 5e3]]), torch.tensor([[5e3, -5e3]])
    assert soft_target_kl(student, teacher, 1.0).item() == pytest.approx(1e4)
    assert torch.isfinite(student_gradient(student, teacher, 1.0)).all()

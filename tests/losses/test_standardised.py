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

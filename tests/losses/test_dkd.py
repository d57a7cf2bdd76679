"""Decoupled distillation: the reference, its identity with Hinton's loss, unlabelled images, and two classes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydistill.losses.dkd import dkd
from raydistill.losses.soft_targets import soft_target_kl
from raydistill.losses.task import UNLABELLED
from tests import reference

pytestmark = pytest.mark.usefixtures("one_thread")


def random_case(seed: int, images: int = 6, classes: int = 5, unlabelled: float = 0.3) -> tuple[torch.Tensor, ...]:
    """Student, teacher, labels."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(images, classes, generator=generator) for _ in range(2))
    labels = torch.randint(classes, (images,), generator=generator)
    labels[torch.rand(images, generator=generator) < unlabelled] = UNLABELLED
    return student, teacher, labels


@given(seed=st.integers(0, 10**6), classes=st.integers(2, 12), temperature=st.floats(1, 4), labelled=st.booleans())
def test_weighed_by_the_teachers_doubt_it_is_hintons_loss(seed, classes, temperature, labelled):
    """KL = KL of the target or not + (1 - p_t) * KL among the others, for each image by itself."""
    student, teacher, labels = random_case(seed, 1, classes, unlabelled=0.0 if labelled else 1.0)
    target = labels.item() if labelled else teacher.argmax().item()
    doubt = 1 - reference.softmax(teacher[0].tolist(), temperature)[target]
    found = dkd(student, teacher, labels, temperature, 1.0, doubt).item() / temperature**2
    expected = soft_target_kl(student, teacher, temperature).item() / temperature**2
    assert found == pytest.approx(expected, rel=1e-5, abs=2e-6)


def test_three_classes_by_hand():
    """Teacher 1/2, 1/4, 1/4; student 1/2, 1/3, 1/6: they agree on the target, not on the others."""
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.tensor([[1 / 2, 1 / 3, 1 / 6]]).log()
    labels = torch.tensor([0])
    among_others = 0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3))
    assert dkd(student, teacher, labels, 1.0, 1.0, 0.0).item() == pytest.approx(0, abs=1e-6)
    assert dkd(student, teacher, labels, 1.0, 0.0, 1.0).item() == pytest.approx(among_others, rel=1e-5)


def test_the_part_of_the_target_does_not_see_how_the_others_divide_what_is_left():
    student, teacher, labels = random_case(0, unlabelled=0.0)
    target = torch.nn.functional.one_hot(labels, 5).bool()
    others = student[~target].view(6, 4)
    moved = student.clone()
    moved[~target] = others.flip(1).flatten()
    found = dkd(moved, teacher, labels, 2.0, 1.0, 0.0)
    torch.testing.assert_close(found, dkd(student, teacher, labels, 2.0, 1.0, 0.0))


def test_the_part_of_the_others_does_not_see_the_logit_of_the_target():
    student, teacher, labels = random_case(0, unlabelled=0.0)
    moved = student + 7 * torch.nn.functional.one_hot(labels, 5)
    assert dkd(moved, teacher, labels, 2.0, 0.0, 1.0).item() == dkd(student, teacher, labels, 2.0, 0.0, 1.0).item()


def test_an_unlabelled_image_has_the_teachers_first_choice_as_its_target():
    student, teacher, _ = random_case(0)
    unlabelled = torch.full((6,), UNLABELLED)
    found = dkd(student, teacher, unlabelled, 2.0, 1.0, 8.0)
    assert torch.equal(found, dkd(student, teacher, teacher.argmax(dim=1), 2.0, 1.0, 8.0))
    assert found.item() != dkd(student, teacher, student.argmax(dim=1), 2.0, 1.0, 8.0).item()


def test_with_two_classes_nothing_is_left_to_compare_among_the_others():
    student, teacher, labels = random_case(0, classes=2)
    student.requires_grad_()
    loss = dkd(student, teacher, labels, 2.0, 0.0, 8.0)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros(6, 2))
    whole = dkd(student, teacher, labels, 2.0, 1.0, 8.0)
    torch.testing.assert_close(whole, soft_target_kl(student, teacher, 2.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("label", [0, 1, UNLABELLED])
def test_logits_far_apart_do_not_overflow(dtype, label):
    """In a batch of one; the teacher is as sure of the first class as the student is of the second."""
    student = torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype)
    loss = dkd(student, teacher, torch.tensor([label]), 4.0, 1.0, 8.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss.item() > 1e4
    assert torch.isfinite(student.grad).all()

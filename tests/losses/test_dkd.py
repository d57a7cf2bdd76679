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

TEMPERATURES = [1.0, 2.0, 4.0]


def random_case(seed: int, images: int = 6, classes: int = 5, unlabelled: float = 0.3) -> tuple[torch.Tensor, ...]:
    """Student, teacher, labels."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(images, classes, generator=generator) for _ in range(2))
    labels = torch.randint(classes, (images,), generator=generator)
    labels[torch.rand(images, generator=generator) < unlabelled] = UNLABELLED
    return student, teacher, labels


@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 9),
    classes=st.integers(2, 12),
    unlabelled=st.sampled_from([0.0, 0.5, 1.0]),
    temperature=st.floats(1, 4),
    factors=st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, 8.0])] * 2),
)
def test_equals_the_reference(seed, images, classes, unlabelled, temperature, factors):
    student, teacher, labels = random_case(seed, images, classes, unlabelled)
    expected = reference.dkd(student.tolist(), teacher.tolist(), labels.tolist(), temperature, *factors)
    # Held before the factor T^2, which multiplies fp32's rounding too.
    found = dkd(student, teacher, labels, temperature, *factors).item() / temperature**2
    assert found == pytest.approx(expected / temperature**2, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("factors", [(1.0, 0.0), (0.0, 1.0), (1.0, 8.0)])
@pytest.mark.parametrize("classes", [2, 5])
def test_gradient_equals_differences_of_the_reference(temperature, factors, classes):
    student, teacher, labels = random_case(1, 4, classes)
    student.requires_grad_()
    dkd(student, teacher, labels, temperature, *factors).backward()
    expected = reference.slopes(
        lambda x: reference.dkd(x, teacher.tolist(), labels.tolist(), temperature, *factors), student.tolist()
    )
    torch.testing.assert_close(student.grad, torch.tensor(expected), rtol=1e-5, atol=5e-6)


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


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_zero_without_gradient_where_student_and_teacher_agree(temperature):
    _, teacher, labels = random_case(0)
    student = (teacher + torch.arange(6.0)[:, None]).requires_grad_()  # a constant per image changes no softmax
    loss = dkd(student, teacher, labels, temperature, 1.0, 8.0)
    loss.backward()
    assert loss.item() / temperature**2 == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(student.grad, torch.zeros(6, 5), rtol=0, atol=5e-6)


@given(seed=st.integers(0, 10**6), temperature=st.floats(1, 4))
def test_never_negative_and_the_order_of_images_does_not_matter(seed, temperature):
    student, teacher, labels = random_case(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    plain = dkd(student, teacher, labels, temperature, 1.0, 8.0).item()
    assert plain >= 0
    shuffled = dkd(student[order], teacher[order], labels[order], temperature, 1.0, 8.0).item()
    assert shuffled == pytest.approx(plain, rel=1e-5)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_fp32(dtype):
    student, teacher, labels = random_case(2, 32, 20)
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss = dkd(student, teacher, labels, 4.0, 1.0, 8.0)
    assert loss.dtype == torch.float32
    expected = reference.dkd(student.tolist(), teacher.tolist(), labels.tolist(), 4.0, 1.0, 8.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)

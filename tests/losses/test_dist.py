"""Correlations within images and within classes: the reference, what they do not see, and rows without any spread."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from raydistill.losses.dist import dist
from tests import reference

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPERATURES = [1.0, 2.0, 4.0]


def random_logits(seed: int = 0, images: int = 6, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(images, classes, generator=generator), 2 * torch.randn(images, classes, generator=generator)


@given(seed=st.integers(0, 10**6), share=st.floats(0.2, 1.0), images=st.integers(2, 9), classes=st.integers(2, 12))
def test_zero_for_any_student_whose_probabilities_are_those_of_the_teacher_drawn_towards_equality(
    seed, share, images, classes
):
    """Correlation sees neither scale nor shift: a student that is less sure, and by as much everywhere, is perfect."""
    _, teacher = random_logits(seed, images, classes)
    probabilities = teacher.softmax(dim=1)
    # Far above the rounding of what the student is drawn to.
    assume(min(probabilities.std(dim=dim).min() for dim in (0, 1)) > 1e-3)
    student = (share * probabilities + (1 - share) / classes).log()
    assert dist(student, teacher, 1.0).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_two_images_of_two_classes_that_disagree_in_all_cost_the_most(temperature):
    """Every correlation is -1, so each of the two parts is 2."""
    teacher = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert dist(-teacher, teacher, temperature).item() == pytest.approx(4 * temperature**2, rel=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_single_image_correlates_within_itself_alone(temperature):
    _, teacher = random_logits(images=1)
    student = teacher.clone().requires_grad_()
    loss = dist(student, teacher, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(temperature**2, rel=1e-6)  # 0 within the image, 1 for classes without a batch
    torch.testing.assert_close(student.grad, torch.zeros(1, 5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 7, 10])
def test_rows_and_columns_without_any_spread_count_one_and_have_no_gradient(classes):
    """The mean of equal numbers is off by their rounding, which must correlate with nothing."""
    _, teacher = random_logits(images=7, classes=classes)
    student = torch.full((7, classes), 0.3, requires_grad=True)
    for other in (teacher, torch.zeros(7, classes)):
        loss = dist(student, other, 1.0)
        loss.backward()
        assert loss.item() == pytest.approx(2, abs=1e-6)
        assert torch.equal(student.grad, torch.zeros(7, classes))


def test_images_that_are_all_alike_leave_the_correlation_within_them():
    student, teacher = (logits[:1].repeat(7, 1) for logits in random_logits())
    within = 1 - reference.pearson(*(reference.softmax(logits[0].tolist()) for logits in (student, teacher)))
    assert dist(student, teacher, 1.0).item() == pytest.approx(1 + within, rel=1e-5)


@given(seed=st.integers(0, 10**6), temperature=st.floats(1, 4))
def test_it_lies_between_its_bounds_and_the_order_of_images_and_classes_does_not_matter(seed, temperature):
    student, teacher = random_logits(seed)
    plain = dist(student, teacher, temperature).item()
    assert 0 <= plain <= 4 * temperature**2 + 1e-5
    generator = torch.Generator().manual_seed(seed)
    order, classes = torch.randperm(6, generator=generator), torch.randperm(5, generator=generator)
    shuffled = dist(student[order][:, classes], teacher[order][:, classes], temperature).item()
    assert shuffled == pytest.approx(plain, rel=1e-4, abs=1e-5)
    assert dist(teacher, student, temperature).item() == pytest.approx(plain, rel=1e-4, abs=1e-5)

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


@given(seed=st.integers(0, 10**6), images=st.integers(1, 9), classes=st.integers(2, 12), temperature=st.floats(1, 4))
def test_equals_the_reference(seed, images, classes, temperature):
    student, teacher = random_logits(seed, images, classes)
    expected = reference.dist(student.tolist(), teacher.tolist(), temperature) / temperature**2
    # Held before the factor T^2, which multiplies fp32's rounding too.
    assert dist(student, teacher, temperature).item() / temperature**2 == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("images", "classes"), [(4, 5), (1, 4), (5, 3)])
def test_gradient_equals_differences_of_the_reference(temperature, images, classes):
    student, teacher = random_logits(1, images, classes)
    student.requires_grad_()
    dist(student, teacher, temperature).backward()
    expected = reference.slopes(lambda x: reference.dist(x, teacher.tolist(), temperature), student.tolist())
    torch.testing.assert_close(student.grad, torch.tensor(expected), rtol=1e-4, atol=1e-5)


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
def test_zero_where_student_and_teacher_agree(temperature):
    _, teacher = random_logits()
    student = (teacher + torch.arange(6.0)[:, None]).requires_grad_()  # a constant per image changes no softmax
    loss = dist(student, teacher, temperature)
    loss.backward()
    assert loss.item() / temperature**2 == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(student.grad, torch.zeros(6, 5), rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("images", [1, 6])
def test_logits_far_apart_stay_finite(dtype, images):
    generator = torch.Generator().manual_seed(0)
    student, teacher = ((1e4 * torch.randn(images, 5, generator=generator)).to(dtype) for _ in range(2))
    student.requires_grad_()
    loss = dist(student, teacher, 4.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_fp32(dtype):
    student, teacher = (logits.to(dtype) for logits in random_logits(2, 32, 20))
    loss = dist(student, teacher, 4.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.dist(student.tolist(), teacher.tolist(), 4.0), rel=1e-5)

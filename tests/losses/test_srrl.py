"""Softmax regression representation learning: the reference, and what it is zero for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydistill.losses.srrl import srrl
from tests import reference

pytestmark = pytest.mark.usefixtures("one_thread")


def random_case(seed: int, images: int = 6, dimensions: int = 7, classes: int = 5) -> list[torch.Tensor]:
    """Adapted features, what the teacher's head makes of them, the teacher's features and logits."""
    generator = torch.Generator().manual_seed(seed)
    adapted, features = (torch.randn(images, dimensions, generator=generator) for _ in range(2))
    weight = torch.randn(classes, dimensions, generator=generator)
    return [adapted, adapted @ weight.T, features, features @ weight.T]


def expected_of(case: list[torch.Tensor]) -> float:
    return reference.srrl(*(tensor.tolist() for tensor in case))


@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 9),
    dimensions=st.integers(1, 20),
    classes=st.integers(2, 12),
    spread=st.floats(0.1, 10),
)
def test_equals_the_reference(seed, images, dimensions, classes, spread):
    case = [spread * tensor for tensor in random_case(seed, images, dimensions, classes)]
    assert srrl(*case).item() == pytest.approx(expected_of(case), rel=1e-5)


def test_gradients_equal_differences_of_the_reference():
    case = random_case(0, 3, 4, 2)
    adapted, logits = (tensor.detach().requires_grad_() for tensor in case[:2])
    srrl(adapted, logits, *case[2:]).backward()
    rest = [tensor.tolist() for tensor in case]
    of_adapted = reference.slopes(lambda x: reference.srrl(x, *rest[1:]), rest[0])
    of_logits = reference.slopes(lambda x: reference.srrl(rest[0], x, *rest[2:]), rest[1])
    torch.testing.assert_close(adapted.grad, torch.tensor(of_adapted), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor(of_logits), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("images", [1, 6])
def test_zero_without_gradient_where_the_student_has_the_teachers_features(images):
    _, _, features, logits = random_case(0, images)
    adapted = features.clone().requires_grad_()
    loss = srrl(adapted, logits.clone(), features, logits)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(adapted.grad, torch.zeros_like(features))


def test_features_and_logits_count_apart_each_as_a_mean():
    """Every feature off by 2 and every logit off by 3, whatever their number."""
    features, logits = torch.randn(4, 9), torch.randn(4, 3)
    assert srrl(features + 2, logits, features, logits).item() == pytest.approx(4, rel=1e-5)
    assert srrl(features, logits - 3, features, logits).item() == pytest.approx(9, rel=1e-5)
    assert srrl(features + 2, logits - 3, features, logits).item() == pytest.approx(13, rel=1e-5)


@given(seed=st.integers(0, 10**6))
def test_never_negative_and_the_order_of_images_does_not_matter(seed):
    case = random_case(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert srrl(*case).item() >= 0
    assert srrl(*(tensor[order] for tensor in case)).item() == pytest.approx(srrl(*case).item(), rel=1e-5)


def test_what_is_far_apart_does_not_overflow():
    adapted = torch.full((2, 3), 1e4, dtype=torch.float16).requires_grad_()
    loss = srrl(adapted, torch.full((2, 4), 1e4), -adapted.detach(), torch.full((2, 4), -1e4))
    loss.backward()
    assert loss.item() == pytest.approx(8e8)
    assert torch.isfinite(adapted.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_computed_in_fp32(dtype):
    case = [tensor.to(dtype) for tensor in random_case(0, 16, 64, 10)]
    loss = srrl(*case)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected_of(case), rel=1e-5)

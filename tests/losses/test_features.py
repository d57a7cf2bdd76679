"""The distance of adapted features from the teacher's: the reference, and what each of the two kinds does not see."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydistill.losses.features import feature_distance

pytestmark = pytest.mark.usefixtures("one_thread")

DISTANCES = ["mse", "cosine"]


def random_features(seed: int, images: int = 6, dimensions: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, dimensions, generator=generator), torch.randn(images, dimensions, generator=generator)


def test_mse_of_features_all_off_by_two():
    _, teacher = random_features(0)
    assert feature_distance(teacher + 2, teacher, "mse").item() == pytest.approx(4, rel=1e-5)


def test_cosine_of_known_angles():
    east, north = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    assert feature_distance(east, north, "cosine").item() == pytest.approx(1, abs=1e-6)
    assert feature_distance(east, -2 * east, "cosine").item() == pytest.approx(2, abs=1e-6)
    assert feature_distance(east + 6 * north, east, "cosine").item() == pytest.approx(1 - 0.5**0.5, abs=1e-6)


@given(seed=st.integers(0, 10**6), factor=st.floats(0.01, 100))
def test_cosine_does_not_see_the_length_and_mse_does(seed, factor):
    adapted, teacher = random_features(seed)
    plain = feature_distance(adapted, teacher, "cosine").item()
    assert feature_distance(factor * adapted, teacher, "cosine").item() == pytest.approx(plain, abs=1e-5)
    both = feature_distance(factor * adapted, factor * teacher, "mse").item()
    assert both == pytest.approx(factor**2 * feature_distance(adapted, teacher, "mse").item(), rel=1e-4)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_that_are_large_or_zero_stay_finite(distance, dtype):
    adapted = torch.tensor([[1e4, -1e4, 1e4], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = feature_distance(adapted, torch.full((2, 3), -1e4, dtype=dtype), distance)
    (loss / 1e8).backward()  # fp16 gradients end at 65504
    assert torch.isfinite(loss)
    assert torch.isfinite(adapted.grad).all()

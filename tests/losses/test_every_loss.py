"""What holds for every loss: it equals its reference in value and gradient, is zero where the networks agree, does not
depend on the order of images, and is computed in fp32 and finite. What is special to one stands in a file of its own;
`crd`, which has a memory, in test_crd.py."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from raydistill.losses.alignment_uniformity import alignment, uniformity
from raydistill.losses.dist import dist
from raydistill.losses.dkd import dkd
from raydistill.losses.features import feature_distance
from raydistill.losses.info_nce import info_nce
from raydistill.losses.relational import rkd_angle, rkd_distance
from raydistill.losses.soft_targets import soft_target_kl
from raydistill.losses.srrl import srrl
from raydistill.losses.standardised import standardised_kl
from raydistill.losses.task import UNLABELLED, cross_entropy
from tests import reference

pytestmark = pytest.mark.usefixtures("one_thread")

Inputs = list[torch.Tensor]


def pair(seed: int, images: int, width: int) -> Inputs:
    """Student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, width, generator=generator) for _ in range(2)]


def two_widths(seed: int, images: int, width: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, w, generator=generator) for w in (width, width + 2)]


def two_on_sphere(seed: int, images: int, width: int) -> Inputs:
    return [normalize(tensor, dim=1) for tensor in pair(seed, images, width)]


def one_on_sphere(seed: int, images: int, width: int) -> Inputs:
    return two_on_sphere(seed, images, width)[:1]


def labelled_pair(seed: int, images: int, width: int) -> Inputs:
    """Student, teacher, and labels, of which some are none."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(width, (images,), generator=generator)
    labels[torch.rand(images, generator=generator) < seed % 3 / 2] = UNLABELLED
    return [*(2 * tensor for tensor in pair(seed, images, width)), labels]


def labelled(seed: int, images: int, width: int) -> Inputs:
    student, _, labels = labelled_pair(seed, images, width)
    return [student, labels]


def adapted(seed: int, images: int, width: int) -> Inputs:
    """Adapted features and what the teacher's head makes of them, the teacher's features and logits."""
    student, teacher = pair(seed, images, width)
    weight = torch.randn(5, width, generator=torch.Generator().manual_seed(seed + 1))
    return [student, student @ weight.T, teacher, teacher @ weight.T]


class Loss(NamedTuple):
    """`draw` makes its inputs, `settings` are what it may be given behind them. Tolerances are (relative, absolute)."""

    of: Callable[..., torch.Tensor]
    formula: Callable[..., float]
    draw: Callable[[int, int, int], Inputs]
    settings: list[tuple]
    learns: tuple[int, ...] = (0,)  # the inputs that have a gradient
    agree: dict[int, int] | None = None  # equal inputs at which it is zero, where there are such
    value: tuple[float, float] = (1e-5, 1e-6)
    gradient: tuple[float, float] = (1e-5, 1e-6)
    in_half: float = 1e-5
    spreads: tuple[float, ...] = (1.0,)
    of_logits: bool = False  # a constant for each image changes nothing; its first setting, squared, multiplies it
    alone_zero: bool = False  # a single image has nothing to be compared with
    is_bounded: bool = True  # never negative
    may_be_huge: bool = True

    def inputs(self, seed: int, images: int, width: int, spread: float = 1.0) -> Inputs:
        drawn = self.draw(seed, images, width)
        return [spread * tensor if tensor.is_floating_point() else tensor for tensor in drawn]

    def expected(self, inputs: Inputs, settings: tuple) -> float:
        return self.formula(*(tensor.tolist() for tensor in inputs), *settings)

    def unit(self, settings: tuple) -> float:
        return settings[0] ** 2 if self.of_logits else 1.0

    def with_gradients(self, inputs: Inputs, settings: tuple) -> tuple[torch.Tensor, Inputs]:
        leaves = [t.clone().requires_grad_(k in self.learns) for k, t in enumerate(inputs)]
        loss = self.of(*leaves, *settings)
        loss.backward()
        return loss, [leaves[k].grad for k in self.learns]


WIDE, SAME = (0.1, 1.0, 10.0), {0: 1}
AT_T = [(1.0,), (2.0,), (4.0,), (16.0,)]
FACTORS = [(1.0, 1.0, 0.0), (2.0, 0.0, 1.0), (4.0, 1.0, 8.0)]
LOSSES = {
    "task": Loss(cross_entropy, reference.cross_entropy, labelled, [()], value=(1e-6, 1e-6), in_half=1e-6),
    "smoothed task": Loss(lambda student, labels, share: cross_entropy(student, labels, None, share),
                          reference.cross_entropy, labelled, [(0.1,), (0.5,)]),
    "kd": Loss(soft_target_kl, reference.soft_target_kl, pair, AT_T, agree=SAME, value=(1e-6, 1e-6), in_half=1e-6,
               spreads=WIDE, of_logits=True),
    "standardised_kd": Loss(standardised_kl, reference.standardised_kl, pair, AT_T[:3], agree=SAME, value=(5e-6, 2e-6),
                            gradient=(1e-5, 5e-6), spreads=WIDE, of_logits=True),
    "dkd": Loss(dkd, reference.dkd, labelled_pair, FACTORS, agree=SAME, value=(2e-6, 2e-6), gradient=(1e-5, 5e-6),
                of_logits=True),
    "dist": Loss(dist, reference.dist, pair, AT_T[:3], agree=SAME, value=(1e-6, 5e-6), gradient=(1e-4, 1e-5),
                 of_logits=True),
    "srrl": Loss(srrl, reference.srrl, adapted, [()], learns=(0, 1), agree={0: 2, 1: 3}, spreads=WIDE,
                 may_be_huge=False),
    "feature": Loss(feature_distance, reference.feature_distance, pair, [("mse",), ("cosine",)], agree=SAME,
                    spreads=WIDE),
    "alignment": Loss(alignment, reference.alignment, two_on_sphere, [(1.0,), (1.5,), (2.0,), (3.0,)], learns=(0, 1),
                      agree=SAME, value=(1e-6, 1e-6), in_half=1e-6, may_be_huge=False),
    "alignment of roots": Loss(alignment, reference.alignment, two_on_sphere, [(0.5,)], learns=(0, 1),
                               value=(1e-6, 1e-6), in_half=1e-6, may_be_huge=False),
    "uniformity": Loss(uniformity, reference.uniformity, one_on_sphere, [(0.5,), (2.0,), (5.0,)], value=(1e-6, 1e-6),
                       in_half=1e-6, alone_zero=True, is_bounded=False, may_be_huge=False),
    "info_nce": Loss(info_nce, reference.info_nce, two_on_sphere, [(0.07,), (0.5,), (2.0,)], learns=(0, 1),
                     value=(1e-6, 2e-6), gradient=(1e-5, 2e-6), in_half=1e-6, alone_zero=True, may_be_huge=False),
    "rkd_distance": Loss(rkd_distance, reference.rkd_distance, two_widths, [()], agree=SAME, spreads=WIDE,
                         alone_zero=True),
    "rkd_angle": Loss(rkd_angle, reference.rkd_angle, two_widths, [()], agree=SAME, spreads=WIDE, alone_zero=True),
}  # fmt: skip
ALL = [
    pytest.param(loss, settings, id=f"{name}{settings}") for name, loss in LOSSES.items() for settings in loss.settings
]
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def those(wanted: Callable[[Loss], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("loss", "settings"), [case for case in ALL if wanted(case.values[0])])


EVERY = those(lambda loss: True)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@given(data=st.data(), seed=st.integers(0, 10**6), images=st.integers(1, 7), width=st.integers(2, 12))
def test_equals_the_reference(loss: Loss, data, seed, images, width):
    settings = data.draw(st.sampled_from(loss.settings))
    inputs = loss.inputs(seed, images, width, data.draw(st.sampled_from(loss.spreads)))
    found, expected = (value / loss.unit(settings) for value in (loss.of(*inputs, *settings).item(),
                                                                 loss.expected(inputs, settings)))  # fmt: skip
    assert found == pytest.approx(expected, rel=loss.value[0], abs=loss.value[1])


@EVERY
@pytest.mark.parametrize(("images", "width"), [(4, 5), (1, 4), (5, 3), (2, 2)])
def test_gradients_equal_differences_of_the_reference(loss: Loss, settings, images, width):
    inputs = loss.inputs(1, images, width)
    _, gradients = loss.with_gradients(inputs, settings)
    for k, gradient in zip(loss.learns, gradients, strict=True):

        def moved(x, k=k):
            return loss.formula(*(x if i == k else t.tolist() for i, t in enumerate(inputs)), *settings)

        expected = torch.tensor(reference.slopes(moved, inputs[k].tolist()))
        torch.testing.assert_close(gradient, expected, rtol=loss.gradient[0], atol=loss.gradient[1])


@those(lambda loss: loss.agree is not None)
def test_zero_without_gradient_where_student_and_teacher_agree(loss: Loss, settings):
    inputs = loss.inputs(0, 6, 5)
    for student, teacher in loss.agree.items():
        inputs[student] = inputs[teacher] + (torch.arange(6.0)[:, None] if loss.of_logits else 0)
    value, gradients = loss.with_gradients(inputs, settings)
    assert value.item() / loss.unit(settings) == pytest.approx(0, abs=1e-6)
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=loss.gradient[1])


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_never_negative_and_the_order_of_images_and_dimensions_does_not_matter(loss: Loss, data, seed):
    settings = data.draw(st.sampled_from(loss.settings))
    inputs, generator = loss.inputs(seed, 6, 5), torch.Generator().manual_seed(seed)
    plain = loss.of(*inputs, *settings).item()
    assert plain >= 0 or not loss.is_bounded
    order, columns = torch.randperm(6, generator=generator), torch.randperm(5, generator=generator)
    shuffled = [tensor[order] for tensor in inputs]
    if len({tensor.shape for tensor in inputs}) == 1:
        shuffled = [tensor[:, columns] for tensor in shuffled]
    close = pytest.approx(plain, rel=1e-5, abs=1e-5 * loss.unit(settings))
    assert loss.of(*shuffled, *settings).item() == close


@HALF
@EVERY
def test_half_precision_is_computed_in_fp32(loss: Loss, settings, dtype):
    inputs = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in loss.inputs(2, 16, 20)]
    value = loss.of(*inputs, *settings)
    assert value.dtype == torch.float32
    rounding = loss.value[1] * loss.unit(settings)
    assert value.item() == pytest.approx(loss.expected(inputs, settings), rel=loss.in_half, abs=rounding)


@those(lambda loss: loss.may_be_huge)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("images", [1, 6])
def test_what_is_far_apart_stays_finite(loss: Loss, settings, images, dtype):
    drawn = loss.inputs(0, images, 5, spread=1e4)
    inputs = [t.clamp(-6e4, 6e4).to(dtype) if t.is_floating_point() else t for t in drawn]
    value, gradients = loss.with_gradients(inputs, settings)
    assert torch.isfinite(value)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@those(lambda loss: loss.alone_zero)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_single_image_has_no_loss_and_no_gradient(loss: Loss, settings, dtype):
    value, gradients = loss.with_gradients([tensor.to(dtype) for tensor in loss.inputs(0, 1, 8)], settings)
    assert value.item() == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)

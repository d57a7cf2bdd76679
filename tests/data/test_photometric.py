"""Stronger views as they are rendered: each operation as torchvision does it, and the same view at any size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as vision

from raydistill.config import Views
from raydistill.data.views import MOST_PARAMETERS, NUM_PARAMETERS, render, view_parameters
from tests.data.test_stronger_views import SIGMA, STRONG, whole
from tests.data.test_views import JITTER, ids, one, plain

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN = torch.tensor([0.485, 0.456, 0.406])


def picture(photo) -> torch.Tensor:
    return torch.from_numpy(photo).permute(2, 0, 1) / 255


@pytest.mark.parametrize("turns", [-0.5, -0.3, -0.07, 0.01, 0.2, 0.45])
def test_hue_shifts_as_torchvision_shifts_it(photo, turns):
    expected = vision.adjust_hue(picture(photo), turns)
    torch.testing.assert_close(one(photo, whole(hue=turns), plain(128)), expected, rtol=0, atol=1e-5)


@given(st.floats(-0.5, 0.5), st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 6, 256]))
def test_hue_of_any_colours(turns, seed, levels):
    """Few levels make many greys and many channels that are equal."""
    drawn = np.random.default_rng(seed).integers(0, levels, (8, 8, 3))
    image = (drawn * (255 // (levels - 1))).astype(np.uint8)
    expected = vision.adjust_hue(picture(image), turns)
    torch.testing.assert_close(one(image, whole(hue=turns), plain(8)), expected, rtol=0, atol=2e-5)


def test_grey_is_torchvisions(photo):
    (found,) = view_parameters(Views(grey=1), 0, ids(1), [0])
    assert found[7] == 0
    expected = vision.rgb_to_grayscale(picture(photo), num_output_channels=3)
    torch.testing.assert_close(one(photo, whole(saturation=0), plain(128)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterizes_as_torchvision_does(photo, bits):
    expected = vision.posterize(picture(photo), bits)
    found = one(photo, whole(posterize=bits), plain(128))
    # A value on the edge of a level may fall to either side.
    assert ((found - expected).abs() < 1e-6).float().mean() > 0.999
    assert (found - expected).abs().max() < 2.0**-bits + 1e-6


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 0.9])
def test_solarizes_as_torchvision_does(photo, threshold):
    expected = vision.solarize(picture(photo), threshold)
    found = one(photo, whole(solarize=1 - threshold), plain(128))
    assert ((found - expected).abs() < 1e-6).float().mean() > 0.999


@pytest.mark.parametrize("sigma", [0.0005, 0.003, SIGMA])
def test_blurs_as_torchvision_does(photo, sigma):
    reach = int(np.ceil(4 * SIGMA * 128))
    expected = vision.gaussian_blur(picture(photo), [2 * reach + 1] * 2, [sigma * 128] * 2)
    torch.testing.assert_close(one(photo, whole(blur=sigma), plain(128)), expected, rtol=0, atol=1e-5)


def test_erases_whole_pixels_as_torchvision_does(photo):
    left, top, width, height = 16, 40, 32, 64
    expected = vision.erase(picture(photo), top, left, height, width, MEAN[:, None, None])
    found = one(photo, whole(erase=np.array([left, top, width, height]) / 128), plain(128))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@given(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.01, 1), st.floats(0.01, 1))
def test_an_erased_rectangle_covers_its_area_at_any_size(left, top, width, height):
    rectangle = np.float32([left, top, min(width, 1 - left), min(height, 1 - top)])
    white = np.full((64, 64, 3), 255, np.uint8)
    for size in (8, 33, 64):
        found = one(white, whole(erase=rectangle), plain(size))
        shares = (1 - found.mean(dim=(1, 2))) / (1 - MEAN)
        torch.testing.assert_close(shares, torch.full((3,), float(rectangle[2] * rectangle[3])), rtol=0, atol=1e-4)


@pytest.mark.parametrize("degrees", [-130.0, -15.0, 0.5, 7.0, 45.0])
def test_rotates_as_torchvision_does_with_mirrored_edges(photo, degrees):
    around = vision.pad(picture(photo), [64] * 4, padding_mode="symmetric")
    expected = vision.rotate(around, degrees, vision.InterpolationMode.BILINEAR)[:, 64:-64, 64:-64]
    torch.testing.assert_close(one(photo, whole(rotate=degrees), plain(128)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("degrees", "quarters"), [(90, 1), (180, 2), (-90, -1), (-180, 2)])
def test_quarter_turns_move_pixels_and_change_none(photo, degrees, quarters):
    expected = picture(photo).rot90(quarters, dims=(1, 2))
    torch.testing.assert_close(one(photo, whole(rotate=degrees), plain(128)), expected, rtol=0, atol=1e-3)


def test_all_operations_come_in_their_order(photo):
    changes = {"rotate": 12.0, "hue": 0.1, "posterize": 5.0, "solarize": 0.5, "blur": 0.006}
    rectangle = np.array([16, 40, 32, 64])
    found = one(
        photo, whole(**changes, erase=rectangle / 128, brightness=1.2, contrast=0.8, saturation=1.3), plain(128)
    )
    expected = picture(photo)
    for done in (
        lambda x: vision.pad(x, [64] * 4, padding_mode="symmetric"),
        lambda x: vision.rotate(x, 12.0, vision.InterpolationMode.BILINEAR)[:, 64:-64, 64:-64],
        lambda x: vision.adjust_brightness(x, 1.2),
        lambda x: vision.adjust_contrast(x, 0.8),
        lambda x: vision.adjust_saturation(x, 1.3),
        lambda x: vision.adjust_hue(x, 0.1),
        lambda x: vision.posterize(x, 5),
        lambda x: vision.solarize(x, 0.5),
        lambda x: vision.gaussian_blur(x, [11, 11], [0.006 * 128] * 2),
        lambda x: vision.erase(x, 40, 16, 64, 32, MEAN[:, None, None]),
    ):
        expected = done(expected)
    assert ((found - expected).abs() < 1e-3).float().mean() > 0.99  # values at the edge of a level differ


def test_numbers_that_are_off_leave_the_same_bytes(photo):
    images = torch.from_numpy(np.stack([photo, photo[::-1].copy(), 255 - photo]))
    for views in (Views(), JITTER):
        parameters = torch.from_numpy(view_parameters(views, 0, ids(3), range(3)))
        wide = torch.nn.functional.pad(parameters, (0, MOST_PARAMETERS - NUM_PARAMETERS))
        for size in (32, 50):
            assert torch.equal(render(images, parameters, plain(size)), render(images, wide, plain(size)))


@pytest.mark.parametrize(("seed", "share"), [(0, 0.3), (1, 0.5), (2, 0.7), (3, 1.0)])
def test_a_stronger_view_looks_the_same_alone_and_in_a_batch(photo, seed, share):
    images = np.stack([photo, photo[::-1], photo.transpose(1, 0, 2), 255 - photo, np.roll(photo, 30, axis=1)])
    views = STRONG.model_copy(update={"strong_share": share, "posterize": 0.0, "solarize": 0.0})
    parameters = view_parameters(views, seed, ids(5), range(5))
    together = render(torch.from_numpy(images), torch.from_numpy(parameters), plain(48, "bicubic"))
    assert ((together >= 0) & (together <= 1)).all()
    for image, row, found in zip(images, parameters, together, strict=True):
        torch.testing.assert_close(found, one(image.copy(), row, plain(48, "bicubic")), rtol=0, atol=1e-5)


def halved(view: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(view, 2)


# What an operation may differ between sizes, as a share of what it does.
@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"hue": 0.2}, 0.1), ({"saturation": 0}, 0.1), ({"rotate": 20}, 0.2), ({"posterize": 4}, 0.5),
        ({"solarize": 0.5}, 0.1), ({"blur": SIGMA}, 0.1), ({"erase": np.array([0.2, 0.3, 0.41, 0.33])}, 0.05),
    ],
)  # fmt: skip
def test_an_operation_does_the_same_at_two_sizes(photo, changes, most):
    light, changed = ([one(photo, whole(**c), plain(size)) for size in (512, 256)] for c in ({}, changes))
    done = (changed[1] - light[1]).abs().mean()
    apart = (halved(changed[0]) - changed[1] - halved(light[0]) + light[1]).abs().mean()
    assert done > 0.002
    assert apart < most * done


@pytest.mark.parametrize("seed", range(8))
def test_teacher_and_student_see_the_same_stronger_view(photo, seed):
    views = Views(strength="strong", strong_share=1, min_scale=0.5)
    parameters = view_parameters(views, seed, ids(4), range(4))
    for row in parameters:
        teacher, student = halved(one(photo, row, plain(256))), one(photo, row, plain(128))
        light = one(photo, [*row[:5], *whole()[5:]], plain(128))
        assert (teacher - student).abs().mean() < 0.02
        assert (student - light).abs().mean() > 2 * (teacher - student).abs().mean()

"""Views: drawn from (seed, image, index) and nothing else, spread as RandomResizedCrop spreads them, and rendered as
Pillow and torchvision would."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_1samp, ks_2samp, uniform
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as colours

from raydistill.config import Views
from raydistill.data.views import NUM_PARAMETERS, WHOLE_IMAGE, Preprocessing, render, view_parameters

pytestmark = pytest.mark.usefixtures("one_thread")

JITTER = Views(brightness=0.4, contrast=0.3, saturation=0.2)
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def ids(count: int, first: int = 0) -> list[str]:
    return [hashlib.blake2b(str(n).encode(), digest_size=16).hexdigest() for n in range(first, first + count)]


def plain(size: int, interpolation: str = "bilinear") -> Preprocessing:
    return Preprocessing(size, (0, 0, 0), (1, 1, 1), interpolation)


def one(image: np.ndarray, parameters: np.ndarray, preprocessing: Preprocessing) -> torch.Tensor:
    """(3, S, S): the view of a single image."""
    return render(torch.from_numpy(image)[None], torch.from_numpy(np.float32(parameters))[None], preprocessing)[0]


def crop(left: float, top: float, width: float, height: float, flip: bool = False) -> np.ndarray:
    return np.array([left, top, width, height, flip, 1, 1, 1], np.float32)


@given(st.permutations(range(12)), st.integers(1, 12), st.integers(0, 2**32 - 1), st.integers(0, 1000))
def test_a_view_depends_on_seed_image_and_index_alone(order, kept, seed, first):
    names, indices = ids(12), np.arange(12) + first
    together = view_parameters(JITTER, seed, names, indices)
    chosen = order[:kept]
    apart = view_parameters(JITTER, seed, [names[i] for i in chosen], indices[chosen])
    assert np.array_equal(apart, together[chosen])
    assert np.array_equal(view_parameters(JITTER, seed, names[:1], indices[:1])[0], together[0])


def test_seeds_images_and_indices_all_change_a_view():
    names = ids(20)
    which = itertools.product((0, 1, 2, 2**32 - 1), (0, 1, 2, 5000))
    rows = np.concatenate([view_parameters(JITTER, seed, names, [index] * 20) for seed, index in which])
    assert len(np.unique(rows, axis=0)) == len(rows)


def split_mix(state: int) -> int:
    """The next number of Vigna's splitmix64.c after this state."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def reference(views: Views, seed: int, name: str, index: int) -> list[float]:
    """One view, number by number, in whole numbers of Python."""
    golden = 0x9E3779B97F4A7C15
    state = split_mix((split_mix((seed << 32 | index) - golden) ^ int(name[:16], 16)) - golden)
    draws = [(split_mix((state + k * golden) % 2**64) >> 11) / 2**53 for k in range(26)]
    width = height = 1.0
    for area, ratio in zip(draws[0:20:2], draws[1:20:2], strict=True):
        area, ratio = views.min_scale + area * (1 - views.min_scale), views.max_ratio ** (2 * ratio - 1)
        if max(area * ratio, area / ratio) <= 1:
            width, height = (area * ratio) ** 0.5, (area / ratio) ** 0.5
            break
    strengths = (views.brightness, views.contrast, views.saturation)
    jitter = [1 + (2 * u - 1) * s for u, s in zip(draws[23:], strengths, strict=True)]
    return [draws[20] * (1 - width), draws[21] * (1 - height), width, height, float(draws[22] < views.flip), *jitter]


def test_splitmix_gives_the_published_numbers():
    """Of the reference implementation with the seed 1234567 (rosettacode.org, Pseudo-random numbers/Splitmix64)."""
    golden, known = 0x9E3779B97F4A7C15, [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [split_mix(1234567 + k * golden) for k in range(3)] == known


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.floats(0.01, 1), st.floats(1, 4))
def test_views_are_those_of_the_published_generator(seed, index, min_scale, max_ratio):
    views = JITTER.model_copy(update={"min_scale": min_scale, "max_ratio": max_ratio})
    names = ids(5)
    expected = [reference(views, seed, name, index) for name in names]
    np.testing.assert_allclose(view_parameters(views, seed, names, [index] * 5), expected, rtol=0, atol=1e-6)


def test_views_of_one_job_stay_those_that_soft_targets_were_stored_for():
    """A change here needs a higher identity.FORMATS["teach"]: stored soft targets would belong to other views."""
    names = ["00112233445566778899aabbccddeeff", "ffeeddccbbaa99887766554433221100"]
    expected = [
        [0.149058, 0.001743, 0.826760, 0.956724, 1, 0.687561, 1.244832, 0.873749],
        [0.074284, 0.309918, 0.732770, 0.583516, 1, 0.675987, 0.798363, 0.972489],
    ]
    np.testing.assert_allclose(view_parameters(JITTER, 7, names, [0, 3]), expected, rtol=0, atol=1e-6)


@given(
    seed=st.integers(0, 2**32 - 1), min_scale=st.floats(0.01, 1), max_ratio=st.floats(1, 4),
    flip=st.sampled_from([0.0, 0.5, 1.0]), strength=st.floats(0, 1),
)  # fmt: skip
def test_every_view_lies_in_the_image_and_in_its_bounds(seed, min_scale, max_ratio, flip, strength):
    views = Views(
        min_scale=min_scale, max_ratio=max_ratio, flip=flip, brightness=strength, contrast=strength, saturation=strength
    )
    rows = view_parameters(views, seed, ids(40), range(40))
    assert rows.shape == (40, NUM_PARAMETERS)
    assert rows.dtype == np.float32
    left, top, width, height = rows[:, :4].astype(np.float64).T
    slack = 1e-6  # of float32
    assert min(left.min(), top.min()) >= 0
    assert max((left + width).max(), (top + height).max()) <= 1 + slack
    assert (width * height >= min_scale - slack).all()
    whole = (width == 1) & (height == 1)
    ratio = width / height
    assert (whole | ((ratio <= max_ratio * (1 + slack)) & (ratio >= (1 - slack) / max_ratio))).all()
    assert np.isin(rows[:, 4], [0, 1] if flip == 0.5 else [flip]).all()
    assert (np.abs(rows[:, 5:] - 1) <= strength + slack).all()


def test_where_no_crop_fits_the_image_stays_whole():
    rows = view_parameters(Views(min_scale=1, max_ratio=1.5), 0, ids(200), [0] * 200)
    np.testing.assert_array_equal(rows[:, :4], np.tile([0, 0, 1, 1], (200, 1)))


def test_crops_are_spread_as_torchvision_spreads_them():
    count = 4000
    rows = view_parameters(Views(), 0, ids(count), [0] * count).astype(np.float64)
    torch.manual_seed(0)
    canvas = torch.zeros(1, 1000, 1000)
    theirs = np.array([RandomResizedCrop.get_params(canvas, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(count)]) / 1000
    top, left, height, width = theirs.T
    ours = (rows[:, 2] * rows[:, 3], rows[:, 2] / rows[:, 3], rows[:, 0], rows[:, 1], rows[:, 2])
    for one, other in zip(ours, (width * height, width / height, left, top, width), strict=True):
        assert ks_2samp(one, other).pvalue > 0.001


def test_place_and_colour_are_uniform_and_independent():
    count = 4000
    rows = view_parameters(JITTER, 3, ids(count), [1] * count).astype(np.float64)
    small = rows[:, 2] < 0.9
    places = [rows[small, 0] / (1 - rows[small, 2]), rows[:, 1][rows[:, 3] < 0.9] / (1 - rows[:, 3][rows[:, 3] < 0.9])]
    factors = [(rows[:, 5 + k] - 1 + s) / (2 * s) for k, s in enumerate((0.4, 0.3, 0.2))]
    for values in (*places, *factors):
        assert ks_1samp(values, uniform.cdf).pvalue > 0.001
    correlations = np.corrcoef(rows[:, [2, 4, 5, 6, 7]].T)
    assert np.abs(correlations[~np.eye(5, dtype=bool)]).max() < 5 / np.sqrt(count)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_of_flips_is_the_one_asked_for(share):
    flips = view_parameters(Views(flip=share), 0, ids(4000), [0] * 4000)[:, 4]
    assert flips.mean() == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / 4000))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_equals_pillows_resize_of_the_box(interpolation, rows, columns, size, seed):
    """Pillow's float channels are neither rounded nor clipped between its two passes, as ours are not."""
    image = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), np.uint8)
    together = view_parameters(Views(flip=0, min_scale=0.01), seed, ids(3), [0] * 3)
    views = render(
        torch.from_numpy(image).expand(3, -1, -1, -1), torch.from_numpy(together), plain(size, interpolation)
    )
    for parameters, found in zip(together, views.numpy(), strict=True):
        left, top, width, height = parameters[:4].astype(np.float64) * np.tile((columns, rows), 2)
        box = (left, top, min(left + width, columns), min(top + height, rows))
        channels = [Image.fromarray(image[..., k].astype(np.float32)) for k in range(3)]
        expected = np.stack([np.asarray(c.resize((size, size), PILLOW[interpolation], box=box)) for c in channels])
        np.testing.assert_allclose(found, (expected / 255).clip(0, 1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("left", "top", "side"), [(0, 0, 128), (16, 32, 64)])
def test_a_crop_of_whole_pixels_at_its_own_size_is_a_cut(photo, interpolation, left, top, side):
    found = one(photo, crop(left / 128, top / 128, side / 128, side / 128), plain(side, interpolation))
    expected = torch.from_numpy(photo[top : top + side, left : left + side]).permute(2, 0, 1) / 255
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_flip_mirrors_the_same_crop(photo, interpolation):
    box = (0.1, 0.3, 0.55, 0.4)
    straight = one(photo, crop(*box), plain(50, interpolation))
    mirrored = one(photo, crop(*box, flip=True), plain(50, interpolation))
    torch.testing.assert_close(mirrored, straight.flip(-1), rtol=0, atol=1e-6)
    assert (mirrored - straight).abs().max() > 0.1


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [224, 160, 96])
def test_teacher_and_student_see_the_region_that_the_view_names(flip, interpolation, size):
    """Pixels that hold their own coordinates show where each output pixel was taken from."""
    rows, columns = np.mgrid[0:128, 0:128]
    image = np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    left, top, width, height = 20.0, 40.5, 70.25, 55.0
    parameters = crop(left / 128, top / 128, width / 128, height / 128, flip)
    found = one(image, parameters, plain(size, interpolation)) * 255
    points = (torch.arange(size) + 0.5) / size
    across = left + (1 - points if flip else points) * width - 0.5
    down = top + points * height - 0.5
    torch.testing.assert_close(found[0], across.expand(size, size), rtol=0, atol=1e-3)
    torch.testing.assert_close(found[1], down[:, None].expand(size, size), rtol=0, atol=1e-3)


def test_a_large_view_shrunk_is_the_small_view(photo):
    for parameters in view_parameters(Views(), 0, ids(8), [0] * 8):
        teacher, student = one(photo, parameters, plain(256)), one(photo, parameters, plain(32))
        shrunk = teacher.unfold(1, 8, 8).unfold(2, 8, 8).mean(dim=(-1, -2))
        assert (shrunk - student).abs().mean() < 0.02
        assert (shrunk.flip(-1) - student).abs().mean() > 0.02


@pytest.mark.parametrize("views", [Views(), JITTER])
def test_an_image_looks_the_same_alone_and_in_a_batch(photo, views):
    images = np.stack([photo, photo[::-1], photo.transpose(1, 0, 2), 255 - photo, np.roll(photo, 30, axis=1)])
    parameters = view_parameters(views, 0, ids(5), range(5))
    parameters[2] = WHOLE_IMAGE  # one without a change of colour among those with
    together = render(torch.from_numpy(images), torch.from_numpy(parameters), plain(48, "bicubic"))
    for image, row, found in zip(images, parameters, together, strict=True):
        torch.testing.assert_close(found, one(image.copy(), row, plain(48, "bicubic")), rtol=0, atol=1e-6)


def test_normalisation_uses_the_networks_own_mean_and_std(photo):
    mean, std = (0.1, 0.5, 0.9), (0.5, 0.25, 2.0)
    bare = one(photo, WHOLE_IMAGE, plain(40))
    found = one(photo, WHOLE_IMAGE, Preprocessing(40, mean, std, "bilinear"))
    for k in range(3):
        torch.testing.assert_close(found[k], (bare[k] - mean[k]) / std[k], rtol=1e-6, atol=1e-6)


def test_the_input_is_left_as_it_was(photo):
    images, parameters = torch.from_numpy(photo)[None], torch.from_numpy(crop(0.2, 0.2, 0.5, 0.5, True))[None]
    before = images.clone(), parameters.clone()
    render(images, parameters, plain(32))
    assert all(map(torch.equal, (images, parameters), before))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_extreme_crops_stay_finite_and_in_range(photo, interpolation):
    for box in ((0, 0, 1e-4, 1e-4), (1 - 1e-4, 1 - 1e-4, 1e-4, 1e-4), (0, 0.5, 1, 1e-4), (0.999, 0, 1e-3, 1)):
        found = one(photo, crop(*box), plain(16, interpolation))
        assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize(
    ("brightness", "contrast", "saturation"),
    [(1.4, 1, 1), (0.3, 1, 1), (1, 1.7, 1), (1, 0.2, 1), (1, 1, 1.9), (1, 1, 0), (1.3, 0.6, 1.5), (0.5, 1.8, 0.1)],
)
def test_colours_change_as_torchvision_changes_them(photo, brightness, contrast, saturation):
    parameters = np.array([0, 0, 1, 1, 0, brightness, contrast, saturation], np.float32)
    picture = torch.from_numpy(photo).permute(2, 0, 1) / 255
    expected = colours.adjust_brightness(picture, brightness)
    expected = colours.adjust_contrast(expected, contrast)
    expected = colours.adjust_saturation(expected, saturation)
    torch.testing.assert_close(one(photo, parameters, plain(128)), expected, rtol=0, atol=2e-6)

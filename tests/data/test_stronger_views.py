"""Stronger views as they are drawn: with the chances asked for, and all other numbers as they were. The presets."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_1samp, ks_2samp, uniform
from torchvision.transforms import RandomErasing

from raydistill.config import Views, load_config, overlay, shown_yaml
from raydistill.config.views import BEYOND_COLOUR, STRENGTHS
from raydistill.data.views import (
    MOST_PARAMETERS,
    NUM_PARAMETERS,
    WHOLE_IMAGE,
    num_parameters,
    stored_views,
    view_parameters,
)
from tests.data.test_views import JITTER, ids, split_mix

pytestmark = pytest.mark.usefixtures("one_thread")

COLUMNS = {"rotate": 8, "hue": 9, "posterize": 10, "solarize": 11, "blur": 12, "erase": slice(13, 17)}
COLOURS = {"brightness": 5, "contrast": 6, "saturation": 7}
STRONG = Views(strength="strong", strong_share=1, posterize=0.3, solarize=0.4)
SIGMA = 2 / 224  # the largest


def whole(**values) -> np.ndarray:
    """The parameters of the whole image with these numbers."""
    parameters = np.concatenate([WHOLE_IMAGE, np.zeros(MOST_PARAMETERS - NUM_PARAMETERS, np.float32)])
    for key, value in values.items():
        parameters[(COLUMNS | COLOURS)[key]] = value
    return parameters


def numbers(seed: int, name: str, index: int, count: int) -> list[float]:
    """Of SplitMix64, in whole numbers of Python."""
    golden = 0x9E3779B97F4A7C15
    state = split_mix((split_mix((seed << 32 | index) - golden) ^ int(name[:16], 16)) - golden)
    return [(split_mix((state + k * golden) % 2**64) >> 11) / 2**53 for k in range(count)]


def reference(views: Views, seed: int, name: str, index: int) -> list[float]:
    """What is done to one view after crop and flip, number by number; brightness, contrast and saturation first."""
    draws, asked = numbers(seed, name, index, 40)[23:], views.changes
    if draws[3] >= asked.strong_share:
        return [1.0] * 3 + [0.0] * 9
    signs = [2 * u - 1 for u in draws]
    factors = [1 + signs[k] * limit for k, limit in enumerate((asked.brightness, asked.contrast, asked.saturation))]
    if draws[4] < asked.grey:
        factors[2] = 0.0
    area, ratio = 0.02 + 0.31 * draws[13], 3.3 ** signs[14]
    width, height = min(1.0, (area * ratio) ** 0.5), min(1.0, (area / ratio) ** 0.5)
    rectangle = [draws[15] * (1 - width), draws[16] * (1 - height), width, height]
    bits, sigma = 4 + int(4 * draws[8]), (0.05 + 0.95 * draws[11]) * SIGMA
    return [
        *factors, signs[5] * asked.rotate, signs[6] * asked.hue, bits * (draws[7] < asked.posterize),
        0.5 * (draws[9] < asked.solarize), sigma * (draws[10] < asked.blur),
        *(side * (draws[12] < asked.erase) for side in rectangle),
    ]  # fmt: skip


@given(
    st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.sampled_from(["medium", "strong"]), st.floats(0, 1),
    st.floats(0, 180),
)  # fmt: skip
def test_stronger_views_are_those_of_the_published_generator(seed, index, strength, share, rotate):
    views = STRONG.model_copy(update={"strength": strength, "strong_share": share, "rotate": rotate})
    expected = [reference(views, seed, name, index) for name in ids(5)]
    found = view_parameters(views, seed, ids(5), [index] * 5)
    np.testing.assert_allclose(found[:, 5:], expected, rtol=0, atol=1e-5)


def test_stronger_views_of_one_job_stay_those_that_soft_targets_were_stored_for():
    """A change here needs a higher identity.FORMATS["teach"]: stored soft targets would belong to other views."""
    views = STRONG.model_copy(update={"posterize": 1.0, "blur": 1.0, "erase": 1.0})
    found = view_parameters(views, 7, ["00112233445566778899aabbccddeeff", "ffeeddccbbaa99887766554433221100"], [0, 3])
    expected = [
        [0.687561, 1.326443, 0.747498, 4.640596, -0.0734836, 4, 0.5, 0.0050691, 0.192256, 0.392088, 0.19661, 0.580263],
        [0.675987, 0.731151, 0.944977, 14.666639, -0.0693906, 6, 0, 0.00398976, 0.190775, 0.749136, 0.333062, 0.237702],
    ]
    np.testing.assert_allclose(found[:, 5:], expected, rtol=0, atol=1e-6)


@given(
    st.integers(0, 2**32 - 1), st.integers(0, 1000), st.sampled_from([Views(), JITTER]),
    st.sampled_from(["light", "medium", "strong"]), st.sets(st.sampled_from(["grey", *BEYOND_COLOUR])), st.floats(0, 1),
)  # fmt: skip
def test_crop_flip_and_colour_stay_what_they_are_without_the_rest(seed, index, before, strength, added, share):
    colours = {key: getattr(before.changes, key) for key in COLOURS}
    more = Views(strength=strength, strong_share=share, **colours | dict.fromkeys(added, 0.4))
    old = view_parameters(before, seed, ids(30), [index] * 30)
    new = view_parameters(more, seed, ids(30), [index] * 30)
    assert new.shape == (30, num_parameters(more))
    np.testing.assert_array_equal(new[:, :5], old[:, :5])
    is_light_B = np.array([numbers(seed, name, index, 27)[26] >= share for name in ids(30)])
    assert (new[is_light_B, 5:8] == 1).all()
    assert (new[is_light_B, 8:] == 0).all()
    np.testing.assert_array_equal(new[~is_light_B, 5:7], old[~is_light_B, 5:7])
    is_grey_B = new[:, 7] == 0
    np.testing.assert_array_equal(new[~is_light_B & ~is_grey_B, 7], old[~is_light_B & ~is_grey_B, 7])
    assert more.changes.grey or not is_grey_B.any()


@pytest.mark.parametrize("key", BEYOND_COLOUR)
def test_each_key_changes_its_own_numbers_alone(key):
    found = view_parameters(Views(**{key: 0.4}), 0, ids(50), [0] * 50)
    neutral = np.tile(whole(), (50, 1))
    neutral[:, :5] = found[:, :5]
    assert (found[:, COLUMNS[key]] != 0).any()
    found[:, COLUMNS[key]] = 0
    np.testing.assert_array_equal(found, neutral)


@pytest.mark.parametrize("views", [Views(), JITTER, Views(grey=0.5, strong_share=0.5)])
def test_what_is_off_takes_no_numbers(views):
    assert view_parameters(views, 0, ids(3), [0] * 3).shape == (3, NUM_PARAMETERS)
    assert stored_views(views, 0, []).shape == (views.per_image, 0, NUM_PARAMETERS)


@given(st.permutations(range(12)), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_a_stronger_view_depends_on_seed_image_and_index_alone(order, kept, seed):
    names, indices, chosen = ids(12), np.arange(12), order[:kept]
    together = view_parameters(STRONG, seed, names, indices)
    assert np.array_equal(view_parameters(STRONG, seed, [names[i] for i in chosen], indices[chosen]), together[chosen])
    assert len(np.unique(together[:, 5:], axis=0)) == 12


@pytest.mark.parametrize("key", ["grey", "posterize", "solarize", "blur", "erase"])
@pytest.mark.parametrize("chance", [0.1, 0.6])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_chances_are_those_asked_for(key, chance, share):
    count = 4000
    found = view_parameters(STRONG.model_copy(update={key: chance, "strong_share": share}), 0, ids(count), [2] * count)
    is_strong, done = found[:, 9] != 0, found[:, 7] == 0 if key == "grey" else found[:, COLUMNS[key]].any(-1)
    if key not in ("grey", "erase"):
        done = found[:, COLUMNS[key]] != 0
    assert is_strong.mean() == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / count) + 1e-9)
    assert not done[~is_strong].any()
    assert done[is_strong].mean() == pytest.approx(chance, abs=5 * np.sqrt(chance * (1 - chance) / is_strong.sum()))


def test_strengths_are_uniform_and_independent():
    views = STRONG.model_copy(update={"rotate": 90, "blur": 1, "posterize": 1, "erase": 1})
    rows = view_parameters(views, 5, ids(4000), [0] * 4000).astype(np.float64)
    rows = rows[(rows[:, 15:] < 1).all(axis=1)]
    assert len(rows) > 3900
    spread = [(rows[:, 8] + 90) / 180, (rows[:, 9] + 0.1) / 0.2, (rows[:, 12] / SIGMA - 0.05) / 0.95]
    spread += [rows[:, 13] / (1 - rows[:, 15]), rows[:, 14] / (1 - rows[:, 16])]
    for values in spread:
        assert ks_1samp(values, uniform.cdf).pvalue > 0.001
    assert set(rows[:, 10]) == {4, 5, 6, 7}
    correlations = np.corrcoef([*spread, *rows[:, [2, 4, 5, 10, 15]].T])
    assert np.abs(correlations[~np.eye(10, dtype=bool)]).max() < 5 / np.sqrt(4000)


def test_erased_rectangles_are_spread_as_torchvision_spreads_them():
    rows = view_parameters(Views(erase=1), 0, ids(4000), [0] * 4000).astype(np.float64)
    torch.manual_seed(0)
    canvas = torch.zeros(3, 1000, 1000)
    theirs = np.array([RandomErasing.get_params(canvas, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(4000)])
    top, left, height, width = theirs.T / 1000
    left_, top_, width_, height_ = rows[:, 13:].T
    pairs = [(width_ * height_, width * height), (np.maximum(width_, height_), np.maximum(width, height))]
    for ours, other in (*pairs, (left_, left), (top_, top)):
        assert ks_2samp(ours, other).pvalue > 0.001


# What a job asks for


def test_a_preset_gives_what_no_key_does():
    job = load_config(["images.path=x", "views.strength=strong", "views.erase=0", "views.rotate=180"])
    expected = dataclasses.replace(STRENGTHS["strong"], erase=0.0, rotate=180.0)
    assert job.views.changes == job.views.resolved.changes == expected
    assert job.views.erase == 0
    assert job.views.blur is None
    lighter = overlay(job, {"views": {"strength": "light"}})  # what was given stays, what the preset gave goes
    assert lighter.views.changes == dataclasses.replace(STRENGTHS["light"], rotate=180.0)


def test_presets_are_ordered_and_light_does_nothing():
    assert set(STRENGTHS) == {"light", "medium", "strong"}
    light, medium, strong = (dataclasses.asdict(STRENGTHS[name]) for name in ("light", "medium", "strong"))
    assert Views().changes == STRENGTHS["light"]
    assert {key for key, value in light.items() if value} == {"strong_share"}
    assert all(medium[key] <= strong[key] for key in medium)
    assert all(medium[key] >= light[key] for key in medium if key != "strong_share")


def test_the_job_that_is_shown_has_the_numbers():
    shown = yaml.safe_load(
        shown_yaml(load_config(["images.path=x", "views.strength=medium", "views.hue=0.2"]).resolved)
    )
    assert shown["views"]["strength"] == "medium"
    assert {key: shown["views"][key] for key in ("hue", "blur", "posterize")} == {
        "hue": 0.2,
        "blur": 0.25,
        "posterize": 0,
    }

"""The resampling of a graph against that of Pillow, which pictures take on their way to training."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raydistill.data.decode import decode
from raydistill.models.picture_classifier import PictureClassifier

SIZE = 24


@pytest.mark.parametrize("fit", ["crop", "pad"])
@given(height=st.integers(1, 700), width=st.integers(1, 700), grain=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_picture_of_any_size_becomes_the_working_image_of_training(
    fit: Literal["crop", "pad"], height: int, width: int, grain: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    # Away from black and white: where a filter overshoots them, it matters which way Pillow takes first.
    noise = rng.integers(90, 165, (-(-height // grain), -(-width // grain), 3), np.uint8)
    picture, sink = Image.fromarray(noise.repeat(grain, 0).repeat(grain, 1)[:height, :width]), io.BytesIO()
    picture.save(sink, "PNG")
    expected = np.asarray(decode(sink.getvalue(), SIZE, fit, 10**6)).astype(int)
    found = PictureClassifier(torch.nn.Identity(), SIZE, fit).working_image(torch.from_numpy(np.array(picture))).numpy()
    difference = np.abs(found - expected)
    assert difference.max() <= 2  # Pillow rounds once more where it first averages whole pixels
    assert difference.mean() <= 0.3

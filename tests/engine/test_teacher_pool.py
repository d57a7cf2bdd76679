"""The teacher's batches: the same features however many threads share them, and whatever fits into memory."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from raydistill.config import Teacher, Views
from raydistill.data.views import view_parameters
from raydistill.engine.teacher_pool import TeacherActor

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (11, 20, 20, 3), np.uint8)
IDS = [f"{n:032x}" for n in range(11)]
PARAMETERS = np.stack([view_parameters(Views(), 0, IDS, [view] * 11) for view in range(3)])


@pytest.fixture
def actor(teacher_weights):
    def make(threads: int = 1, batch_size: int = 64) -> TeacherActor:
        teacher = Teacher(model="timm:test_resnet", weights=str(teacher_weights), size=32, precision="fp32")
        return TeacherActor(teacher.model_copy(update={"batch_size": batch_size}), threads, "")

    return make


def test_threads_and_batches_change_no_feature(actor):
    """(K, R, D): each image's view alone gives the row."""
    alone, expected = actor(), np.empty((3, 11, 96))
    for view, row in np.ndindex(3, 11):
        one = slice(row, row + 1)
        expected[view, row] = alone.features(IMAGES[one], PARAMETERS[view : view + 1, one])[0, 0]
    for threads, batch_size in ((1, 64), (1, 4), (2, 64), (3, 5), (4, 1)):
        found = actor(threads, batch_size).features(IMAGES, PARAMETERS)
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


class Small(torch.nn.Module):
    """A network whose device holds `most` images."""

    def __init__(self, network: torch.nn.Module, most: int) -> None:
        super().__init__()
        self.network, self.most = network, most

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("too many")
        return self.network(images)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 10])
def test_a_batch_that_does_not_fit_is_halved_and_said_once_for_each_size(actor, caplog, most):
    roomy, tight = actor(), actor()
    tight._backbone.network = Small(tight._backbone.network, most)
    with caplog.at_level(logging.WARNING):
        found = tight.features(IMAGES, PARAMETERS)
        said = len(caplog.messages)
        again = tight.features(IMAGES, PARAMETERS)
    np.testing.assert_allclose(
        found.astype(float), roomy.features(IMAGES, PARAMETERS).astype(float), rtol=2e-3, atol=2e-3
    )
    np.testing.assert_array_equal(found.shape, again.shape)
    sizes = [int(message.split(" images")[0].split()[-1]) for message in caplog.messages]
    assert sizes == sorted(set(sizes), reverse=True)
    assert 1 <= said <= len(sizes) <= said + 1  # the shapes of shares may need one more
    assert sizes[-1] <= most


def test_one_image_that_does_not_fit_is_an_error(actor):
    tight = actor()
    tight._backbone.network = Small(tight._backbone.network, 0)
    with pytest.raises(torch.OutOfMemoryError):
        tight.features(IMAGES, PARAMETERS)

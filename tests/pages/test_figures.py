"""The pictures of `evaluate` and `generate`: names of classes are shown as they are."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from raydistill.pages.figures import Answers, confusion_figure, contact_sheet, per_class_figure

NAMES = ("a_$x_$", r"$\foo$", "100 % {x}")


def assert_picture(data: bytes) -> None:
    assert np.asarray(Image.open(io.BytesIO(data)).convert("L")).std() > 0


def test_a_name_with_the_signs_of_a_formula_is_drawn_as_it_is() -> None:
    rng, picture = np.random.default_rng(0), Image.new("RGB", (8, 8))
    labels_N, answers = np.arange(30) % 3, Answers.of(rng.normal(size=(30, 3)))
    for name in NAMES:
        assert_picture(contact_sheet(name, [picture], [(picture, "near duplicate"), (None, "not finite")]))
    assert_picture(confusion_figure(answers.class_N, labels_N, NAMES, "test"))
    assert_picture(per_class_figure({"student": answers, "teacher": answers}, labels_N, NAMES, "test"))

"""`generate.dtype: auto`: measured once on the pipeline's own denoiser, pinned, and never two in one directory."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from raydistill.config import Generate
from raydistill.engine import precision
from raydistill.engine.precision import described
from raydistill.errors import ConfigError
from raydistill.generation import measured_dtype
from raydistill.generation.generator import Generator, Picture, Request
from raydistill.generation.measured_dtype import with_dtype
from raydistill.generation.pipelines import inspect_pipeline

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch) -> None:
    monkeypatch.setattr(precision, "_SECONDS", 0.0)


@pytest.fixture(params=["class", "text", "image"])
def settings(request, class_pipeline, text_pipeline) -> Generate:
    pipeline = class_pipeline if request.param == "class" else text_pipeline(False)
    strength = 0.3 if request.param == "image" else None
    return Generate(pipeline=str(pipeline), steps=9, safety_checker=False, strength=strength)


def request_of(settings: Generate, seed: int) -> Request:
    source = None if settings.strength is None else Image.effect_mandelbrot((16, 16), (-2, -1, 1, 1), 30).convert("RGB")
    return Request(seed, "a cat", 0, None, settings.steps, 2.0, source)


def image(settings: Generate) -> np.ndarray:
    (picture,) = Generator(settings, inspect_pipeline(settings), CPU).pictures([request_of(settings, 3)])
    return np.asarray(picture.image)


def test_what_was_measured_is_kept_for_all_that_come_later(settings, tmp_path, monkeypatch) -> None:
    facts, pin = inspect_pipeline(settings), tmp_path / "precision" / "pin.json"
    chosen = with_dtype(settings, facts, CPU, str(pin))
    decision = json.loads(pin.read_text())
    assert chosen == settings.model_copy(update={"dtype": decision["precision"]})
    assert decision["fp32_seconds"] > 0 < decision["bf16_seconds"]
    assert (decision["fp32_seconds"] >= 1.1 * decision["bf16_seconds"]) == (chosen.dtype == "bf16")
    monkeypatch.setattr(measured_dtype, "Generator", None)  # nothing is loaded or measured again
    images = {dtype: image(settings.model_copy(update={"dtype": dtype})) for dtype in ("fp32", "bf16")}
    assert not np.array_equal(*images.values())
    for dtype, expected in images.items():
        pin.write_text(json.dumps({**decision, "precision": dtype}))
        np.testing.assert_array_equal(image(with_dtype(settings, facts, CPU, str(pin))), expected)
        assert described("auto", str(pin))[0] == dtype


@pytest.mark.parametrize("fault", ["not finite", "no bf16"])
def test_a_pipeline_that_makes_no_image_in_bf16_computes_in_fp32(settings, tmp_path, monkeypatch, fault) -> None:
    """Its denoiser may be fine, and its decoder not."""
    pictures = Generator.pictures

    def faulty(self, requests):
        if self._settings.dtype == "fp32":
            return pictures(self, requests)
        if fault == "no bf16":
            raise ConfigError("the pipeline makes no image (not implemented for BFloat16)")
        return [Picture(None, fault)]

    monkeypatch.setattr(Generator, "pictures", faulty)
    pin = tmp_path / "precision" / "pin.json"
    assert with_dtype(settings, inspect_pipeline(settings), CPU, str(pin)).dtype == "fp32"
    assert described("auto", str(pin)) == ("fp32", "fp32: bf16 gives no finite numbers")


def test_a_denoiser_of_another_name_computes_in_fp32(settings, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Generator, "denoiser", None)
    assert with_dtype(settings, inspect_pipeline(settings), CPU, str(tmp_path / "precision" / "pin")).dtype == "fp32"


def test_what_the_device_lacks_is_refused_before_the_pipeline_is_loaded(settings, monkeypatch) -> None:
    def none(*_: object) -> None:
        raise RuntimeError('"slow_conv2d_cpu" not implemented for Half')

    monkeypatch.setattr(precision, "functional", SimpleNamespace(conv2d=none, linear=none))
    monkeypatch.setattr(measured_dtype, "Generator", None)
    facts = inspect_pipeline(settings)
    for dtype in ("fp16", "bf16"):
        with pytest.raises(
            ConfigError, match=rf"^generate\.dtype={dtype}: CPU.* cannot compute in it .*generate\.dtype=fp32"
        ):
            with_dtype(settings.model_copy(update={"dtype": dtype}), facts, CPU, "")
    in_fp32 = settings.model_copy(update={"dtype": "fp32"})
    assert with_dtype(in_fp32, facts, CPU, "") == in_fp32


def test_too_little_memory_to_compare_is_named(settings, monkeypatch, tmp_path) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measured_dtype, "Generator", full)
    with pytest.raises(ConfigError, match=r"^generate\.dtype=auto: cpu has no memory .* set generate\.dtype=bf16"):
        with_dtype(settings, inspect_pipeline(settings), CPU, str(tmp_path / "precision" / "pin"))

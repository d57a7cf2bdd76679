"""What `generate.dtype: auto` stands for, measured on steps of the pipeline's own denoiser."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image

from raydistill.config import Generate
from raydistill.engine.precision import pipeline_dtype
from raydistill.errors import ConfigError
from raydistill.generation.generator import Generator, Request
from raydistill.generation.pipelines import PipelineFacts


def with_dtype(settings: Generate, facts: PipelineFacts, device: torch.device, pin: str) -> Generate:
    """The settings with the numbers that the pipeline computes in. `pin` is the file of what `auto` stands for. Raises
    ConfigError: the device cannot compute as asked, or has no memory for a measurement."""
    denoisers: dict[str, _Denoiser] = {}

    def step(count: int, dtype: str) -> Iterable[torch.Tensor]:
        if dtype not in denoisers:
            denoisers[dtype] = _Denoiser(settings.model_copy(update={"dtype": dtype}), facts, device)
        return denoisers[dtype].step()

    try:
        dtype = pipeline_dtype(settings.dtype, pin, step, device)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"generate.dtype=auto: {device} has no memory for generate.pipeline={settings.pipeline} in fp32 and in "
            "bf16 at once, to compare them; set generate.dtype=bf16, or a smaller generate.batch_size"
        ) from None
    return settings.model_copy(update={"dtype": dtype})


class _Denoiser:
    """A pipeline's network, with the first inputs that it gets when the pipeline makes a picture. Raises RuntimeError:
    the pipeline makes none in bf16; ConfigError: nor in fp32."""

    def __init__(self, settings: Generate, facts: PipelineFacts, device: torch.device) -> None:
        generator, found = Generator(settings, facts, device), list[Any]()
        self._network = generator.denoiser or torch.nn.Identity()
        steps = min(settings.steps, math.ceil(2 / (settings.strength or 1)))
        request = Request(
            seed=0, prompt="a picture", class_id=0 if facts.kind == "class" else None, steps=steps,
            negative_prompt=settings.negative_prompt, guidance=settings.guidance,
            source=Image.new("RGB", (64, 64), "grey") if facts.kind == "image" else None,
        )  # fmt: skip
        seen = self._network.register_forward_pre_hook(lambda _, *given: found.append(given), with_kwargs=True)
        try:
            (picture,) = generator.pictures([request])
        except ConfigError as error:
            if settings.dtype == "fp32":
                raise
            raise RuntimeError(str(error)) from error
        finally:
            seen.remove()
        if settings.dtype != "fp32" and (picture.reason == "not finite" or not found):
            raise RuntimeError(f"{settings.dtype}: {picture.reason or 'the denoiser is not known'}")
        self._args, self._options = found[0] if found else ((torch.zeros(1, 1),), {})

    @torch.inference_mode()
    def step(self) -> list[torch.Tensor]:
        return [self._network(*self._args, **self._options)[0]]

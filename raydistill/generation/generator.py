"""One picture for each request, from a diffusion pipeline of diffusers.

The request alone decides its image. Every request has its own random generator, on the CPU. On CPUs requests run one by
one in one thread, because batches and threads change the rounding of sums.

Shapes: B requests, S pixels, C channels.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from raydistill.config import Generate
from raydistill.errors import ConfigError, reason_of
from raydistill.generation.pipelines import PipelineFacts
from raydistill.models.autocast import DTYPES
from raydistill.models.state_dicts import keep_default_dtype, no_larger_than, sizes_in

_MOST_KEPT = 32  # results of `encode_prompt`, of up to some MB each


@dataclass(frozen=True)
class Request:
    """One picture to make. `prompt` is for pipelines that read text, `class_id` for class-conditional ones, `source`
    for image-to-image."""

    seed: int
    prompt: str
    class_id: int | None
    negative_prompt: str | None
    steps: int
    guidance: float
    source: Image.Image | None = None


@dataclass(frozen=True)
class Picture:
    """A request's RGB image, or None and the reason."""

    image: Image.Image | None
    reason: str = ""


class Generator:
    """A loaded pipeline, with a `dtype` other than auto. It reads weights from safetensors only."""

    def __init__(self, settings: Generate, facts: PipelineFacts, device: torch.device) -> None:
        import diffusers

        diffusers.utils.logging.disable_progress_bar()
        self._settings, self._facts, self._device = settings, facts, device
        options: dict[str, Any] = {"dtype": DTYPES[settings.dtype], "use_safetensors": True, "revision": facts.commit}
        options["low_cpu_mem_usage"] = False  # otherwise diffusers needs accelerate
        if facts.kind in ("text", "image") and not settings.safety_checker:
            options |= {"safety_checker": None, "requires_safety_checker": False}
        loader = {
            "text": diffusers.AutoPipelineForText2Image,
            "image": diffusers.AutoPipelineForImage2Image,
        }.get(facts.kind, diffusers.DiffusionPipeline)
        folder = Path(settings.pipeline)
        built: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        try:
            if folder.is_dir():  # twice the sizes, because transformers registers each weight again when it has read it
                built = no_larger_than(2 * sizes_in(folder.rglob("*.safetensors")), "its parts")
            with keep_default_dtype(), built:
                self._pipeline = loader.from_pretrained(settings.pipeline, **options)
        except Exception as error:  # diffusers, transformers and the hub raise different errors
            raise ConfigError(f"generate.pipeline={settings.pipeline}: cannot be loaded ({reason_of(error)})") from None
        if facts.kind in ("class", "none") and hasattr(self._pipeline, "unet"):
            if (channels := self._pipeline.unet.config.in_channels) not in (1, 3):
                raise ConfigError(
                    f"generate.pipeline={settings.pipeline} makes images of {channels} channels; 1 (grey) and 3 (RGB) "
                    "are read"
                )
        if settings.scheduler is not None:
            self._pipeline.scheduler = new_scheduler(settings.scheduler, self._pipeline.scheduler)
        if hasattr(self._pipeline.scheduler, "noise_sampler"):
            raise ConfigError(
                f"generate.pipeline={settings.pipeline}: {type(self._pipeline.scheduler).__name__} takes no random "
                "seed, so its images are not reproducible; set another generate.scheduler"
            )
        if not hasattr(self._pipeline.scheduler, "step"):
            raise ConfigError(
                f"generate.pipeline={settings.pipeline}: {type(self._pipeline.scheduler).__name__} has no usable step "
                "method; set another generate.scheduler"
            )
        self._pipeline.to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        if hasattr(self._pipeline, "encode_prompt"):
            self._pipeline.encode_prompt = _kept(self._pipeline.encode_prompt)

    @property
    def denoiser(self) -> torch.nn.Module | None:
        """The network that runs in each step; None if it has an unusual name."""
        found: torch.nn.Module | None = getattr(self._pipeline, "unet", None) or getattr(
            self._pipeline, "transformer", None
        )
        return found

    def pictures(self, requests: Sequence[Request]) -> list[Picture]:
        """One picture for each request, in order. All requests have equal steps, guidance and negative prompt."""
        each = self._settings.batch_size if self._device.type == "cuda" else 1
        found: list[Picture] = []
        for first in range(0, len(requests), each):
            part = list(requests[first : first + each])
            # Always a full batch: another shape may select another algorithm, with other rounding.
            filled = part + [part[-1]] * (each - len(part))
            try:
                found += self._batch(filled)[: len(part)]
            except (torch.OutOfMemoryError, OSError):  # of the machine
                raise
            except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError,
                    RuntimeError) as error:  # fmt: skip
                raise ConfigError(
                    f"generate.pipeline={self._settings.pipeline}: makes no image ({reason_of(error)}); its parts may "
                    "not fit together: save or fetch the pipeline again, or name another"
                ) from error
        return found

    @torch.inference_mode()
    def _batch(self, requests: list[Request]) -> list[Picture]:
        generators = [torch.Generator("cpu").manual_seed(r.seed) for r in requests]
        first, flagged = requests[0], [False] * len(requests)
        common: dict[str, Any] = {"generator": generators, "num_inference_steps": first.steps, "output_type": "np"}
        if self._facts.kind in ("text", "image"):
            with _noise_from(generators, self._pipeline.scheduler):
                output = self._pipeline(**common, **self._text_inputs(requests))
            images_BSSC = np.asarray(output.images)
            flagged = _flagged(output) or flagged
        elif type(self._pipeline).__name__ == "DiTPipeline":
            ids = [request.class_id for request in requests]
            with _noise_from(generators, self._pipeline.scheduler):
                output = self._pipeline(class_labels=ids, guidance_scale=max(first.guidance, 1.0), **common)
            images_BSSC = np.asarray(output.images)
        else:
            images_BSSC = self._denoise(requests, generators)
        return [_picture(image, bool(bad)) for image, bad in zip(images_BSSC, flagged, strict=True)]

    def _text_inputs(self, requests: list[Request]) -> dict[str, Any]:
        first, size = requests[0], self._settings.size
        inputs: dict[str, Any] = {"prompt": [r.prompt for r in requests], "guidance_scale": first.guidance}
        accepted = inspect.signature(self._pipeline.__call__).parameters
        if first.negative_prompt and "negative_prompt" in accepted:
            inputs["negative_prompt"] = [first.negative_prompt] * len(requests)
        if self._facts.kind == "image":
            sources = [request.source for request in requests]
            assert all(source is not None for source in sources), "image-to-image starts from an image"
            side = self._facts.side  # of the pipeline's images, not of the working images
            inputs["image"] = [source.resize((side, side)) for source in sources]  # type: ignore[union-attr]
            inputs["strength"] = self._settings.strength
        elif size is not None:
            inputs |= {"height": size, "width": size}
        return inputs

    def _denoise(self, requests: list[Request], generators: list[torch.Generator]) -> np.ndarray:
        """The sampling loop of a plain UNet with class and guidance (Ho & Salimans 2022, arXiv 2207.12598, eq. 6): the
        DDIM and DDPM pipelines of diffusers do not pass these on."""
        from diffusers.utils.torch_utils import randn_tensor

        unet, scheduler, first = self._pipeline.unet, self._pipeline.scheduler, requests[0]
        scheduler.set_timesteps(first.steps)
        side = unet.config.sample_size
        shape = (len(requests), unet.config.in_channels, side, side)
        x_BCSS = randn_tensor(shape, generator=generators, device=self._device, dtype=unet.dtype)
        x_BCSS = x_BCSS * scheduler.init_noise_sigma
        labels = None
        if self._facts.kind == "class":
            labels = torch.tensor([request.class_id for request in requests], device=self._device)
        guided = labels is not None and self._facts.null_class is not None and first.guidance > 1
        noisy = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(x_BCSS, t)
            predicted = unet(inputs, t, class_labels=labels).sample
            if guided:
                without = unet(inputs, t, class_labels=torch.full_like(labels, self._facts.null_class)).sample
                predicted = without + first.guidance * (predicted - without)
            x_BCSS = scheduler.step(predicted, t, x_BCSS, **noisy).prev_sample
        images_BCSS = (x_BCSS.float() / 2 + 0.5).clamp(0, 1)
        return images_BCSS.permute(0, 2, 3, 1).cpu().numpy()


def _kept(encode: Any) -> Any:
    """`encode_prompt`, whose last results are kept: a class has few prompts, and equal calls have equal results."""
    results: OrderedDict[str, Any] = OrderedDict()

    @functools.wraps(encode)
    def kept(*args: Any, **options: Any) -> Any:
        if not all(map(_is_plain, [*args, *options.values()])):
            return encode(*args, **options)
        key = repr((args, sorted(options.items()), getattr(encode.__self__, "_guidance_scale", None)))
        results[key] = results.pop(key) if key in results else encode(*args, **options)
        if len(results) > _MOST_KEPT:
            results.popitem(last=False)
        return copy.deepcopy(results[key])  # pipelines may change what they get

    return kept


def _is_plain(value: Any) -> bool:
    """Whether equal words for two values mean that they are equal."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, torch.device, torch.dtype))


def new_scheduler(name: str, old: Any) -> Any:
    """The named scheduler with the old one's noise schedule. Raises ConfigError."""
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None or not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ConfigError(f"generate.scheduler={name}: diffusers has no such scheduler; name another")
    if not hasattr(kind, "step"):
        raise ConfigError(f"generate.scheduler={name}: it has no usable step method; name another")
    return kind.from_config(old.config)


@contextlib.contextmanager
def _noise_from(generators: Sequence[torch.Generator], scheduler: Any) -> Iterator[None]:
    """Make a scheduler draw its noise from the requests' generators, even if its pipeline, such as DiTPipeline or SD 3,
    does not pass them on. With guidance DiTPipeline doubles the batch."""
    step = scheduler.step
    if "generator" not in inspect.signature(step).parameters:
        yield
        return

    @functools.wraps(step)  # pipelines inspect its signature
    def seeded(model_output: Any, timestep: Any, sample: Any, *rest: Any, **options: Any) -> Any:
        options.setdefault("generator", list(generators) * (len(sample) // len(generators)))
        return step(model_output, timestep, sample, *rest, **options)

    scheduler.step = seeded
    try:
        yield
    finally:
        del scheduler.step


def _flagged(output: Any) -> list[bool]:
    """The safety checker's result for each picture, [] without one; DeepFloyd IF has its own name for it."""
    found = getattr(output, "nsfw_content_detected", None) or getattr(output, "nsfw_detected", None) or []
    return [bool(flag) for flag in found]


def _picture(image_SSC: np.ndarray, flagged: bool) -> Picture:
    """No picture if it was flagged (the pipeline then gives black), or is not finite."""
    if flagged:
        return Picture(None, "safety checker")
    if not np.isfinite(image_SSC).all():
        return Picture(None, "not finite")
    pixels = np.rint(np.clip(image_SSC, 0, 1) * 255).astype(np.uint8)
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return Picture(Image.fromarray(pixels).convert("RGB"))

"""Diffusion pipelines of diffusers: what kind one is, whether it will do, and one picture for each request.

An image is a function of its request and of nothing else: every request has a generator of its own, on the CPU, and
on CPUs requests are computed one by one in one thread, since sums come out differently in batches and in threads.

Shapes: B requests, S pixels, C channels.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from raydistill.config import Generate
from raydistill.errors import ConfigError

Kind = Literal["text", "image", "class", "none"]
# In the folder of a class-conditional pipeline, which class each number stands for: {"classes": [...], "null": N}, N
# being the number of no class, for classifier-free guidance.
CLASSES_FILE = "classes.json"


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
    """What came of a request: RGB, or None and the reason."""

    image: Image.Image | None
    reason: str = ""


@dataclass(frozen=True)
class PipelineFacts:
    """What is known of a pipeline without loading its weights. `classes` are the class names it brings, by number;
    `side` is that of its images in pixels, 512 where its parts do not say."""

    pipeline: str
    kind: Kind
    commit: str | None
    licence: str
    classes: dict[str, int]
    null_class: int | None
    side: int


def inspect_pipeline(settings: Generate) -> PipelineFacts:
    """Raises ConfigError: no such pipeline, missing parts, or a safety checker that is asked for and not there."""
    what = f"generate.pipeline={settings.pipeline}"
    index, folder, commit, licence = _read_index(settings)
    classes, null = _known_classes(folder)
    name = str(index["_class_name"])
    if name == "DiTPipeline":
        labels = {words: int(k) for k, words in (index.get("id2label") or {}).items()}
        classes |= {word.strip(): k for words, k in labels.items() for word in words.split(",")}
        kind: Kind = "class"
    elif name in ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ScoreSdeVePipeline"):
        kind = "class" if classes or settings.class_ids else "none"
    else:
        kind = "image" if settings.strength is not None else "text"
    if settings.strength is not None and kind != "image":
        raise ConfigError(f"generate.strength is for text-to-image pipelines; {what} is a {name}")
    if kind in ("text", "image") and settings.safety_checker and not (index.get("safety_checker") or [None])[0]:
        raise ConfigError(
            f"{what} has no safety checker and generate.safety_checker asks for one; name a pipeline that has one, or "
            "set generate.safety_checker=false"
        )
    return PipelineFacts(settings.pipeline, kind, commit, licence, classes, null, settings.size or _side(folder))


def class_numbers(settings: Generate, facts: PipelineFacts, classes: Sequence[str]) -> dict[str, int | None]:
    """The pipeline's number of each class of the data; None where it takes none. Raises ConfigError."""
    if facts.kind != "class":
        return dict.fromkeys(classes)
    known = {**facts.classes, **(settings.class_ids or {})}
    if lacking := [name for name in classes if name not in known]:
        some = ", ".join(map(repr, list(known)[:5])) + (" …" if len(known) > 5 else "")
        raise ConfigError(
            f"generate.pipeline={settings.pipeline} does not know the classes {', '.join(map(repr, lacking[:5]))}; it "
            f"knows {some or 'none by name'}; say which number each has in generate.class_ids"
        )
    return {name: known[name] for name in classes}


def _read_index(settings: Generate) -> tuple[dict[str, Any], Path, str | None, str]:
    name, what = settings.pipeline, f"generate.pipeline={settings.pipeline}"
    folder = Path(name)
    commit, licence = None, ""
    if not folder.is_dir():
        folder, commit, licence = _fetch_index(settings)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ConfigError(f"{what}: the folder has no model_index.json, so it is no pipeline of diffusers")
    try:
        index = json.loads(index_file.read_text())
        parts = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[0]}
        index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{what}: its model_index.json cannot be read ({error})") from None
    if Path(name).is_dir():
        if lacking := sorted(part for part in parts if not (folder / part).is_dir()):
            raise ConfigError(f"{what}: the folder lacks {', '.join(lacking)}; save or fetch the pipeline again")
        licence = _licence_of(folder)
    return index, folder, commit, licence


def _known_classes(folder: Path) -> tuple[dict[str, int], int | None]:
    if not (folder / CLASSES_FILE).is_file():
        return {}, None
    try:
        told = json.loads((folder / CLASSES_FILE).read_text(encoding="utf-8"))
        return {str(name): k for k, name in enumerate(told["classes"])}, told.get("null")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{folder / CLASSES_FILE} cannot be read ({error}); it holds {{"classes": [names], "null": number}}'
        ) from None


def _side(folder: Path) -> int:
    """The network's own side times what the autoencoder enlarges it by."""
    for part in ("unet", "transformer"):
        if (settings := folder / part / "config.json").is_file():
            side, vae = json.loads(settings.read_text()).get("sample_size"), folder / "vae" / "config.json"
            halvings = len(json.loads(vae.read_text())["block_out_channels"]) - 1 if vae.is_file() else 0
            return int(side) << halvings if isinstance(side, int) else 512
    return 512


def _fetch_index(settings: Generate) -> tuple[Path, str | None, str]:
    from huggingface_hub import model_info, snapshot_download

    try:
        found = model_info(settings.pipeline, revision=settings.revision)
        folder = snapshot_download(
            settings.pipeline, revision=found.sha, allow_patterns=["model_index.json", "*/config.json", CLASSES_FILE]
        )
    except Exception as error:  # network, name and permission errors come from three libraries
        raise ConfigError(
            f"generate.pipeline={settings.pipeline}: no such folder, and it could not be fetched from the hub "
            f"({' '.join(str(error).split())[:200] or type(error).__name__}); check the name, or give a local folder"
        ) from None
    licence = str(getattr(found.card_data, "license", None) or "not stated")
    return Path(folder), found.sha, licence


def _licence_of(folder: Path) -> str:
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    return next((x.partition(":")[2].strip() for x in lines if x.lower().startswith("license:")), "") or "not stated"


class Generator:
    """A loaded pipeline. Weights come from safetensors alone."""

    def __init__(self, settings: Generate, facts: PipelineFacts, device: torch.device) -> None:
        import diffusers

        diffusers.utils.logging.disable_progress_bar()
        self._settings, self._facts, self._device = settings, facts, device
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[settings.dtype]
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "revision": facts.commit}
        options["low_cpu_mem_usage"] = False  # or diffusers asks for accelerate, of which nothing here has a use
        if facts.kind in ("text", "image") and not settings.safety_checker:
            options |= {"safety_checker": None, "requires_safety_checker": False}
        loader = {
            "text": diffusers.AutoPipelineForText2Image,
            "image": diffusers.AutoPipelineForImage2Image,
        }.get(facts.kind, diffusers.DiffusionPipeline)
        try:
            self._pipeline = loader.from_pretrained(settings.pipeline, **options)
        except Exception as error:  # diffusers, transformers and the hub raise each their own kind
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"generate.pipeline={settings.pipeline}: cannot be loaded ({reason})") from None
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
                f"generate.pipeline={settings.pipeline}: {type(self._pipeline.scheduler).__name__} draws noise from no "
                "seed of ours, so no image could be made again; name another in generate.scheduler"
            )
        self._pipeline.to(device)
        self._pipeline.set_progress_bar_config(disable=True)

    def pictures(self, requests: Sequence[Request]) -> list[Picture]:
        """One picture a request, in order. All requests have equal steps, guidance and negative prompt."""
        each = self._settings.batch_size if self._device.type == "cuda" else 1
        found: list[Picture] = []
        for first in range(0, len(requests), each):
            part = list(requests[first : first + each])
            # A full batch always: another shape may mean another algorithm, and so other last bits.
            filled = part + [part[-1]] * (each - len(part))
            found += self._batch(filled)[: len(part)]
        return found

    @torch.inference_mode()
    def _batch(self, requests: list[Request]) -> list[Picture]:
        generators = [torch.Generator("cpu").manual_seed(r.seed) for r in requests]
        first, flagged = requests[0], [False] * len(requests)
        common: dict[str, Any] = {"generator": generators, "num_inference_steps": first.steps, "output_type": "np"}
        if self._facts.kind in ("text", "image"):
            output = self._pipeline(**common, **self._text_inputs(requests))
            images_BSSC = np.asarray(output.images)
            flagged = list(getattr(output, "nsfw_content_detected", None) or flagged)
        elif type(self._pipeline).__name__ == "DiTPipeline":
            ids = [request.class_id for request in requests]
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
            side = size or sources[0].width  # type: ignore[union-attr]
            inputs["image"] = [source.resize((side, side)) for source in sources]  # type: ignore[union-attr]
            inputs["strength"] = self._settings.strength
        elif size is not None:
            inputs |= {"height": size, "width": size}
        return inputs

    def _denoise(self, requests: list[Request], generators: list[torch.Generator]) -> np.ndarray:
        """The sampling loop of a plain UNet, with its class and guidance, which diffusers' own DDIM and DDPM pipelines
        do not pass on (Ho & Salimans 2022, arXiv 2207.12598, eq. 6)."""
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


def new_scheduler(name: str, old: Any) -> Any:
    """The named scheduler with the old one's noise schedule. Raises ConfigError."""
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None or not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ConfigError(f"generate.scheduler={name}: diffusers has no scheduler of this name")
    return kind.from_config(old.config)


def _picture(image_SSC: np.ndarray, flagged: bool) -> Picture:
    """A flagged picture comes back black and one that is not finite as anything: neither is written."""
    if flagged:
        return Picture(None, "safety checker")
    if not np.isfinite(image_SSC).all():
        return Picture(None, "not finite")
    pixels = np.rint(np.clip(image_SSC, 0, 1) * 255).astype(np.uint8)
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return Picture(Image.fromarray(pixels).convert("RGB"))

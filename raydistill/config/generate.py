"""generate: images that a diffusion pipeline adds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from raydistill.config.section import Count, Positive, Precision, Section, Share, Weight


class ClassPrompt(Section):
    """The settings of `generate` that differ for one class; null: as for the others."""

    templates: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    negative_prompt: str | None = None
    steps: Count | None = None
    guidance: Weight | None = None


class Filter(Section):
    """Which generated images are kept. The ledger lists each rejection with its reason."""

    contrast: Weight = 3.0
    """Smallest standard deviation of an image's brightness, of 255. Below it the image is nearly constant."""
    duplicate_distance: Annotated[int, Field(ge=0, le=256)] | None = 4
    """Two images of one class, or one image and one of val or test, are duplicates when at most this many of the 256
    bits of their difference hashes differ; null: only equal files are."""
    confidence: Share | None = None
    """Smallest probability that the adapted teacher must give the class; null: any."""
    class_confidence: dict[str, Share] = Field(default_factory=dict)
    """The same for single classes, by name."""
    agreement: bool = False
    """Keep only images whose class the adapted teacher names first."""
    weigh: bool = False
    """Weigh the hard label of a kept image by the teacher's probability of its class."""

    @property
    def needs_teacher(self) -> bool:
        return self.confidence is not None or bool(self.class_confidence) or self.agreement or self.weigh


class Generate(Section):
    pipeline: Annotated[str, Field(min_length=1)]
    """A diffusion pipeline of diffusers: a name on the hub or a local folder. Text-to-image, image-to-image (with
    `strength`), class-conditional or unconditional."""
    revision: str | None = None
    """Revision of a hub pipeline; a commit hash is best."""
    ratio: Weight = 1.0
    """Generated images of a class for each of its labelled train images."""
    per_class: Count | None = None
    """Generated images of each class, instead of `ratio`."""
    balance: bool = False
    """Fill every class up to the largest, instead of `ratio`."""
    templates: Annotated[tuple[str, ...] | dict[str, Positive], Field(min_length=1)] = ("a picture of a {class}",)
    """Prompts with `{class}` (and `{description}`), drawn equally often or by the weights given."""
    names: str | None = None
    """A YAML or JSON file from class names to words, or to {words, synonyms, description}."""
    overrides: dict[str, ClassPrompt] = Field(default_factory=dict)
    """Settings of single classes, by name."""
    negative_prompt: str | None = None
    """What images should not show."""
    class_ids: dict[str, Annotated[int, Field(ge=0)]] | None = None
    """The number of each class in a class-conditional pipeline; null: by the names it brings."""
    scheduler: str | None = None
    """Class name of a scheduler of diffusers; null: the pipeline's own."""
    steps: Count = 50
    """Steps of denoising for one image."""
    guidance: Weight = 7.5
    """Classifier-free guidance; 1 or less: none."""
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    """Start from train images of the class, with this much noise (image-to-image)."""
    size: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Side in pixels of what the pipeline makes; null: its own."""
    dtype: Precision = "auto"
    """The numbers that the pipeline computes in: fp32, bf16 or fp16. `auto`: bf16 where a short measurement of the
    pipeline's own denoiser shows that it is at least 1.1 times as fast as fp32 and the numbers are finite, else fp32;
    the workspace keeps the result."""
    batch_size: Count = 8
    """Images in one call on a GPU, and in one file. On CPUs each image is made alone, so this changes no image."""
    safety_checker: bool = True
    """Reject what the pipeline's safety checker flags. A text-to-image pipeline without one is refused."""
    attempts: Count = 3
    """Tries for an image, each with another recorded seed, before it counts as missing."""
    filter: Filter = Filter()
    task_weight: Share = 1.0
    """Weight of generated images in the cross-entropy; 0: the student learns only from their soft targets."""
    share: Share | None = None
    """Share of generated images in each batch; null: their share of all train images."""

    @model_validator(mode="after")
    def _one_count(self) -> Generate:
        if self.per_class is not None and self.balance:
            raise ValueError("generate.per_class and generate.balance both say how many; set one of them")
        return self

    def prompt_settings(self, name: str) -> ClassPrompt:
        """The settings of a class: its own where they are given."""
        own = self.overrides.get(name, ClassPrompt())
        return ClassPrompt(
            templates=own.templates,
            negative_prompt=self.negative_prompt if own.negative_prompt is None else own.negative_prompt,
            steps=own.steps or self.steps,
            guidance=self.guidance if own.guidance is None else own.guidance,
        )

"""teacher, student: which networks, with which weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raydistill.config.section import Count, Positive, Precision, Section


class Teacher(Section):
    model: str = "timm:vit_base_patch16_224"
    """`timm:NAME`, `hf:NAME`, or a local folder that timm, transformers or raydistill's `distill` saved;
    `targets:FOLDER`: no network, but the answers that `teach JOB --out FOLDER` or another program stored."""
    weights: str | None = None
    """A .safetensors or .pth state dict, or `example:NAME`; null: what the model's name stands for."""
    revision: str | None = None
    """Revision of a hub model; a commit hash is best."""
    head: Literal["linear_probe", "native", "fine_tune", "zero_shot"] = "linear_probe"
    """`linear_probe`: fitted here on the labelled train images; `native`: the model's own, matched by class name;
    `fine_tune`: the whole model is trained on them first; `zero_shot`: from the class names, by a CLIP-like model."""
    fine_tune_epochs: Count = 10
    """Passes over as many images as the train split holds, for `fine_tune`."""
    fine_tune_learning_rate: Positive = 1e-3
    """Of the new head in `fine_tune`; the body's is a tenth of it."""
    fine_tune_batch_size: Count = 64
    """Images in one step of `fine_tune`, over all workers together."""
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = ("a photo of a {class}.",)
    """Sentences for `zero_shot`, averaged; `{class}` stands for the class name."""
    class_balanced: bool = False
    """Weigh classes equally when the linear probe is fitted."""
    size: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Side in pixels that the teacher sees; null: the size it was trained at."""
    center_crop: bool = False
    """Cut off the margin of whole images that the model's own configuration cuts off (timm's `crop_pct`, a centre crop
    of transformers; none in a folder of raydistill). A view keeps its margin unless it is the whole image."""
    batch_size: Count = 64
    """Views in one forward pass of a teacher actor."""
    precision: Precision = "auto"
    """Of the teacher's forward pass; its features are stored as float16 in any case. `auto`: bf16 where a short
    measurement of this teacher shows that it is at least 1.1 times as fast as fp32, else fp32; the workspace keeps the
    result. fp32 means TF32 on GPUs. A batch that overflows in fp16 is computed again in fp32."""
    allow_near_chance: bool = False
    """Go on although the teacher's val accuracy is hardly better than guessing."""

    @property
    def stored(self) -> str | None:
        """The folder of answers that take the place of a network; None for a network."""
        return self.model.removeprefix("targets:") if self.model.startswith("targets:") else None


class Student(Section):
    model: str = "timm:mobilenetv3_small_100"
    """`timm:NAME` or `hf:NAME` (an image classifier of transformers; a folder serves as a name)."""
    init: Literal["random", "pretrained"] = "random"
    """`pretrained` starts from `weights`, or from what the hub has under the model's name."""
    weights: str | None = None
    """A state dict or `example:NAME` for `init: pretrained`."""
    revision: str | None = None
    """Revision of a hub model; a commit hash is best."""
    size: Annotated[int, Field(ge=8, le=2048)] | None = 64
    """Side in pixels that the student sees, in training and later; null: the size its model was made for."""

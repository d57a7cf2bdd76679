"""teacher, student: which networks, with which weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raydistill.config.section import Count, Positive, Precision, Section

Side = Annotated[int, Field(ge=8, le=2048)]
_OF_EACH = ("model", "weights", "revision", "size")  # keys that may list a value for each member of a committee


class Teacher(Section):
    model: str | Annotated[tuple[str, ...], Field(min_length=1)] = "timm:vit_base_patch16_224"
    """`timm:NAME`, `hf:NAME`, or a local folder that timm, transformers or raydistill's `distill` saved;
    `targets:FOLDER`: no network, but the answers that `teach JOB --out FOLDER` or another program stored. A list is a
    committee: one linear head reads the features of all side by side."""
    weights: str | tuple[str | None, ...] | None = None
    """A .safetensors or .pth state dict, or `example:NAME`; null: what the model's name stands for. A list has a value
    for each model."""
    revision: str | tuple[str | None, ...] | None = None
    """Revision of a hub model, or of each model; a commit hash is best."""
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
    size: Side | tuple[Side | None, ...] | None = None
    """Side in pixels that the teacher sees, or that each model of a list sees; null: the size it was trained at."""
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

    @model_validator(mode="before")
    @classmethod
    def _one_is_no_committee(cls, given: Any) -> Any:
        """A list with one value is that value, so that both name the same teacher."""
        if not isinstance(given, dict):
            return given
        alone = {k: v[0] for k in _OF_EACH if isinstance(v := given.get(k), list | tuple) and len(v) == 1}
        return {**given, **(alone if len(_each(given.get("model"))) == 1 else {})}

    @model_validator(mode="after")
    def _committee(self) -> Teacher:
        models = _each(self.model)
        for key in _OF_EACH[1:]:
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != len(models):
                raise ValueError(
                    f"teacher.{key} lists {len(value)} values, and teacher.model names {len(models)}; give one value "
                    "for each model, or one for all"
                )
        if len(models) == 1:
            return self
        if self.head != "linear_probe":
            raise ValueError(
                f"teacher.head={self.head} is of one model, and teacher.model names {len(models)}; set "
                "teacher.head=linear_probe, or name one model"
            )
        if stored := [name for name in models if name.startswith("targets:")]:
            raise ValueError(
                f"teacher.model: {stored[0]} is a folder of stored answers, which is no member of a committee; leave it"
                " out, or name it alone"
            )
        members = [member.model_dump(include={*_OF_EACH}) for member in self.members]
        if again := [member["model"] for k, member in enumerate(members) if member in members[:k]]:
            raise ValueError(f"teacher.model names {again[0]} twice, which adds nothing; leave one out")
        return self

    @property
    def members(self) -> tuple[SingleTeacher, ...]:
        """Each model of a committee, or the only one."""
        count, fields = len(_each(self.model)), {key: getattr(self, key) for key in Teacher.model_fields}
        values = zip(*(_each(fields[key], count) for key in _OF_EACH), strict=True)
        return tuple(SingleTeacher(**fields | dict(zip(_OF_EACH, one, strict=True))) for one in values)

    @property
    def only(self) -> SingleTeacher:
        """The teacher, which is no committee."""
        (member,) = self.members
        return member

    @property
    def name(self) -> str:
        """The model, or those of a committee, for messages."""
        return " + ".join(_each(self.model))

    @property
    def stored(self) -> str | None:
        """The folder of answers that take the place of a network; None for a network."""
        return self.name.removeprefix("targets:") if self.name.startswith("targets:") else None


class SingleTeacher(Teacher):
    """One model."""

    model: str = ""
    weights: str | None = None
    revision: str | None = None
    size: Side | None = None


def _each(value: Any, count: int = 1) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * count


class Student(Section):
    model: str = "timm:mobilenetv3_small_100"
    """`timm:NAME` or `hf:NAME` (an image classifier of transformers; a folder serves as a name)."""
    init: Literal["random", "pretrained"] = "random"
    """`pretrained` starts from `weights`, or from what the hub has under the model's name."""
    weights: str | None = None
    """A state dict or `example:NAME` for `init: pretrained`."""
    revision: str | None = None
    """Revision of a hub model; a commit hash is best."""
    size: Side | None = 64
    """Side in pixels that the student sees, in training and later; null: the size its model was made for."""

"""The kind and the classes of a diffusers pipeline, and whether `generate` can use it, without loading its weights."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raydistill.config import Generate
from raydistill.errors import ConfigError
from raydistill.generation.pipeline_files import (
    CLASSES_FILE,
    PLAIN,
    known_classes,
    read_index,
    read_part,
    working_side,
)
from raydistill.models.weight_shards import check_tokenizer

Kind = Literal["text", "image", "class", "none"]
_MOST_SIDE, _MOST_TRAIN_STEPS = 8192, 1 << 16  # pixels, and steps for each of which schedulers hold several numbers
_DIT_NO_CLASS = 1000  # DiTPipeline's constant, whatever its network


@dataclass(frozen=True)
class PipelineFacts:
    """Facts about a pipeline from its config files. `classes` maps its class names to numbers; `ambiguous` are names of
    several numbers; `num_classes` is the limit of the numbers, if known; `null_class` is the number of "no class".
    `side` is the side of its images in pixels, 512 if unknown; `train_steps` are its scheduler's training steps, if
    known."""

    pipeline: str
    kind: Kind
    commit: str | None
    licence: str
    classes: dict[str, int]
    ambiguous: dict[str, list[int]]
    num_classes: int | None
    null_class: int | None
    side: int
    train_steps: int | None


def inspect_pipeline(settings: Generate) -> PipelineFacts:
    """Raises ConfigError: there is no such pipeline, parts are missing, it makes no images from text or classes, its
    network does not take the classes, or it lacks the safety checker that the job asks for."""
    try:
        facts = _facts_of(settings)
        for number in (facts.num_classes, facts.null_class, facts.train_steps, facts.side):
            if number is not None and not (isinstance(number, int) and 0 <= number < 2**31):
                raise ValueError
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        raise ConfigError(
            f"generate.pipeline={settings.pipeline}: a value in its config files has another form; save or fetch the "
            "pipeline again"
        ) from None
    if (facts.train_steps or 0) > _MOST_TRAIN_STEPS:
        raise ConfigError(
            f"generate.pipeline={settings.pipeline}: its scheduler names {facts.train_steps:,} steps of training, and "
            f"{_MOST_TRAIN_STEPS:,} are the most"
        )
    if facts.side > _MOST_SIDE:
        raise ConfigError(
            f"generate.pipeline={settings.pipeline}: its config names pictures of {facts.side:,} pixels, and "
            f"{_MOST_SIDE:,} are the most"
        )
    return facts


def _facts_of(settings: Generate) -> PipelineFacts:
    what = f"generate.pipeline={settings.pipeline}"
    index, folder, commit, licence = read_index(settings)
    for place in folder.glob("*/tokenizer.json"):
        check_tokenizer(place.parent, what)
    name = str(index["_class_name"])
    by_number, null = known_classes(folder)
    kind, num_classes = _kind(settings, name), None
    if name == "DiTPipeline":
        labels: dict[str, str] = index.get("id2label") or {}
        by_number += [(word.strip(), int(k)) for k, words in labels.items() for word in words.split(",")]
        num_classes, null = _classes_of_dit(settings, folder, what), _DIT_NO_CLASS
    elif name in PLAIN:
        takes_class, num_classes = _classes_of_unet(folder, what)
        kind = "class" if takes_class else "none"
        if by_number and not takes_class:
            raise ConfigError(
                f"{what}: its {CLASSES_FILE} names classes ({_some([name for name, _ in by_number])}), but its network "
                "takes no class; delete that file, or name a class-conditional pipeline"
            )
        if null is not None and num_classes is not None and not 0 <= null < num_classes:
            raise ConfigError(
                f"{what}: the number of no class in its {CLASSES_FILE} is {null}, but its network knows 0 to "
                f"{num_classes - 1}"
            )
    if settings.strength is not None and kind != "image":
        raise ConfigError(f"generate.strength is for text-to-image pipelines; {what} is a {name}")
    if settings.class_ids and kind != "class":
        raise ConfigError(
            f"generate.class_ids gives numbers to {_some(list(settings.class_ids))}, but {what} is a {name} whose "
            "network takes no class; remove it, or name a class-conditional pipeline"
        )
    if kind in ("text", "image") and settings.safety_checker and not (index.get("safety_checker") or [None])[0]:
        raise ConfigError(
            f"{what} has no safety checker, but generate.safety_checker asks for one; name a pipeline with one, or "
            "set generate.safety_checker=false"
        )
    numbers: dict[str, set[int]] = {}
    for word, number in by_number:
        numbers.setdefault(word, set()).add(number)
    return PipelineFacts(
        pipeline=settings.pipeline,
        kind=kind,
        commit=commit,
        licence=licence,
        classes={word: min(found) for word, found in numbers.items() if len(found) == 1},
        ambiguous={word: sorted(found) for word, found in numbers.items() if len(found) > 1},
        num_classes=num_classes,
        null_class=null,
        side=settings.size or working_side(folder),
        train_steps=read_part(folder, "scheduler", "scheduler_config.json").get("num_train_timesteps"),
    )


def class_numbers(settings: Generate, facts: PipelineFacts, classes: Sequence[str]) -> dict[str, int | None]:
    """The pipeline's number of each class of the data; None if it takes no class. Raises ConfigError: a class has no
    number, a number that the network does not know, or another class's number."""
    if facts.kind != "class":
        return dict.fromkeys(classes)
    what, known = f"generate.pipeline={settings.pipeline}", {**facts.classes, **(settings.class_ids or {})}
    if lacking := [name for name in classes if name not in known]:
        if lacking[0] in facts.ambiguous:
            numbers = ", ".join(map(str, facts.ambiguous[lacking[0]]))
            raise ConfigError(
                f"{what} has several classes named {lacking[0]!r}, the numbers {numbers}; choose one in "
                "generate.class_ids"
            )
        raise ConfigError(
            f"{what} does not know the classes {_some(lacking)}; it knows {_some(list(known)) or 'none by name'}; set "
            "the number of each in generate.class_ids"
        )
    owner: dict[int, str] = {}
    for name in classes:
        number = known[name]
        if facts.num_classes is not None and number >= facts.num_classes:
            raise ConfigError(
                f"generate.class_ids: {name!r} would be class {number} of {what}, whose network knows 0 to "
                f"{facts.num_classes - 1}; set its number there"
            )
        if number == facts.null_class:
            raise ConfigError(
                f"generate.class_ids: {name!r} would be class {number} of {what}, which is its number of no class; "
                "set another there"
            )
        if (other := owner.setdefault(number, name)) != name:
            raise ConfigError(
                f"classes {other!r} and {name!r} would both be class {number} of {what}, so their images would show "
                "the same things; set a number for each in generate.class_ids"
            )
    return {name: known[name] for name in classes}


def check_steps(settings: Generate, facts: PipelineFacts, classes: Sequence[str]) -> None:
    """Raises ConfigError: the scheduler cannot take that number of steps."""
    for name in classes:
        steps = settings.prompt_settings(name).steps
        assert steps is not None
        own = name in settings.overrides and settings.overrides[name].steps is not None
        key = f"generate.overrides.{name}.steps" if own else "generate.steps"
        if facts.train_steps is not None and steps > facts.train_steps:
            raise ConfigError(
                f"{key}={steps}: the scheduler of generate.pipeline={settings.pipeline} has only {facts.train_steps} "
                "steps; lower it"
            )
        if settings.strength is not None and int(steps * settings.strength) < 1:
            raise ConfigError(
                f"{key}={steps} with generate.strength={settings.strength} leaves no step; raise one of them until "
                "their product is 1 or more"
            )


def _kind(settings: Generate, name: str) -> Kind:
    """The input of a pipeline of this class. Raises ConfigError: the job has no such input."""
    if name == "DiTPipeline":
        return "class"
    if name in PLAIN:
        return "none"  # or class, by its network's config
    # This loads all pipelines of diffusers and takes seconds, so it comes last.
    from diffusers.pipelines import auto_pipeline as auto

    from_image = settings.strength is not None
    ours = auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING if from_image else auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING
    tasks: Any = auto.SUPPORTED_TASKS_MAPPINGS
    models = (model for task in tasks for model, found in task.items() if found.__name__ == name)
    pipeline = ours.get(next(models, ""))
    if pipeline is None:
        raise ConfigError(
            f"generate.pipeline={settings.pipeline} is a {name}, and diffusers knows no way to make images from "
            f"{'images and text' if from_image else 'text'} with it; name a text-to-image pipeline"
            f"{' with an image-to-image variant' if from_image else ''}, a DiTPipeline, or one of "
            f"{', '.join(PLAIN)}"
        )
    asked = {"prompt", "guidance_scale", "num_inference_steps"} | ({"image", "strength"} if from_image else set())
    if lacking := sorted(asked - set(inspect.signature(pipeline.__call__).parameters)):
        raise ConfigError(
            f"generate.pipeline={settings.pipeline} is a {name}, and {pipeline.__name__} takes no {lacking[0]}; name "
            f"another pipeline{' or remove generate.strength' if from_image else ''}"
        )
    return "image" if from_image else "text"


def _classes_of_unet(folder: Path, what: str) -> tuple[bool, int | None]:
    """Whether the network takes a class, and how many it knows. Raises ConfigError."""
    unet = read_part(folder, "unet", "config.json")
    if not unet:
        raise ConfigError(f"{what}: its unet has no config.json; save or fetch the pipeline again")
    embedding, number = unet.get("class_embed_type"), unet.get("num_class_embeds")
    if embedding == "identity":
        raise ConfigError(f"{what}: its network takes embeddings of classes (class_embed_type=identity), not numbers")
    if embedding == "timestep":
        return True, None
    return embedding is None and number is not None, number


def _classes_of_dit(settings: Generate, folder: Path, what: str) -> int:
    number: int = read_part(folder, "transformer", "config.json").get("num_embeds_ada_norm") or _DIT_NO_CLASS
    most = max([settings.guidance, *(own.guidance or 0 for own in settings.overrides.values())])
    if number != _DIT_NO_CLASS and most > 1:
        raise ConfigError(
            f"generate.guidance={most:g}: DiTPipeline uses class {_DIT_NO_CLASS} as no class, but the network of "
            f"{what} knows {number} classes; set generate.guidance=1"
        )
    return number


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (" …" if len(names) > 5 else "")

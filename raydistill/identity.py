"""What each stage's directory is named by: the hash of all that decides its result.

Nothing here imports torch or ray, so that `raydistill show` answers at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from raydistill.config import RunConfig, Student, Teacher, Views, fine_tuning
from raydistill.data.sample import SampleSet
from raydistill.data.sources.listing import Listing
from raydistill.errors import ConfigError
from raydistill.examples import weights_fingerprint
from raydistill.models.shards import weight_files
from raydistill.storage.directory import GENERATED, StageDirectory, workspace_root
from raydistill.storage.state import read_state

# Raise the number of a stage whose results change for equal inputs; what was made before is then made again.
FORMATS = {
    "decoded": 2, "prepare": 3, "features": 3, "adapt": 3, "generated": 1, "generate": 3, "teach": 2, "distill": 7,
    "evaluate": 4, "export": 4, "compare": 2, "tune": 2,
}  # fmt: skip
_MODEL_FILES = (".json", ".safetensors", ".bin", ".pth", ".pt", ".txt", ".model")
_SECONDS_OF_A_FRESH_FILE = 2.0
# What `distill` leaves in its folder beside these is about its making; the last is there for transformers models.
_STUDENT_FILES = ("student.json", "student.safetensors", "config.json")


def stage_directory(config: RunConfig, stage: str, identity: dict[str, Any]) -> StageDirectory:
    text = json.dumps({"format": FORMATS.get(stage, 1), **identity}, indent=2, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return StageDirectory(f"{workspace_root(config)}/{stage}-{digest}", stage, text)


def decoded_directory(config: RunConfig, listing: Listing) -> StageDirectory:
    """All images at the working size, which no seed and no label has a say in; `prepare` sorts them into place."""
    images = config.images.model_dump(include={"size", "fit", "max_pixels", "max_bytes"})
    return stage_directory(config, "decoded", {"images": images, "files": listing.fingerprint})


def prepare_directory(config: RunConfig, listing: Listing) -> StageDirectory:
    images = config.images.model_dump(exclude={"path", "classes", "allow_missing_val"})
    images["shard_size"] = config.images.rows_per_shard
    return stage_directory(
        config,
        "prepare",
        {"images": images, "classes": listing.classes, "files": listing.fingerprint, "seed": config.seed},
    )


def features_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    """The teacher's features of the unaugmented labelled images of train and val, from which `adapt` makes a head."""
    identity = {"backbone": _backbone(config), "images": _pixels(config), **_train_and_val(samples)}
    return stage_directory(config, "features", identity)


def held_out_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    """The same of the test split, for `evaluate` alone. All test images have labels, and which train images have them
    does not matter here: a learning curve pays for these once."""
    identity = {"backbone": _backbone(config), "ids": {"test": samples.ids["test"]}, "images": _pixels(config)}
    return replace(stage_directory(config, "features", identity), stage="test_features")


def adapt_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    assert config.teacher is not None
    head = config.teacher.model_dump(include={"head", "class_balanced"})
    if config.teacher.head == "zero_shot":
        head["prompts"] = config.teacher.prompts
    return stage_directory(
        config,
        "adapt",
        {"features": features_directory(config, samples).name, "head": head, "classes": samples.classes},
    )


def fine_tune_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    """Where `adapt` trains a teacher with `head: fine_tune`: a `distill` directory like any other."""
    return replace(distill_directory(fine_tuning(config), samples), stage="fine_tune")


def fine_tunes(config: RunConfig) -> bool:
    """Whether `adapt` trains the whole teacher on the task first."""
    return config.teacher is not None and config.teacher.head == "fine_tune" and config.loss.needs_teacher


def tuned(config: RunConfig, samples: SampleSet) -> RunConfig | None:
    """The config as the stages after fine-tuning see it, in which the teacher is the folder that this wrote, with its
    own head; None as long as it is not done. Without fine-tuning it is the config itself."""
    if config.teacher is None or not fine_tunes(config):
        return config
    directory = fine_tune_directory(config, samples)
    if directory.done() is None:
        return None
    changes = {"model": directory.path, "weights": None, "revision": None, "head": "native"}
    return config.model_copy(update={"teacher": config.teacher.model_copy(update=changes)})


def generate_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    """The chosen images. How they are trained on is no part of it.

    Of a pipeline on the hub the name and the revision count, and not the commit that a branch stands at, which only the
    network knows: what is done stays done when the branch moves. The classes' own directories, in which images are
    looked for, do count it, so one choice never mixes the images of two commits; `generate.json` says which it was.
    """
    settings = config.generate
    assert settings is not None
    kept = settings.model_dump(exclude={"pipeline", "names", "batch_size", "share", "task_weight"})
    identity = {
        "generate": kept,
        "pipeline": _pipeline(config),
        "names": None if settings.names is None else _content(settings.names),
        "classes": samples.classes,
        "ids": samples.ids,
        "labels": samples.labels["train"],
        "images": _pixels(config),
        "seed": config.seed,
    }
    if settings.filter.needs_teacher:
        identity["head"] = adapt_directory(config, samples).name
    return stage_directory(config, "generate", identity)


def class_directory(config: RunConfig, recipe: dict[str, Any]) -> StageDirectory:
    """Everything that was ever made of one class by one recipe, kept or not: a stage that asks for more images, or
    filters them in another way, pays for no image twice."""
    identity = {"pipeline": _pipeline(config), "seed": config.seed, **recipe}
    directory = stage_directory(config, "generated", identity)
    digest = directory.name.removeprefix("generated-")
    return replace(directory, path=f"{workspace_root(config)}/{GENERATED}/{digest}")


def teach_generated_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    """The soft targets of the generated images, apart from those of the real ones, which stay what they are."""
    identity = {
        "backbone": _backbone(config),
        "generate": generate_directory(config, samples).name,
        "images": _pixels(config),
        "views": config.views.model_dump(),
        "seed": config.seed,
    }
    return replace(stage_directory(config, "teach", identity), stage="teach_generated")


def backbone_name(config: RunConfig) -> str:
    """A short name of the teacher's backbone and of the working images that it sees."""
    return hashlib.sha256(json.dumps([_backbone(config), _pixels(config)], sort_keys=True).encode()).hexdigest()[:12]


def views_name(views: Views, seed: int) -> str:
    """A short name of the stored views of any image."""
    return hashlib.sha256(json.dumps([views.model_dump(), seed], sort_keys=True).encode()).hexdigest()[:12]


def teach_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    """Neither labels nor the head are part of it: with new ones the soft targets' features stay as they are."""
    return stage_directory(
        config,
        "teach",
        {
            "backbone": _backbone(config),
            "ids": samples.ids["train"],
            "images": _pixels(config),
            "views": config.views.model_dump(),
            "seed": config.seed,
        },
    )


def taught_before(directory: StageDirectory) -> list[str]:
    """Files of soft targets in other directories of `teach`, by the same teacher in the same views of other images."""
    own = _apart_from_images(json.loads(directory.identity))
    root, place = directory.path.rpartition("/")[0], directory.place.rpartition("/")[0]
    files: list[str] = []
    for name in directory.fs.names(place):
        if not name.startswith("teach-") or name == directory.name:
            continue
        if directory.fs.is_local and os.path.islink(f"{place}/{name}"):
            continue
        other = read_state(f"{root}/{name}/identity.json", dict[str, Any])
        if other is not None and _apart_from_images(other) == own:
            found = directory.fs.names(f"{place}/{name}")
            files += [f"{root}/{name}/{file}" for file in found if file.endswith(".safetensors")]
    return files


def _apart_from_images(identity: dict[str, Any]) -> dict[str, Any]:
    return {key: None if key in ("ids", "generate") else value for key, value in identity.items()}


def distill_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    student = config.student.model_dump(exclude={"weights"}) | _identity_of_model(config.student)
    loss = config.loss.model_dump() if config.loss.needs_teacher else {"task_weight": config.loss.task_weight}
    identity = {
        "student": student,
        "loss": loss,
        "distill": config.distill.model_dump(exclude={"cache", "checkpoint_seconds", "max_failures"}),
        "views": config.views.model_dump(),
        "images": _pixels(config),
        **_train_and_val(samples),
        "classes": samples.classes,
        "seed": config.seed,
    }
    if config.generate is not None:
        identity["generate"] = generate_directory(config, samples).name
        identity["generated"] = config.generate.model_dump(include={"share", "task_weight"})
    if config.loss.needs_teacher:
        identity |= {"head": adapt_directory(config, samples).name, "teach": teach_directory(config, samples).name}
    return stage_directory(config, "distill", identity)


def evaluate_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    identity = {
        "student": distill_directory(config, samples).name,
        "test": [samples.ids["test"], samples.labels["test"]],
        "evaluate": config.evaluate.model_dump(exclude={"batch_size"}),
    }
    return stage_directory(config, "evaluate", identity)


def export_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    """The measures that its card tells are those of `evaluate`."""
    identity = {
        "evaluate": evaluate_directory(config, samples).name,
        "export": config.export.model_dump(exclude={"allow_useless", "hub", "register_as"}),
    }
    return stage_directory(config, "export", identity)


def student_key(config: RunConfig, prepared: StageDirectory) -> str:
    """A short name of all that decides the student, its measures and its exports, while none of the stages that name
    their directories by what they find has run."""
    identity: dict[str, Any] = {
        "prepare": prepared.name,
        "student": config.student.model_dump(exclude={"weights"}) | _identity_of_model(config.student),
        "loss": config.loss.model_dump() if config.loss.needs_teacher else {"task_weight": config.loss.task_weight},
        "distill": config.distill.model_dump(exclude={"cache", "checkpoint_seconds", "max_failures"}),
        "views": config.views.model_dump(),
        "evaluate": config.evaluate.model_dump(exclude={"batch_size"}),
        "export": config.export.model_dump(exclude={"allow_useless", "hub", "register_as"}),
        "seed": config.seed,
    }
    if config.loss.needs_teacher and config.teacher is not None:
        tuning = {key for key in Teacher.model_fields if key.startswith("fine_tune_")}
        of_heads = {"zero_shot": {"prompts"}, "fine_tune": tuning}
        used = {"head", "class_balanced"} | of_heads.get(config.teacher.head, set())
        identity["teacher"] = _backbone(config) | config.teacher.model_dump(include=used)
    if config.generate is not None:
        settings = config.generate.model_dump(exclude={"pipeline", "names", "batch_size"})
        names = None if config.generate.names is None else _content(config.generate.names)
        identity["generate"] = {**settings, **_pipeline(config), "names": names}
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _train_and_val(samples: SampleSet) -> dict[str, Any]:
    """What of the images and labels decides heads and students; the test split decides none of them."""
    splits = ("train", "val")
    return {"ids": {s: samples.ids[s] for s in splits}, "labels": {s: samples.labels[s] for s in splits}}


def _pixels(config: RunConfig) -> dict[str, Any]:
    """With equal sample ids, what decides the working images."""
    return {"size": config.images.size, "fit": config.images.fit, "shard_size": config.images.rows_per_shard}


def _backbone(config: RunConfig) -> dict[str, Any]:
    teacher: Teacher | None = config.teacher
    assert teacher is not None
    identity = teacher.model_dump(include={"revision", "size"}) | _identity_of_model(teacher)
    if teacher.center_crop:
        identity["center_crop"] = True
    if not teacher.model.startswith("timm:"):
        # The native head of a transformers model may read other features than its backbone gives.
        identity["head"] = teacher.head
    return identity


def _identity_of_model(section: Teacher | Student) -> dict[str, Any]:
    """A model's name and weights, by content where they are files."""
    identity: dict[str, Any] = {"model": section.model, "weights": _weights(section.weights, section)}
    folder = section.model.removeprefix("hf:").removeprefix("timm:local-dir:")
    if os.path.isdir(folder):
        identity["model"] = _folder(folder)
    elif section.model.startswith("example:"):
        identity["model"] = _weights(section.model, section)
    return identity


def _pipeline(config: RunConfig) -> dict[str, Any]:
    """A diffusion pipeline by its hub name and revision or, where it is a folder, by the content of its files."""
    assert config.generate is not None
    name, revision = config.generate.pipeline, config.generate.revision
    if not os.path.isdir(name):
        return {"pipeline": name, "revision": revision}
    paths = sorted(str(p) for p in Path(name).rglob("*") if p.is_file() and p.name.endswith(_MODEL_FILES))
    return {"pipeline": {os.path.relpath(path, name): _content(path) for path in paths}}


def _folder(folder: str) -> str:
    """A model saved in a folder is known by the content of the files that a library reads, wherever it lies."""
    names = [name for name in os.listdir(folder) if name.endswith(_MODEL_FILES)]
    if "student.json" in names:
        names = list(_STUDENT_FILES)
    files = {name: os.path.join(folder, name) for name in names}
    return json.dumps({name: _content(path) for name, path in sorted(files.items()) if os.path.isfile(path)})


def _weights(weights: str | None, section: Teacher | Student) -> str | None:
    """Weights are known by their content: another file under the same name is another teacher."""
    if weights is None:
        return None
    if weights.startswith("example:"):
        return weights_fingerprint(weights.removeprefix("example:"))
    files = weight_files(weights, f"{type(section).__name__.lower()}.weights")
    return (
        _content(str(files[0])) if len(files) == 1 else json.dumps({file.name: _content(str(file)) for file in files})
    )


def _content(path: str) -> str:
    try:
        found = os.stat(path)
        # As git does: a file may change twice within one tick of the clock that its time of change is read from.
        fresh = time.time_ns() if time.time() - found.st_mtime < _SECONDS_OF_A_FRESH_FILE else 0
        return _hash_of(path, found.st_ino, found.st_size, found.st_mtime_ns, fresh)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); it is named as a model or its weights") from None


@lru_cache(maxsize=1024)
def _hash_of(path: str, inode: int, size: int, changed: int, fresh: int) -> str:
    """Read once as long as it stays the same file: every stage, and every class of `generate`, asks, and a model may
    have gigabytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

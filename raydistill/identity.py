"""The name of each stage's directory: a hash of everything that decides its result.

Nothing here imports torch or ray, so that `raydistill show` answers at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from raydistill.config import Images, RunConfig, Teacher, Views, fine_tuning, members
from raydistill.data.compact import PROJECTION_FILE
from raydistill.data.sample import SampleSet
from raydistill.data.sources.listing import Listing
from raydistill.models.fingerprints import content_hash, model_identity, pipeline_identity
from raydistill.storage.directory import GENERATED, PRECISION, StageDirectory, workspace_root
from raydistill.storage.state import read_state

# Raise the number of a stage if its results change for equal inputs, so that it runs again.
FORMATS = {
    "decoded": 3, "prepare": 5, "features": 3, "adapt": 3, "generated": 1, "generate": 4, "teach": 3, "distill": 9,
    "evaluate": 4, "export": 4, "compare": 2, "tune": 2,
}  # fmt: skip


def stage_directory(config: RunConfig, stage: str, identity: dict[str, Any]) -> StageDirectory:
    text = json.dumps({"format": FORMATS.get(stage, 1), **identity}, indent=2, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return StageDirectory(f"{workspace_root(config)}/{stage}-{digest}", stage, text)


def decoded_directory(config: RunConfig, listing: Listing) -> StageDirectory:
    """All images at the working size, independent of seed and labels; `prepare` sorts them into splits."""
    images = image_settings(config, "size", "fit", "max_pixels", "max_bytes")
    return stage_directory(config, "decoded", {"images": images, "files": listing.fingerprint})


def prepare_directory(config: RunConfig, listing: Listing) -> StageDirectory:
    images = image_settings(config, *(Images.model_fields.keys() - {"path", "classes", "allow_missing_val", "store"}))
    images["shard_size"] = config.images.rows_per_shard
    identity = {"images": images, "classes": listing.classes, "files": listing.fingerprint, "seed": config.seed}
    return stage_directory(config, "prepare", identity)


def features_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    """The teacher's features of the unaugmented labelled images of train and val, from which `adapt` makes a head."""
    identity = {"backbone": _backbone(config), "images": _pixels(config), **_train_and_val(samples)}
    return stage_directory(config, "features", identity)


def held_out_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    """The same for the test split; only `evaluate` uses them. They do not depend on train labels, so a learning curve
    computes them once."""
    identity = {"backbone": _backbone(config), "ids": {"test": samples.ids["test"]}, "images": _pixels(config)}
    return replace(stage_directory(config, "features", identity), stage="test_features")


def member_directories(
    config: RunConfig, samples: SampleSet, directory_of: Callable[[RunConfig, SampleSet], StageDirectory]
) -> list[tuple[RunConfig, StageDirectory]]:
    """The job of each member of a committee with its own directory, which that teacher has alone or in any other
    committee too. Empty with one teacher."""
    each = members(config)
    if len(each) == 1:
        return []
    found = [(member, directory_of(member, samples)) for member in each]
    return [(member, replace(own, stage=f"{own.stage}_{k}")) for k, (member, own) in enumerate(found, 1)]


def adapt_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    assert config.teacher is not None
    head = config.teacher.model_dump(include={"head", "class_balanced"})
    if config.teacher.head == "zero_shot":
        head["prompts"] = config.teacher.prompts
    identity = {"features": features_directory(config, samples).name, "head": head, "classes": samples.classes}
    return stage_directory(config, "adapt", identity)


def fine_tune_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    """The directory of a teacher with `head: fine_tune`, in the form of a `distill` directory."""
    return replace(distill_directory(fine_tuning(config), samples), stage="fine_tune")


def fine_tunes(config: RunConfig) -> bool:
    """Whether `adapt` trains the whole teacher on the task first."""
    return config.teacher is not None and config.teacher.head == "fine_tune" and config.loss.needs_teacher


def tuned(config: RunConfig, samples: SampleSet) -> RunConfig | None:
    """The config for the stages after fine-tuning, with the fine-tuned teacher and its native head. None until that
    exists; the config itself without fine-tuning."""
    if config.teacher is None or not fine_tunes(config):
        return config
    directory = fine_tune_directory(config, samples)
    if directory.done() is None:
        return None
    changes = {"model": directory.path, "weights": None, "revision": None, "head": "native"}
    return config.model_copy(update={"teacher": config.teacher.model_copy(update=changes)})


def generate_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    """The selected images, independent of the settings that train on them.

    A pipeline on the hub counts by name and revision, not by the commit of a branch, which only the network knows: a
    finished stage stays finished when the branch moves. The directories of the classes count the commit, so a selection
    never mixes the images of two commits; `generate.json` names it.
    """
    settings = config.generate
    assert settings is not None
    kept = settings.model_dump(exclude={"pipeline", "names", "batch_size", "share", "task_weight"})
    identity = {
        "generate": kept,
        "pipeline": pipeline_identity(config.generate),
        "names": None if settings.names is None else content_hash(settings.names),
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
    """Every image of one class by one recipe, kept or not. So a stage with more images or other filters makes no image
    twice."""
    identity = {"pipeline": pipeline_identity(config.generate), "seed": config.seed, **recipe}
    directory = stage_directory(config, "generated", identity)
    digest = directory.name.removeprefix("generated-")
    return replace(directory, path=f"{workspace_root(config)}/{GENERATED}/{digest}")


def teach_generated_directory(config: RunConfig, samples: SampleSet, member: RunConfig | None = None) -> StageDirectory:
    """The soft targets of the generated images, separate from those of the real images, which do not change; or those
    by a `member` of the committee that judged them."""
    identity = _stored_views(member or config) | {"generate": generate_directory(config, samples).name}
    if member is not None:
        return replace(stage_directory(config, "teach", identity), stage="teach_generated")
    if config.views.store == "compact":  # by the projection of the real ones
        identity["projection"] = teach_directory(config, samples).name
    return replace(stage_directory(config, "teach", identity), stage="teach_generated")


def backbone_name(config: RunConfig) -> str:
    """A short name of the teacher's backbone and its working images."""
    return _short_name([_backbone(config), _pixels(config)])


def teacher_pin(root: str, config: RunConfig) -> str:
    """The file in the workspace `root` of what `teacher.precision: auto` stands for: one for all directories of a
    teacher, so a head and its soft targets are of one precision. Each member of a committee has its own."""
    return f"{root}/{PRECISION}/{_short_name(_backbone(config))}.json"


def pipeline_pin(root: str, config: RunConfig) -> str:
    """The same of `generate.dtype`. Every directory of generated images counts what it depends on."""
    assert config.generate is not None
    return f"{root}/{PRECISION}/{_short_name([pipeline_identity(config.generate), config.generate.size])}.json"


def student_pin(root: str, config: RunConfig) -> str:
    """The same of a student's training, whoever runs it on however many workers."""
    student = config.student.model_dump(exclude={"weights"}) | model_identity(config.student)
    settings = config.distill.model_dump(include={"batch_size", "channels_last"})
    return f"{root}/{PRECISION}/{_short_name([student, settings, config.distill.body_rate == 0])}.json"


def views_name(views: Views, seed: int) -> str:
    """A short name of the stored views of any image."""
    return _short_name([views.identity, seed, FORMATS["teach"]])


def _short_name(identity: object) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]


def teach_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    """It does not depend on labels or the head, so the stored features stay valid when these change."""
    return stage_directory(config, "teach", _stored_views(config) | {"ids": samples.ids["train"]})


def _stored_views(config: RunConfig) -> dict[str, Any]:
    views = {"views": config.views.identity, "seed": config.seed}
    return {"backbone": _backbone(config), "images": _pixels(config)} | views | _store(config)


def _store(config: RunConfig) -> dict[str, Any]:
    store = config.views.store  # `full` is the only one of older versions, whose directories keep their names
    return {} if store == "full" else {"store": store}


def taught_before(directory: StageDirectory) -> dict[str, list[str]]:
    """Files of soft targets by directory: of other `teach` directories by the same teacher and views. They hold full
    features or, if this directory's are compact too, compact ones."""
    own = json.loads(directory.identity)
    root, place = directory.path.rpartition("/")[0], directory.place.rpartition("/")[0]
    files: dict[str, list[str]] = {}
    for name in directory.fs.names(place):
        if not name.startswith("teach-") or name == directory.name:
            continue
        if directory.fs.is_local and os.path.islink(f"{place}/{name}"):
            continue
        other = read_state(f"{root}/{name}/identity.json", dict[str, Any])
        if other is None or other.get("store") not in (None, own.get("store")):
            continue
        if _of_teacher(other) == _of_teacher(own):
            found = directory.fs.names(f"{place}/{name}")
            if "store" in other and PROJECTION_FILE not in found:
                continue
            files[f"{root}/{name}"] = [f"{root}/{name}/{file}" for file in found if file.startswith("train-")]
    return files


def _of_teacher(identity: dict[str, Any]) -> dict[str, Any]:
    """All but the images, and how their features are stored."""
    return {key: value for key, value in identity.items() if key not in ("ids", "generate", "store", "projection")}


def distill_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    identity = {
        **_training(config), **_train_and_val(samples), "images": _pixels(config), "classes": samples.classes,
    }  # fmt: skip
    if config.generate is not None:
        identity["generate"] = generate_directory(config, samples).name
        identity["generated"] = config.generate.model_dump(include={"share", "task_weight"})
    if config.loss.needs_teacher:
        identity |= {"head": adapt_directory(config, samples).name, "teach": teach_directory(config, samples).name}
    return stage_directory(config, "distill", identity)


# Keys that older versions did not have, with the value that stands for what those did: it leaves names as they were.
_ADDED = {
    "class_weights": None, "label_smoothing": 0.0, "patience": None, "layer_decay": None, "decay_norms": True,
}  # fmt: skip


def _training(config: RunConfig) -> dict[str, Any]:
    loss, distill = config.loss.model_dump(), config.distill.model_dump()
    if not config.loss.needs_teacher:
        loss = {key: loss[key] for key in ("task_weight", "class_weights", "label_smoothing")}
    elif "task" not in config.loss.terms:
        loss |= {"class_weights": None, "label_smoothing": 0.0}
    if config.distill.ema_decay is not None:
        distill["ema"] = 2  # since its decay warms up
    if config.distill.weight_decay == 0:
        del distill["decay_norms"]
    for key in ("cache", "checkpoint_seconds", "max_failures"):
        del distill[key]
    return {
        "student": config.student.model_dump(exclude={"weights"}) | model_identity(config.student),
        "loss": _without_added(loss),
        "distill": _without_added(distill),
        "views": config.views.identity,
        "seed": config.seed,
    }


def _without_added(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _ADDED or value != _ADDED[key]}


def evaluate_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    identity = {
        "student": distill_directory(config, samples).name,
        "test": [samples.ids["test"], samples.labels["test"]],
        **_evaluating(config),
    }
    return stage_directory(config, "evaluate", identity)


def export_directory(config: RunConfig, samples: SampleSet) -> StageDirectory:
    """It covers `evaluate`, because the model card shows its measures."""
    identity = {"evaluate": evaluate_directory(config, samples).name, **_exporting(config)}
    return stage_directory(config, "export", identity)


def _evaluating(config: RunConfig) -> dict[str, Any]:
    return {"evaluate": config.evaluate.model_dump(exclude={"batch_size"})}


def _exporting(config: RunConfig) -> dict[str, Any]:
    return {"export": config.export.model_dump(exclude={"allow_useless", "hub", "register_as"})}


def student_key(config: RunConfig, prepared: StageDirectory) -> str:
    """A short name of everything that decides the student, its measures and its exports. Unlike the names of
    directories, it is known before any stage runs."""
    identity = _training(config) | _evaluating(config) | _exporting(config) | {"prepare": prepared.name}
    if config.loss.needs_teacher and config.teacher is not None:
        tuning = {key for key in Teacher.model_fields if key.startswith("fine_tune_")}
        of_heads = {"zero_shot": {"prompts"}, "fine_tune": tuning}
        used = {"head", "class_balanced"} | of_heads.get(config.teacher.head, set())
        identity["teacher"] = _backbone(config) | config.teacher.model_dump(include=used) | _store(config)
    if config.generate is not None:
        settings = config.generate.model_dump(exclude={"pipeline", "names", "batch_size"})
        names = None if config.generate.names is None else content_hash(config.generate.names)
        identity["generate"] = {**settings, **pipeline_identity(config.generate), "names": names}
    return _short_name(identity)


def _train_and_val(samples: SampleSet) -> dict[str, Any]:
    """The images and labels that decide heads and students: all but the test split."""
    splits = ("train", "val")
    return {"ids": {s: samples.ids[s] for s in splits}, "labels": {s: samples.labels[s] for s in splits}}


def _pixels(config: RunConfig) -> dict[str, Any]:
    """Together with the sample ids, this decides the working images."""
    return image_settings(config, "size", "fit") | {"shard_size": config.images.rows_per_shard}


def image_settings(config: RunConfig, *names: str) -> dict[str, Any]:
    """Some settings of `images`, and how images are stored: JPEG changes pixels."""
    settings = config.images.model_dump(include=set(names))
    if config.images.store != "pixels":  # the only store of older versions, whose directories keep their names
        settings["store"] = config.images.store
    return settings


def _backbone(config: RunConfig) -> dict[str, Any]:
    teacher: Teacher | None = config.teacher
    assert teacher is not None
    if len(each := members(config)) > 1:
        return {"members": [_backbone(member) for member in each]}
    identity = teacher.model_dump(include={"revision", "size"}) | model_identity(teacher)
    if teacher.center_crop:
        identity["center_crop"] = True
    if teacher.precision != "fp32":  # the only one of older versions, whose directories keep their names
        identity["precision"] = teacher.precision
    if not teacher.name.startswith("timm:"):
        # The native head of a transformers model may read other features than its backbone gives.
        identity["head"] = teacher.head
    return identity

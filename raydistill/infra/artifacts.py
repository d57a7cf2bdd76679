"""Stage directories: `<workspace>/<stage>-<hash>/`, named by what decides the result, marked DONE last of all.

Nothing here imports torch or ray, so that `raydistill show` answers at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
import uuid
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeFloat, NonNegativeInt

from raydistill.config import RunConfig, Student, Teacher, Views, fine_tuning
from raydistill.data.images import Listing, list_images
from raydistill.data.sample import SampleSet, samples_from_json
from raydistill.errors import ConfigError, StageError
from raydistill.examples import weights_fingerprint
from raydistill.infra.versions import PACKAGES, installed
from raydistill.models.shards import weight_files
from raydistill.storage.filesystems import (
    FileSystem,
    make_private,
    open_filesystem,
    refuse_links,
    refuse_unreachable,
    write_bytes,
)
from raydistill.storage.state import read_state

# Raise the number of a stage whose results change for equal inputs; what was made before is then made again.
FORMATS = {
    "decoded": 2, "prepare": 3, "features": 3, "adapt": 3, "generated": 1, "generate": 3, "teach": 2, "distill": 7,
    "evaluate": 4, "export": 4, "compare": 2, "tune": 2,
}  # fmt: skip
_MODEL_FILES = (".json", ".safetensors", ".bin", ".pth", ".pt", ".txt", ".model")
_GENERATED = "generated"  # where the classes' own directories lie
_SECONDS_OF_A_FRESH_FILE = 2.0
# What `distill` leaves in its folder beside these is about its making; the last is there for transformers models.
_STUDENT_FILES = ("student.json", "student.safetensors", "config.json")


class Bill(BaseModel):
    """What `seconds.json` says, as far as it is read."""

    seconds: NonNegativeFloat = 0.0
    node_seconds: dict[str, NonNegativeFloat] = {}
    lost_nodes: NonNegativeInt = 0
    images_again: NonNegativeInt = 0
    seconds_again: NonNegativeFloat = 0.0
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class StageDirectory:
    """One stage's place in the workspace. Everything appears in it whole or not at all."""

    path: str
    stage: str
    identity: str  # JSON of what the hash covers

    @cached_property
    def fs(self) -> FileSystem:
        return open_filesystem(self.path)[0]

    @cached_property
    def place(self) -> str:
        """The path as its file system writes it."""
        return open_filesystem(self.path)[1]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def done(self) -> dict[str, Any] | None:
        """The stage's result, or None where it has not finished. It lies here, whatever the marker says of places, and
        wherever the workspace was before. Raises CheckpointError where a link lies in it, or a marker is damaged."""
        self._refuse_links()
        result = read_state(f"{self.path}/DONE", dict[str, Any])
        return None if result is None else result | {"path": self.path}

    def _refuse_links(self) -> None:
        if self.fs.is_local:
            between = self.place.rpartition("/")[0]  # the workspace, which may be a link, or what is in it
            if between != self._root and os.path.islink(between):
                refuse_links(between)
            refuse_links(self.place)

    @property
    def _root(self) -> str:
        above = self.place.rpartition("/")[0]
        return above.rpartition("/")[0] if self.stage == _GENERATED else above

    def started(self) -> bool:
        self._refuse_links()
        return bool(self.fs.exists(self.place))

    def write(self, name: str, data: bytes) -> None:
        write_bytes(f"{self.path}/{name}", data)

    def write_json(self, name: str, value: object) -> None:
        self.write(name, json.dumps(value, indent=2, ensure_ascii=False).encode())

    def make(self) -> None:
        """The folder. A workspace that is not there yet is this user's alone; in one that is, `umask` counts."""
        self._refuse_links()
        if self.fs.is_local:
            make_private(self._root)
        self.fs.make_folder(self.place)

    def begin(self) -> None:
        self.make()
        self.write("identity.json", self.identity.encode())

    def finish(self, result: dict[str, Any]) -> None:
        self.write_json("DONE", {name: value for name, value in result.items() if name != "path"})

    def write_bill(self, bill: dict[str, Any]) -> None:
        """What the run that finished the stage paid, and with which versions it ran: `read_bill` gives it back."""
        self.write_json("seconds.json", bill | {"versions": installed(PACKAGES)})


def free_bytes(config: RunConfig) -> float:
    """On the workspace's disk; infinite in an object store, of which nothing is known."""
    fs, root = open_filesystem(workspace_root(config))
    if not fs.is_local:
        return math.inf
    return shutil.disk_usage(next(place for place in (Path(root), *Path(root).parents) if place.exists())).free


def refuse_small_disk(config: RunConfig, what: str, need: float, advice: str) -> None:
    """Raises ConfigError, before anything is written, where the workspace's disk has less than is needed."""
    free = free_bytes(config)
    if need > free:
        raise ConfigError(
            f"{what} may take {need:,.0f} bytes and {free:,.0f} are free in {workspace_root(config)}; "
            f"{advice}, or make room"
        )


def read_seconds(path: str) -> float:
    """How long the run that finished a stage took for it; 0 where nothing is said. What an interrupted run had spent
    on it before is not in it."""
    return float(read_bill(path).get("seconds", 0.0))


def read_bill(path: str) -> dict[str, Any]:
    """`seconds` of the run that finished a stage; on a cluster `node_seconds` by node type and `lost_nodes`; and, where
    a process or a node was lost, the `images_again` and `seconds_again` that this cost; `versions` by package."""
    bill = read_state(f"{path}/seconds.json", Bill)
    return {} if bill is None else bill.model_dump(exclude_unset=True)


def workspace_root(config: RunConfig) -> str:
    """The workspace as an absolute path or URL without a trailing slash. Raises ConfigError where it is no folder."""
    if "://" in config.workspace:
        return config.workspace.rstrip("/")
    root = os.path.abspath(os.path.expanduser(config.workspace))
    if os.path.exists(root) and not os.path.isdir(root):
        raise ConfigError(f"workspace={config.workspace}: a file is there, and no folder; choose another")
    return root


def check_writable(config: RunConfig) -> None:
    """Raises ConfigError where nothing can be written to the workspace."""
    root = workspace_root(config)
    fs, path = open_filesystem(root)
    mark = f".writable-{uuid.uuid4().hex}"  # of this command alone: another may be asking the same
    try:
        if fs.is_local:
            make_private(path)
        fs.make_folder(path)
        write_bytes(f"{root}/{mark}", b"")
        fs.remove(f"{path}/{mark}")
    except (OSError, StageError) as error:
        raise ConfigError(f"workspace={config.workspace}: cannot be written ({error}); choose another") from None


def stage_directory(config: RunConfig, stage: str, identity: dict[str, Any]) -> StageDirectory:
    text = json.dumps({"format": FORMATS[stage], **identity}, indent=2, sort_keys=True, default=str)
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


def tuned(config: RunConfig, samples: SampleSet) -> RunConfig | None:
    """The config as the stages after fine-tuning see it, in which the teacher is the folder that this wrote, with its
    own head; None as long as it is not done. Without fine-tuning it is the config itself."""
    if config.teacher is None or config.teacher.head != "fine_tune" or not config.loss.needs_teacher:
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
    return replace(directory, path=f"{workspace_root(config)}/{_GENERATED}/{digest}")


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


STAGES = ("prepare", "adapt", "generate", "teach", "distill", "evaluate", "export")


@dataclass(frozen=True)
class Work:
    """What a command is to do: the stages asked for, and those of them that are not done."""

    listing: Listing
    prepared: StageDirectory
    wanted: tuple[str, ...]
    undone: frozenset[str]
    needs_ray: bool


def find_work(config: RunConfig, until: str) -> Work:
    """Look at the images' names and the workspace; everything after `prepare` is undone as long as that is."""
    refuse_unreachable(workspace_root(config), "workspace")
    listing = list_images(config.images)
    prepared = prepare_directory(config, listing)
    streams = config.views.per_image == "fresh" and config.loss.needs_teacher
    needed = set(STAGES[: STAGES.index(until) + 1])
    needed -= set() if config.loss.needs_teacher else {"adapt", "teach"}
    needed -= {"teach"} if streams else set()
    needed -= {"generate"} if config.generate is None else set()
    wanted = tuple(stage for stage in STAGES if stage in needed)
    done = prepared.done()
    undone = frozenset(needed)
    if done is not None:
        samples = samples_from_json(done)
        makers = {
            "adapt": adapt_directory, "generate": generate_directory, "teach": teach_directory,
            "distill": distill_directory, "evaluate": evaluate_directory, "export": export_directory,
        }  # fmt: skip
        later = tuned(config, samples)
        undone = frozenset(s for s in needed - {"prepare"} if later is None or makers[s](later, samples).done() is None)
        tested = "adapt" in needed and samples.num_rows("test")
        if tested and later is not None and held_out_directory(later, samples).done() is None:
            undone |= {"adapt"}
        if later is not None and {"generate", "teach"} <= needed and "teach" not in undone:
            undone |= set() if teach_generated_directory(later, samples).done() else {"teach"}
    in_process = {"evaluate", "export"} | (set() if config.distill.num_workers or streams else {"distill"})
    return Work(listing, prepared, wanted, undone, bool(undone - in_process))


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

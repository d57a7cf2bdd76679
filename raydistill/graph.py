"""The stages in order, one row each. All code that orders, skips, names, shows or records stages reads this table.

Importing it loads nothing else, so that `raydistill --help` answers at once; a stage's function is imported when the
stage runs. A new stage is a row here and a file in `stages/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raydistill.config import RunConfig
    from raydistill.data.sample import SampleSet
    from raydistill.data.sources.listing import Listing
    from raydistill.storage.directory import StageDirectory


@dataclass(frozen=True)
class Stage:
    """One row. Its identity covers the config sections `settings`, and the results that it `takes`."""

    name: str  # of its command too
    help: str  # for the command line
    function: str  # module:name of its `(Execution) -> None`
    takes: tuple[str, ...]  # the stages whose results it reads
    settings: tuple[str, ...]
    directories: Callable[
        [RunConfig, SampleSet], Sequence[StageDirectory]
    ]  # the stage is done when all of them are; the config holds the fine-tuned teacher
    wanted: Callable[[RunConfig], bool] = lambda config: True
    needs_ray: Callable[[RunConfig], bool] = lambda config: True


def _streams(config: RunConfig) -> bool:
    """Whether fresh views go through the teacher while the student trains."""
    return config.views.per_image == "fresh" and config.loss.needs_teacher


def _is_stored(config: RunConfig) -> bool:
    """Whether the teacher is a folder of answers, so that no network runs."""
    return config.teacher is not None and config.teacher.stored is not None


def _directory(kind: str) -> Callable[[RunConfig, SampleSet], Sequence[StageDirectory]]:
    """The directory of a function of `identity`."""
    return lambda config, samples: [getattr(import_module("raydistill.identity"), f"{kind}_directory")(config, samples)]


def _adapted(config: RunConfig, samples: SampleSet) -> Sequence[StageDirectory]:
    from raydistill.identity import adapt_directory, held_out_directory

    tested = [held_out_directory(config, samples)] if samples.num_rows("test") and not _is_stored(config) else []
    return [adapt_directory(config, samples), *tested]


def _taught(config: RunConfig, samples: SampleSet) -> Sequence[StageDirectory]:
    from raydistill.identity import teach_directory, teach_generated_directory

    generated = [] if config.generate is None else [teach_generated_directory(config, samples)]
    return [teach_directory(config, samples), *generated]


STAGES = (
    Stage(
        "prepare",
        "Read, check, split and store the images at the working size.",
        "raydistill.stages.prepare:prepare",
        takes=(),
        settings=("images", "seed"),
        directories=lambda config, samples: [],  # its own is named by the files: `Work.prepared`
    ),
    Stage(
        "adapt",
        "Give the teacher a head for this task and measure it on val (after prepare).",
        "raydistill.stages.adapt:adapt",
        takes=("prepare",),
        settings=("teacher",),
        directories=_adapted,
        wanted=lambda config: config.loss.needs_teacher,
        needs_ray=lambda config: not _is_stored(config),
    ),
    Stage(
        "generate",
        "Make images with a diffusion pipeline and keep the good ones (after the stages it needs).",
        "raydistill.stages.generate:generate",
        takes=("prepare", "adapt"),
        settings=("generate", "seed"),
        directories=_directory("generate"),
        wanted=lambda config: config.generate is not None,
    ),
    Stage(
        "teach",
        "Run every view through the teacher and store its soft targets (after the stages it needs).",
        "raydistill.stages.teach:teach",
        takes=("prepare", "adapt", "generate"),
        settings=("teacher", "views", "seed"),
        directories=_taught,
        wanted=lambda config: config.loss.needs_teacher and not _streams(config),
        needs_ray=lambda config: not _is_stored(config),
    ),
    Stage(
        "distill",
        "Train the student (after the stages it needs).",
        "raydistill.stages.distill:distill",
        takes=("prepare", "adapt", "generate", "teach"),
        settings=("student", "loss", "distill", "views", "seed"),
        directories=_directory("distill"),
        needs_ray=lambda config: bool(config.train_workers) or _streams(config),
    ),
    Stage(
        "evaluate",
        "Measure student and teacher and draw the report (after the stages it needs).",
        "raydistill.stages.evaluate:evaluate",
        takes=("prepare", "adapt", "distill"),
        settings=("evaluate",),
        directories=_directory("evaluate"),
        needs_ray=lambda config: False,
    ),
    Stage(
        "export",
        "Write the student for timm or transformers, as ONNX and for torch.export, each compared with the checkpoint.",
        "raydistill.stages.export:export",
        takes=("prepare", "generate", "distill", "evaluate"),
        settings=("export",),
        directories=_directory("export"),
        needs_ray=lambda config: False,
    ),
)


def stage_named(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def _needed(until: str | None) -> set[str]:
    """The names of `until` and the stages that it needs; all stages for None."""
    if until is None:
        return {stage.name for stage in STAGES}
    return {until}.union(*(_needed(name) for name in stage_named(until).takes))


@dataclass(frozen=True)
class Work:
    """The work of a command: its stages, their directories, and the stages that are not done."""

    listing: Listing
    prepared: StageDirectory
    directories: dict[
        str, list[StageDirectory] | None
    ]  # by stage, in order; None: not known until the earlier stages are done
    undone: frozenset[str]
    needs_ray: bool


def find_work(config: RunConfig, until: str | None = None) -> Work:
    """List the images and read the workspace, for the stages up to `until` or for all. Until `prepare` is done, all
    later stages count as not done; until fine-tuning is done, all after it."""
    from raydistill.data.sample import samples_from_json
    from raydistill.data.sources.listing import list_images
    from raydistill.identity import fine_tune_directory, fine_tunes, prepare_directory, tuned
    from raydistill.storage.directory import workspace_root
    from raydistill.storage.reachable import refuse_unreachable

    refuse_unreachable(workspace_root(config), "workspace")
    listing = list_images(config.images)
    prepared = prepare_directory(config, listing)
    needed, done = _needed(until), prepared.done()
    wanted = [stage for stage in STAGES if stage.name in needed and stage.wanted(config)]
    directories: dict[str, list[StageDirectory] | None] = {stage.name: None for stage in wanted}
    undone = set(directories)
    if done is not None:
        samples = samples_from_json(done)
        later = tuned(config, samples)
        if later is not None:
            directories = {stage.name: list(stage.directories(later, samples)) for stage in wanted}
            undone = {name for name, made in directories.items() if made and any(d.done() is None for d in made)}
        if "adapt" in directories and fine_tunes(config):
            directories["adapt"] = [fine_tune_directory(config, samples), *(directories["adapt"] or [])]
        undone.discard("prepare")
    directories["prepare"] = [prepared]
    needs_ray = any(stage.name in undone and stage.needs_ray(config) for stage in wanted)
    return Work(listing, prepared, directories, frozenset(undone), needs_ray)

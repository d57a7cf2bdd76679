"""generate: make images with a diffusion pipeline.

The run's seed, the class, the index and the attempt decide an image, so every run, with any number of actors, makes the
same images. All images, kept or not, lie by class in `<workspace>/generated/`, in files committed by rename. The stage
selects among them and writes the kept ones in sample shards, with a ledger of every attempt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from pyarrow import parquet as pq
from ray.data import ActorPoolStrategy

from raydistill.cluster.plan import Plan
from raydistill.cluster.restarts import new_tries
from raydistill.config import RunConfig
from raydistill.data.sample import SampleSet, seeded_rank
from raydistill.engine.precision import described
from raydistill.errors import StageError
from raydistill.execution import Execution
from raydistill.generation.contact_sheets import draw_sheets
from raydistill.generation.features import show
from raydistill.generation.forecast import wanted_images
from raydistill.generation.made import Key, Made, look_at
from raydistill.generation.pipelines import PipelineFacts, inspect_pipeline
from raydistill.generation.recipes import GeneratorActor, Recipe, made_files, make_recipes, plan_units
from raydistill.generation.selection import Chosen, HeldOut, Judge, choose
from raydistill.generation.shards import write_shards
from raydistill.identity import generate_directory, pipeline_pin
from raydistill.results import GeneratedImages
from raydistill.runtime.progress import Progress
from raydistill.storage.directory import StageDirectory, refuse_small_disk, workspace_root
from raydistill.storage.state import result_of
from raydistill.storage.tables import read_table, rows_of


def generated_from_json(done: Mapping[str, Any], path: str) -> GeneratedImages:
    """The result of a finished `generate` in the directory `path`."""
    samples = done.get("samples")
    moved = {**samples, "path": path} if isinstance(samples, dict) else samples
    whole = {name: value for name, value in done.items() if name != "path"}
    return result_of({**whole, "samples": moved}, path, GeneratedImages)


def generate_images(
    config: RunConfig, samples: SampleSet, head: str | None, directory: StageDirectory, plan: Plan, progress: Progress
) -> GeneratedImages:
    """Make the missing images, select, and write the kept images in shards like those of `prepare`.

    `head` is the directory of `adapt`, if the filter uses the teacher. Raises ConfigError before it makes an image;
    StageError: a class has no image left.
    """
    settings = config.generate
    assert settings is not None
    facts = inspect_pipeline(settings)
    recipes = make_recipes(config, samples, facts)
    wanted = wanted_images(settings, samples, facts)
    distance = settings.filter.duplicate_distance
    compared = distance is not None and samples.num_rows("val") + samples.num_rows("test") > 0
    made = dict[Key, Made]()
    _read_new(config, recipes, made, plan, compared)
    _refuse_small_disk(config, made, wanted, facts.side)
    directory.begin()
    for recipe in recipes.values():
        recipe.directory.begin()
    judge = None if head is None or not settings.filter.needs_teacher else Judge(config, head, plan)
    held_out = HeldOut(samples, distance, plan) if distance is not None and compared else None
    with progress.task("generate", sum(wanted.values()), "images") as advance:
        shown, asked = 0, set[Key]()
        while True:
            leaked = held_out.shown_by(made) if held_out else set()
            chosen = choose(settings, wanted, made, leaked, judge.of(made, list(wanted)) if judge else None)
            # New images count when they arrive; the selection subtracts those that it rejects.
            rejected = f"{sum(chosen.rejected.values())} rejected" if chosen.rejected else ""
            advance(len(chosen.kept) - shown, rejected, worked=False)
            shown = len(chosen.kept)
            if not chosen.needed:
                break
            if lost := asked.intersection(chosen.needed):
                where = recipes[min(lost)[0]].directory.path
                raise StageError(
                    f"generate: {len(lost)} new images are missing in {where}; check that every node sees "
                    f"workspace={config.workspace}"
                )
            asked.update(chosen.needed)
            units = plan_units(config, recipes, chosen.needed)
            for made_now in _run_units(config, samples, facts, units, plan):
                advance(int(made_now["images"]))
                progress.again("generate", int(made_now["images_again"]), float(made_now["seconds_again"]))
                shown += int(made_now["images"])
            _read_new(config, recipes, made, plan, compared)
    dtype, words = described(settings.dtype, _pin(config))
    if settings.dtype == "auto":
        progress.line(f"generate  {words}")
    result = _write(config, samples, _Run(facts, wanted, made, chosen), directory, dtype, plan)
    for name, count in result.missing.items():
        progress.line(f"generate  {name!r} lacks {count} of {wanted[name]} images after all attempts")
    return result


def _pin(config: RunConfig) -> str:
    return pipeline_pin(workspace_root(config), config)


def label_weights(config: RunConfig, generated: GeneratedImages) -> dict[str, float] | None:
    """The weight of each kept image's hard label by sample id; None if all are 1."""
    settings = config.generate
    assert settings is not None
    if (settings.task_weight == 1 and not settings.filter.weigh) or not generated.samples.num_rows("train"):
        return None
    schema = pa.schema([("id", pa.string()), ("verdict", pa.string()), ("weight", pa.float64())])
    ledger = rows_of(read_table(f"{generated.samples.path}/ledger.parquet", schema))
    return {r["id"]: settings.task_weight * r["weight"] for r in ledger if r["verdict"] == "kept"}


def _run_units(
    config: RunConfig, samples: SampleSet, facts: PipelineFacts, units: list[dict[str, str]], plan: Plan
) -> Iterator[dict[str, Any]]:
    """Run the pool of generators and, if the teacher judges the images, a teacher on each file that they write."""
    settings = config.generate
    assert settings is not None
    fewest, most = plan.generator_actors
    most = max(1, min(most, len(units)))
    labels = config.cluster.generator_labels or None
    fallback = config.cluster.generator_fallback
    # On CPUs the plan has counted all places. GPU nodes may join later, and the pool then grows.
    begin = min(fewest, most) if plan.generator_gpus else most
    made = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        GeneratorActor,
        fn_constructor_kwargs={"settings": settings, "facts": facts, "samples": samples, "pin": _pin(config)}
        | {"tries": new_tries()},
        batch_size=1,
        batch_format="numpy",
        compute=ActorPoolStrategy(min_size=min(fewest, most), max_size=most, initial_size=begin),
        num_cpus=plan.generator_cpus,
        num_gpus=plan.generator_gpus or None,
        label_selector=labels,
        fallback_strategy=None if fallback is None else [{"label_selector": fallback}],
    )
    if config.shows_generated:
        made = show(made, config, plan)
    return iter(made.iter_rows())


def _read_new(
    config: RunConfig, recipes: Mapping[str, Recipe], made: dict[Key, Made], plan: Plan, compared: bool
) -> None:
    """Add what is known of the images in new files, and of their working images if these are compared with others."""
    known = {one.file for one in made.values()}
    files = {file: name for name, recipe in recipes.items() for file in made_files(recipe) if file not in known}
    made.update(look_at(files, config.images if compared else None, plan))


def _refuse_small_disk(config: RunConfig, made: Iterable[Key], wanted: Mapping[str, int], side: int) -> None:
    """Raises ConfigError if the images, counted as uncompressed pixels, may not fit on the disk."""
    there = Counter(name for name, _, _ in made)
    count = sum(max(number - there[name], 0) for name, number in wanted.items())
    what = f"generate: {count:,} images of {side} pixels"
    refuse_small_disk(config, what, count * side**2 * 3, "lower generate.ratio")


@dataclass(frozen=True)
class _Run:
    """What the config wants of a pipeline, what the pipeline made, and the selection."""

    facts: PipelineFacts
    wanted: dict[str, int]
    made: Mapping[Key, Made]
    chosen: Chosen


def _write(
    config: RunConfig, samples: SampleSet, run: _Run, directory: StageDirectory, dtype: str, plan: Plan
) -> GeneratedImages:
    settings, made, chosen = config.generate, run.made, run.chosen
    assert settings is not None
    kept = Counter(name for name, _, _ in chosen.kept)
    sink = pa.BufferOutputStream()
    pq.write_table(_ledger(made, chosen), sink)
    directory.write("ledger.parquet", sink.getvalue().to_pybytes())
    draw_sheets(directory, list(run.wanted), made, chosen, config.images)
    if nothing := [name for name, count in run.wanted.items() if count and not kept[name]]:
        reasons = Counter(v for (name, _, _), v in chosen.verdicts.items() if name in nothing)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise StageError(
            f"generate: no image of {', '.join(map(repr, nothing[:5]))} was kept ({why}); loosen generate.filter, "
            f"change the prompts, or raise generate.attempts. The sheets in {directory.path} show the rejected images; "
            "the next run reuses them"
        )
    order = sorted(run.chosen.kept, key=lambda key: seeded_rank(config.seed, "order", made[key].id))  # classes mixed
    number = {name: k for k, name in enumerate(samples.classes)}
    sizes = write_shards(directory.path, [(made[key], number.get(key[0])) for key in order], config.images, plan)
    ids = [made[key].id for key in order]
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
    generated = SampleSet(
        path=directory.path,
        classes=samples.classes,
        size=config.images.size,
        shards={"train": tuple(sizes)},
        num_labelled={"train": 0 if run.facts.kind == "none" else len(ids)},
        num_refused=sum(chosen.rejected.values()),
        ids={"train": digest},
        labels={"train": digest},  # the class of an image is known from its prompt
        store=config.images.store,
    )
    result = GeneratedImages(
        samples=generated,
        wanted=dict(run.wanted),
        kept={name: kept[name] for name in run.wanted},
        missing=chosen.missing,
        rejected=dict(chosen.rejected),
        actor_seconds=sum(made[key].seconds for key in chosen.verdicts),
    )
    about = {"pipeline": dataclasses.asdict(run.facts), "settings": settings.model_dump(mode="json"), "dtype": dtype}
    directory.write_json("generate.json", about)
    done = dataclasses.asdict(result)
    del done["samples"]["path"]
    directory.finish(done)
    return result


def _ledger(made: Mapping[Key, Made], chosen: Chosen) -> pa.Table:
    """A row for each image that was checked, with its verdict."""
    kinds = {"file": pa.string(), "id": pa.string(), "seed": pa.int64(), "prompt": pa.string(), "source": pa.string(),
             "contrast": pa.float64(), "seconds": pa.float64()}  # fmt: skip
    keys, rows = list(chosen.verdicts), [made[key] for key in chosen.verdicts]
    return pa.table(
        {
            "class": pa.array([name for name, _, _ in keys], pa.string()),
            "index": pa.array([index for _, index, _ in keys], pa.int64()),
            "attempt": pa.array([attempt for _, _, attempt in keys], pa.int64()),
            "verdict": pa.array(chosen.verdicts.values(), pa.string()),
            "weight": pa.array([chosen.kept.get(key, 0.0) for key in keys], pa.float64()),
            **{name: pa.array([getattr(one, name) for one in rows], kind) for name, kind in kinds.items()},
        }
    )


def generate(execution: Execution) -> None:
    config, samples, outcome = execution.config, execution.samples, execution.outcome
    directory = generate_directory(config, samples)
    head = None if outcome.adapted is None else outcome.adapted.path

    def work(_: Any) -> None:
        generate_images(config, samples, head, directory, execution.plan(), execution.progress)

    generated = outcome.generated = generated_from_json(execution.result(directory, work), directory.path)
    kept, rejected = sum(generated.kept.values()), sum(generated.rejected.values())
    execution.progress.line(f"generated: {kept} images kept, {rejected} rejected; see {directory.path}/sheet-*.png")
    if "://" not in directory.path:  # log the sheets, not the images
        shown = [str(p) for p in sorted(Path(directory.path).glob("*")) if p.suffix in (".png", ".json")]
        execution.tracker.parent.files([*shown, f"{directory.path}/ledger.parquet"], "generate")

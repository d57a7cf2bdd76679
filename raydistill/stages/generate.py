"""generate: images from a diffusion pipeline, the same ones however often and by however many actors they are made.

Every image is a function of the run's seed, its class, its index and the attempt. What was made lies by class in
`<workspace>/generated/`, kept or not, in files committed by rename; the stage itself chooses among them and writes what
is kept in sample shards, with a ledger of everything that was tried.

Shapes: S pixels, N images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from PIL import Image
from pyarrow import parquet as pq
from ray.data import ActorPoolStrategy

from raydistill.cluster.plan import Plan
from raydistill.cluster.restarts import new_tries
from raydistill.config import Generate, RunConfig
from raydistill.data.decode import encode, pixels
from raydistill.data.prompts import class_prompts, refuse_unknown
from raydistill.data.sample import SampleSet, encode_shard, samples_from_json, seeded_rank, shard_name
from raydistill.data.sources.listing import list_images
from raydistill.data.targets import labels_of, read_samples
from raydistill.errors import ConfigError, StageError
from raydistill.execution import Execution
from raydistill.generation.features import show, working_image
from raydistill.generation.pipelines import PipelineFacts, check_steps, class_numbers, inspect_pipeline, new_scheduler
from raydistill.generation.recipes import (
    MADE,
    NO_CLASS,
    GeneratorActor,
    Key,
    Made,
    Recipe,
    make_recipes,
    plan_units,
    read_made,
)
from raydistill.generation.selection import Chosen, HeldOut, Judge, choose
from raydistill.identity import generate_directory, prepare_directory
from raydistill.pages.figures import contact_sheet
from raydistill.results import GeneratedImages
from raydistill.runtime.progress import Progress
from raydistill.storage.directory import StageDirectory, refuse_small_disk
from raydistill.storage.state import result_of
from raydistill.storage.tables import read_table, rows_of, values

# On one contact sheet, of kept and of rejected images each; and on all sheets together, where classes are many.
_MOST_PICTURES, _FEWEST_PICTURES, _PICTURES_IN_ALL = 24, 4, 2400


def generated_from_json(done: Mapping[str, Any], path: str) -> GeneratedImages:
    """The result of a finished `generate`, which lies in the directory `path`."""
    samples = done.get("samples")
    moved = {**samples, "path": path} if isinstance(samples, dict) else samples
    whole = {name: value for name, value in done.items() if name != "path"}
    return result_of({**whole, "samples": moved}, path, GeneratedImages)


def generate_images(
    config: RunConfig, samples: SampleSet, head: str | None, directory: StageDirectory, plan: Plan, progress: Progress
) -> GeneratedImages:
    """Make what is wanted and not there, choose, and write the chosen images in shards like `prepare`'s.

    `head` is the directory of `adapt`, where the filter asks the teacher. Raises ConfigError before anything is made;
    StageError where a class is left without a single image.
    """
    settings = config.generate
    assert settings is not None
    facts = inspect_pipeline(settings)
    recipes = make_recipes(config, samples, facts)
    wanted = wanted_images(settings, samples, facts)
    _refuse_small_disk(config, recipes, wanted, facts.side)
    directory.begin()
    for recipe in recipes.values():
        recipe.directory.begin()
    judge = None if head is None or not settings.filter.needs_teacher else Judge(config, head)
    distance = settings.filter.duplicate_distance
    held_out = None if distance is None else HeldOut(samples, config.images, distance)
    with progress.task("generate", sum(wanted.values()), "images") as advance:
        shown, asked = 0, set[Key]()
        while True:
            made = {name: read_made(recipe) for name, recipe in recipes.items()}
            leaked = held_out.shown_by(made) if held_out else set()
            chosen = choose(settings, wanted, made, leaked, judge.of(made) if judge else None)
            # What was made just now counts as it comes; the choice takes back what it rejects.
            rejected = f"{sum(chosen.rejected.values())} rejected" if chosen.rejected else ""
            advance(len(chosen.kept) - shown, rejected, worked=False)
            shown = len(chosen.kept)
            if not chosen.needed:
                break
            if lost := asked.intersection(chosen.needed):
                where = recipes[min(lost)[0]].directory.path
                raise StageError(
                    f"generate: {len(lost)} images were made and are not to be found in {where}; does every node see "
                    f"workspace={config.workspace}?"
                )
            asked.update(chosen.needed)
            units = plan_units(config, recipes, chosen.needed)
            for made_now in _run_units(config, samples, facts, units, plan):
                advance(int(made_now["images"]))
                progress.again("generate", int(made_now["images_again"]), float(made_now["seconds_again"]))
                shown += int(made_now["images"])
    result = _write(config, samples, wanted, made, chosen, facts, directory)
    for name, count in result.missing.items():
        progress.line(f"generate  {count} of {wanted[name]} images of {name!r} are missing after all attempts")
    return result


def check_generate(config: RunConfig, classes: Sequence[str]) -> None:
    """Refuse what cannot work before any stage starts. Raises ConfigError."""
    settings = config.generate
    assert settings is not None
    facts, cluster = inspect_pipeline(settings), config.cluster
    if cluster.address is None and cluster.generator_labels and cluster.generator_fallback != {}:
        raise ConfigError(
            f"cluster.generator_labels={cluster.generator_labels} would be waited for without end: a cluster of this "
            "machine alone has no labels; set it to null, or cluster.generator_fallback={} to do without them, or "
            "join a cluster with cluster.address"
        )
    by_class: dict[str, Mapping[str, object]] = {
        "generate.overrides": settings.overrides,
        "generate.class_ids": settings.class_ids or {},
        "generate.filter.class_confidence": settings.filter.class_confidence,
    }
    for key, given in by_class.items():
        refuse_unknown(given, classes, key)
    if facts.kind == "none":
        if settings.balance or settings.overrides:
            key = "balance" if settings.balance else "overrides"
            raise ConfigError(
                f"generate.{key} goes by class, and generate.pipeline={settings.pipeline} is unconditional, so its "
                "images have none; leave it out, and say how many there shall be in generate.per_class"
            )
        if settings.filter.needs_teacher:
            raise ConfigError(
                f"generate.pipeline={settings.pipeline} is unconditional, so its images have no class for the teacher "
                "to confirm; leave confidence, agreement and weigh out of generate.filter"
            )
        if not config.loss.needs_teacher:
            raise ConfigError(
                f"generate.pipeline={settings.pipeline} is unconditional, so only a teacher can speak for its images, "
                "and no term of the loss needs one"
            )
    class_numbers(settings, facts, classes)
    check_steps(settings, facts, classes if facts.kind != "none" else (NO_CLASS,))
    if facts.kind in ("text", "image"):
        class_prompts(settings, classes)
    if settings.scheduler is not None:
        from diffusers import DDIMScheduler

        new_scheduler(settings.scheduler, DDIMScheduler())


def forecast(config: RunConfig) -> Iterator[str]:
    """What `generate` would make, line by line: every prompt, the counts by class, and the cost.

    Raises ConfigError where something does not fit, or where `prepare` has not counted the images yet.
    """
    settings = config.generate
    if settings is None:
        raise ConfigError("generate is null, so no image would be made; set generate.pipeline")
    listing = list_images(config.images)
    check_generate(config, listing.classes)
    done = prepare_directory(config, listing).done()
    if done is None:
        raise ConfigError("how many images there are is known once they are prepared; run `raydistill prepare` first")
    samples, facts = samples_from_json(done), inspect_pipeline(settings)
    recipes, wanted = make_recipes(config, samples, facts), wanted_images(settings, samples, facts)
    yield f"pipeline: {facts.pipeline} ({facts.kind}), licence: {facts.licence}"
    passes, missing, seconds = 0, 0, []
    for name, recipe in recipes.items():
        made = read_made(recipe)
        there = sum((index, 0) in made for index in range(wanted[name]))
        seconds += [one.seconds for one in made.values()]
        missing += wanted[name] - there
        passes += (wanted[name] - there) * recipe.steps
        yield f"{name or 'no class'}: {wanted[name]} images, {there} of them made before, {recipe.steps} steps each"
        for sentence, weight in zip(*dataclasses.astuple(recipe.prompts), strict=True) if recipe.prompts else ():
            yield f"    {weight:.0%}  {sentence}"
    yield f"to make: {missing:,} images, {passes:,} steps of the pipeline's network, and what the filter rejects again"
    if seconds:
        each = sum(seconds) / len(seconds)
        yield f"an image took {each:.2f} s of one actor so far, so {missing * each:,.0f} s of actors in all"
    else:
        yield "nothing was made yet, so seconds are not known; generate.per_class=1 tells for little"


def label_weights(config: RunConfig, generated: GeneratedImages) -> dict[str, float] | None:
    """The weight of each kept image's hard label by sample id; None where all are 1."""
    settings = config.generate
    assert settings is not None
    if (settings.task_weight == 1 and not settings.filter.weigh) or not generated.samples.num_rows("train"):
        return None
    schema = pa.schema([("id", pa.string()), ("verdict", pa.string()), ("weight", pa.float64())])
    ledger = rows_of(read_table(f"{generated.samples.path}/ledger.parquet", schema))
    return {r["id"]: settings.task_weight * r["weight"] for r in ledger if r["verdict"] == "kept"}


def wanted_images(settings: Generate, samples: SampleSet, facts: PipelineFacts) -> dict[str, int]:
    """How many images of each class, from the labelled train images."""
    counts = Counter(dict.fromkeys(range(len(samples.classes)), 0))
    for shard in range(len(samples.shards["train"])):
        labels = labels_of(read_samples(samples, "train", shard))
        counts.update(int(label) for label in labels if label >= 0)
    most = max(counts.values())
    if facts.kind == "none":
        total = sum(counts.values())
        return {NO_CLASS: settings.per_class or round(settings.ratio * total)}
    if settings.per_class is not None:
        return dict.fromkeys(samples.classes, settings.per_class)
    if settings.balance:
        return {name: most - counts[k] for k, name in enumerate(samples.classes)}
    return {name: round(settings.ratio * counts[k]) for k, name in enumerate(samples.classes)}


def _run_units(
    config: RunConfig,
    samples: SampleSet,
    facts: PipelineFacts,
    units: list[dict[str, str]],
    plan: Plan,
) -> Iterator[dict[str, Any]]:
    """Through the pool of generators and, where the teacher is to see them, on through a teacher as files come."""
    settings = config.generate
    assert settings is not None
    fewest, most = plan.generator_actors
    most = max(1, min(most, len(units)))
    labels = config.cluster.generator_labels or None
    fallback = config.cluster.generator_fallback
    # On CPUs the plan counted all of them; on GPUs more may come, and the pool grows as they do.
    begin = min(fewest, most) if plan.generator_gpus else most
    made = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        GeneratorActor,
        fn_constructor_kwargs={"settings": settings, "facts": facts, "samples": samples, "tries": new_tries()},
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


def _refuse_small_disk(config: RunConfig, recipes: Mapping[str, Recipe], wanted: Mapping[str, int], side: int) -> None:
    """Raises ConfigError before anything is made that may not fit, were it no smaller than its pixels."""
    count = sum(max(wanted[name] - len(read_made(recipe)), 0) for name, recipe in recipes.items())
    what = f"generate: {count:,} images of {side} pixels"
    refuse_small_disk(config, what, count * side**2 * 3, "lower generate.ratio")


def _write(
    config: RunConfig,
    samples: SampleSet,
    wanted: dict[str, int],
    made: Mapping[str, Mapping[tuple[int, int], Made]],
    chosen: Chosen,
    facts: PipelineFacts,
    directory: StageDirectory,
) -> GeneratedImages:
    kept = Counter(name for name, _, _ in chosen.kept)
    ledger = [
        {"class": key[0], "index": key[1], "attempt": key[2], "verdict": verdict, "weight": chosen.kept.get(key, 0.0)}
        | {k: v for k, v in dataclasses.asdict(made[key[0]][key[1:]]).items() if k not in ("hash", "reason", "row")}
        for key, verdict in chosen.verdicts.items()
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ledger), sink)
    directory.write("ledger.parquet", sink.getvalue().to_pybytes())
    pictures = _pictures(config, made, chosen)
    _draw_sheets(directory, wanted, made, chosen, pictures)
    if nothing := [name for name, count in wanted.items() if count and not kept[name]]:
        reasons = Counter(v for (name, _, _), v in chosen.verdicts.items() if name in nothing)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise StageError(
            f"generate: not one image of {', '.join(map(repr, nothing[:5]))} was kept ({why}); loosen generate.filter, "
            f"change the prompts, or raise generate.attempts. Look at the sheets in {directory.path}; what was made "
            "stays and is not made again"
        )
    sizes, ids = _write_shards(config, samples, made, chosen, pictures, directory)
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
    generated = SampleSet(
        path=directory.path,
        classes=samples.classes,
        size=config.images.size,
        shards={"train": tuple(sizes)},
        num_labelled={"train": 0 if facts.kind == "none" else len(ids)},
        num_refused=sum(chosen.rejected.values()),
        ids={"train": digest},
        labels={"train": digest},  # an image was made for its class
    )
    result = GeneratedImages(
        generated,
        dict(wanted),
        {name: kept[name] for name in wanted},
        chosen.missing,
        dict(chosen.rejected),
        sum(made[name][index, attempt].seconds for name, index, attempt in chosen.verdicts),
    )
    settings = config.generate
    assert settings is not None
    directory.write_json(
        "generate.json", {"pipeline": dataclasses.asdict(facts), "settings": settings.model_dump(mode="json")}
    )
    done = dataclasses.asdict(result)
    del done["samples"]["path"]
    directory.finish(done)
    return result


def _write_shards(
    config: RunConfig,
    samples: SampleSet,
    made: Mapping[str, Mapping[tuple[int, int], Made]],
    chosen: Chosen,
    pictures: Mapping[Key, bytes],
    directory: StageDirectory,
) -> tuple[list[int], list[str]]:
    """The rows of each shard and the ids of all rows, in an order that mixes the classes."""
    order = sorted(chosen.kept, key=lambda key: seeded_rank(config.seed, "order", made[key[0]][key[1:]].id))
    number = {name: k for k, name in enumerate(samples.classes)}
    sizes, ids, size = [], [], config.images.rows_per_shard
    for first in range(0, len(order), size):
        keys = order[first : first + size]
        ids += (own := [made[key[0]][key[1:]].id for key in keys])
        table = pa.table(
            {
                "sample_id": own,
                "image": [pictures[key] for key in keys],
                "label": pa.array([number.get(key[0]) for key in keys], pa.int32()),
                "source": ["generated"] * len(keys),
                "split": ["train"] * len(keys),
            }
        )
        directory.write(f"{shard_name('train', first // size)}.parquet", encode_shard(table))
        sizes.append(len(keys))
    return sizes, ids


def _pictures(
    config: RunConfig, made: Mapping[str, Mapping[tuple[int, int], Made]], chosen: Chosen
) -> dict[Key, bytes]:
    """Working images of what was kept, each file read once."""
    by_file: dict[str, list[Key]] = defaultdict(list)
    for key in chosen.kept:
        by_file[made[key[0]][key[1:]].file].append(key)
    found = {}
    for file, keys in by_file.items():
        images = _images_in(file)
        for key in keys:
            found[key] = encode(working_image(images[made[key[0]][key[1:]].row], config.images))
    return found


def _draw_sheets(
    directory: StageDirectory,
    wanted: Mapping[str, int],
    made: Mapping[str, Mapping[tuple[int, int], Made]],
    chosen: Chosen,
    pictures: Mapping[Key, bytes],
) -> None:
    """A contact sheet for each class, kept and rejected with the reason."""
    most = min(max(_PICTURES_IN_ALL // len(wanted), _FEWEST_PICTURES), _MOST_PICTURES)
    kept: dict[str, list[Key]] = defaultdict(list)
    rejected: dict[str, list[Key]] = defaultdict(list)
    for key, verdict in chosen.verdicts.items():
        shown = kept if verdict == "kept" else rejected
        if len(shown[key[0]]) < most:
            shown[key[0]].append(key)
    for number, name in enumerate(wanted):
        good = [Image.fromarray(pixels(pictures[key])) for key in kept[name]]
        raw = _raw_images([made[name][key[1:]] for key in rejected[name]])
        bad = [(image, chosen.verdicts[key]) for key, image in zip(rejected[name], raw, strict=True)]
        if good or bad:
            directory.write(f"sheet-{number:03d}.png", contact_sheet(name or "no class", good, bad))


def _raw_images(wanted: Sequence[Made]) -> list[Image.Image | None]:
    """As the pipeline made them; None where it made none. Each file is read once."""
    images = {file: _images_in(file) for file in {one.file for one in wanted if one.id}}
    return [Image.open(io.BytesIO(images[one.file][one.row])) if one.id else None for one in wanted]


def _images_in(file: str) -> list[Any]:
    """The picture in each row of a file of what was made, None where there is none."""
    return values(read_table(file, pa.schema([MADE.field("image")]))["image"])


def generate(execution: Execution) -> None:
    config, samples, outcome = execution.config, execution.samples, execution.outcome
    directory = generate_directory(config, samples)
    head = None if outcome.adapted is None else outcome.adapted.path

    def work(_: Any) -> None:
        generate_images(config, samples, head, directory, execution.plan(), execution.progress)

    generated = outcome.generated = generated_from_json(execution.result(directory, work), directory.path)
    kept, rejected = sum(generated.kept.values()), sum(generated.rejected.values())
    execution.progress.line(f"generated: {kept} images kept, {rejected} rejected; see {directory.path}/sheet-*.png")
    if "://" not in directory.path:  # what shows the images, not they themselves
        shown = [str(p) for p in sorted(Path(directory.path).glob("*")) if p.suffix in (".png", ".json")]
        execution.tracker.parent.files([*shown, f"{directory.path}/ledger.parquet"], "generate")

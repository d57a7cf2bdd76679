"""Checks before `generate`, and a forecast of its images and cost."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from raydistill.config import Generate, RunConfig
from raydistill.data.prompts import class_prompts, refuse_unknown
from raydistill.data.sample import SampleSet, samples_from_json
from raydistill.data.sources.listing import list_images
from raydistill.data.targets import read_labels
from raydistill.errors import ConfigError
from raydistill.generation.generator import new_scheduler
from raydistill.generation.pipelines import PipelineFacts, check_steps, class_numbers, inspect_pipeline
from raydistill.generation.recipes import NO_CLASS, make_recipes, read_made
from raydistill.identity import prepare_directory


def check_generate(config: RunConfig, classes: Sequence[str]) -> None:
    """Refuse what cannot work before any stage starts. Raises ConfigError."""
    settings = config.generate
    assert settings is not None
    facts, cluster = inspect_pipeline(settings), config.cluster
    if cluster.address is None and cluster.generator_labels and cluster.generator_fallback != {}:
        raise ConfigError(
            f"cluster.generator_labels={cluster.generator_labels} matches no node: a local cluster has no labels; set "
            "it to null, set cluster.generator_fallback={} to run without them, or join a cluster with cluster.address"
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
                f"generate.{key} is by class, and generate.pipeline={settings.pipeline} is unconditional, so its "
                "images have no class; remove it, and set their number in generate.per_class"
            )
        if settings.filter.needs_teacher:
            raise ConfigError(
                f"generate.pipeline={settings.pipeline} is unconditional, so its images have no class for the teacher "
                "to check; remove confidence, agreement and weigh from generate.filter"
            )
        if not config.loss.needs_teacher:
            raise ConfigError(
                f"generate.pipeline={settings.pipeline} is unconditional, so its images have no labels, and no loss "
                "term uses a teacher; set loss.kd_weight or another loss with a teacher"
            )
    class_numbers(settings, facts, classes)
    check_steps(settings, facts, classes if facts.kind != "none" else (NO_CLASS,))
    if facts.kind in ("text", "image"):
        class_prompts(settings, classes)
    if settings.scheduler is not None:
        from diffusers import DDIMScheduler

        new_scheduler(settings.scheduler, DDIMScheduler())


def forecast(config: RunConfig) -> Iterator[str]:
    """Lines about what `generate` would make: every prompt, the counts by class, and the cost.

    Raises ConfigError: settings do not fit, or `prepare` has not counted the images yet.
    """
    settings = config.generate
    if settings is None:
        raise ConfigError("generate is null, so the job generates no images; set generate.pipeline")
    listing = list_images(config.images)
    check_generate(config, listing.classes)
    done = prepare_directory(config, listing).done()
    if done is None:
        raise ConfigError("the number of images is not known yet; run `raydistill prepare` first")
    samples, facts = samples_from_json(done), inspect_pipeline(settings)
    recipes, wanted = make_recipes(config, samples, facts), wanted_images(settings, samples, facts)
    yield f"pipeline: {facts.pipeline} ({facts.kind}), licence: {facts.licence}"
    passes, missing, seconds = 0, 0, []
    for name, recipe in recipes.items():
        made = read_made(recipe)
        there = sum((name, index, 0) in made for index in range(wanted[name]))
        seconds += [one.seconds for one in made.values()]
        missing += wanted[name] - there
        passes += (wanted[name] - there) * recipe.steps
        yield f"{name or 'no class'}: {wanted[name]} images, {there} of them made before, {recipe.steps} steps each"
        for sentence, weight in zip(*dataclasses.astuple(recipe.prompts), strict=True) if recipe.prompts else ():
            yield f"    {weight:.0%}  {sentence}"
    yield f"to make: {missing:,} images, {passes:,} steps of the pipeline's network, plus retries of rejected images"
    if seconds:
        each = sum(seconds) / len(seconds)
        yield f"an image took {each:.2f} s of one actor so far, so all take about {missing * each:,.0f} s of actors"
    else:
        yield "no image was made yet, so the time is unknown; a run with generate.per_class=1 measures it cheaply"


def wanted_images(settings: Generate, samples: SampleSet, facts: PipelineFacts) -> dict[str, int]:
    """The number of images of each class, from the labelled train images."""
    counts = Counter(dict.fromkeys(range(len(samples.classes)), 0))
    for shard in range(len(samples.shards["train"])):
        labels = read_labels(samples, "train", shard)
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

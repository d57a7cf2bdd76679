"""The recipe of each class for `generate`, the units of work, and the actor that makes the images of one.

The run's seed, the class, the index and the attempt decide an image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from PIL import Image
from pyarrow import parquet as pq

from raydistill.cluster.restarts import Restart, trying
from raydistill.config import Generate, RunConfig
from raydistill.data.decode import encode
from raydistill.data.near_duplicates import contrast, difference_hash
from raydistill.data.prompts import ClassPrompts, class_prompts
from raydistill.data.sample import SampleSet, sample_id, working_images
from raydistill.data.targets import labels_of, read_columns, read_samples
from raydistill.errors import ConfigError
from raydistill.generation.generator import Generator, Request
from raydistill.generation.made import FACTS, MADE, Key, Made
from raydistill.generation.measured_dtype import with_dtype
from raydistill.generation.pipelines import PipelineFacts, class_numbers
from raydistill.identity import class_directory, image_settings
from raydistill.storage.directory import StageDirectory
from raydistill.storage.filesystems import exists, write_bytes
from raydistill.storage.tables import read_table, rows_of, values

# The class name of images of an unconditional pipeline.
NO_CLASS = ""


@dataclass(frozen=True)
class Recipe:
    """How to make the images of one class, and their directory."""

    name: str
    directory: StageDirectory
    prompts: ClassPrompts | None
    class_id: int | None
    negative_prompt: str | None
    steps: int
    guidance: float
    sources: tuple[tuple[str, int, int], ...]  # id, shard and row of the train images to start from


def make_recipes(config: RunConfig, samples: SampleSet, facts: PipelineFacts) -> dict[str, Recipe]:
    """The recipe of each class. Raises ConfigError: prompts or class numbers do not fit the data."""
    settings = config.generate
    assert settings is not None
    names = (NO_CLASS,) if facts.kind == "none" else samples.classes
    ids = class_numbers(settings, facts, names)
    prompts: Mapping[str, ClassPrompts] = class_prompts(settings, names) if facts.kind in ("text", "image") else {}
    sources = _sources(samples) if facts.kind == "image" else {}
    recipes = {}
    for name in names:
        own = settings.prompt_settings(name)
        assert own.steps is not None
        assert own.guidance is not None
        identity = {
            "class": name,
            "prompts": dataclasses.asdict(prompts[name]) if name in prompts else None,
            "class_id": ids[name],
            "negative_prompt": own.negative_prompt if name in prompts else None,
            "steps": own.steps,
            "guidance": own.guidance,
            "settings": settings.model_dump(include={"scheduler", "strength", "size", "dtype", "safety_checker"}),
            "sources": [i for i, _, _ in sources.get(name, ())],
        }
        if sources:  # these are working images
            identity["images"] = image_settings(config, "size", "fit")
        if facts.commit is not None:  # a branch of the hub can change
            identity["commit"] = facts.commit
        recipes[name] = Recipe(
            name, class_directory(config, identity), prompts.get(name), ids[name], own.negative_prompt, own.steps,
            own.guidance, sources.get(name, ()),
        )  # fmt: skip
    return recipes


def _sources(samples: SampleSet) -> dict[str, tuple[tuple[str, int, int], ...]]:
    found: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    for shard in range(len(samples.shards["train"])):
        table = read_columns(samples, "train", shard, "sample_id", "label")
        for row, (i, label) in enumerate(zip(values(table["sample_id"]), labels_of(table), strict=True)):
            if label >= 0:
                found[samples.classes[label]].append((i, shard, row))
    return {name: tuple(sorted(rows)) for name, rows in found.items()}


def image_seed(seed: int, name: str, index: int, attempt: int) -> int:
    """The seed, of 63 bits, of one image's noise."""
    key = f"{seed}/generate/{index}/{attempt}/{name}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1


def plan_units(config: RunConfig, recipes: Mapping[str, Recipe], needed: Sequence[Key]) -> list[dict[str, str]]:
    """Files to make, one for each unit of work. A dead node costs its open units, and a restart repeats those only."""
    settings = config.generate
    assert settings is not None
    by_class: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, index, attempt in needed:
        by_class[name].append((index, attempt))
    units = []
    for name, items in by_class.items():
        recipe = recipes[name]
        for first in range(0, len(items), settings.batch_size):
            # With the later attempts, so that a failed image needs no second round.
            requests = [
                [_request(config.seed, recipe, index, a) for a in range(attempt, settings.attempts)]
                for index, attempt in items[first : first + settings.batch_size]
            ]
            digest = hashlib.sha256(json.dumps(requests).encode()).hexdigest()[:16]
            unit = {
                "file": f"{recipe.directory.path}/{digest}.parquet",
                "requests": requests,
                "class_id": recipe.class_id,
                "negative_prompt": recipe.negative_prompt,
                "steps": recipe.steps,
                "guidance": recipe.guidance,
            }
            units.append({"unit": json.dumps(unit)})
    return units


def _request(seed: int, recipe: Recipe, index: int, attempt: int) -> dict[str, Any]:
    own = image_seed(seed, recipe.name, index, attempt)
    source = recipe.sources[own % len(recipe.sources)] if recipe.sources else None
    prompt = recipe.prompts.draw(str(own)) if recipe.prompts else ""
    return {"index": index, "attempt": attempt, "seed": own, "prompt": prompt, "source": source}


class GeneratorActor:
    """Holds the pipeline and makes one file in each call. If Ray repeats a call because it lost the actor, the repeat
    skips a written file."""

    def __init__(
        self, settings: Generate, facts: PipelineFacts, samples: SampleSet, pin: str, tries: Any = None
    ) -> None:
        """`pin` is the file of what `generate.dtype: auto` stands for."""
        self._restart, self._tries = Restart(), tries
        on_gpu = torch.cuda.is_available() and bool(ray.get_gpu_ids())
        if not on_gpu:
            torch.set_num_threads(1)  # the number of threads changes the rounding of sums
        self._least_contrast = settings.filter.contrast
        self._refused: ConfigError | None = None
        with trying(tries, self._restart.starts(settings.pipeline)):
            try:
                device = torch.device("cuda" if on_gpu else "cpu")
                self._generator = Generator(with_dtype(settings, facts, device, pin), facts, device)
            except ConfigError as error:
                self._refused = error  # raised by each call: of a constructor's error Ray shows pages of its own code
        self._shard = lru_cache(maxsize=16)(
            lambda shard: working_images(read_samples(samples, "train", shard), samples.size)
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._refused is not None:
            raise self._refused
        unit = json.loads(str(batch["unit"][0]))
        images, missing = len(unit["requests"]), not exists(unit["file"])
        if missing:
            with trying(self._tries, f"{unit['file']} ({images} images to generate)"):
                self._write(unit)
        return {
            "file": np.array([unit["file"]]),
            "images": np.array([images]),
            **self._restart.note(images * missing),
        }

    def _write(self, unit: dict[str, Any]) -> None:
        rows, pending = [], unit["requests"]
        while pending:
            made = self._make(unit, [attempts[0] for attempts in pending])
            rows += made
            faulty = [row["image"] is None or row["contrast"] < self._least_contrast for row in made]
            pending = [a[1:] for a, bad in zip(pending, faulty, strict=True) if bad and len(a) > 1]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=MADE), sink, compression="none")
        write_bytes(unit["file"], sink.getvalue().to_pybytes())

    def _make(self, unit: dict[str, Any], wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
        started = time.monotonic()
        common = {key: unit[key] for key in ("class_id", "negative_prompt", "steps", "guidance")}
        pictures = self._generator.pictures(
            [Request(seed=r["seed"], prompt=r["prompt"], source=self._source(r["source"]), **common) for r in wanted]
        )
        seconds, rows = (time.monotonic() - started) / len(pictures), []
        for r, picture in zip(wanted, pictures, strict=True):
            row = {"index": r["index"], "attempt": r["attempt"], "seed": r["seed"], "prompt": r["prompt"]}
            row |= {"source": r["source"][0] if r["source"] else "", "reason": picture.reason, "seconds": seconds}
            row |= {"image": None, "id": "", "contrast": 0.0, "hash": b""}
            if picture.image is not None:
                image = encode(picture.image)
                row |= {"image": image, "id": sample_id(image), "contrast": contrast(picture.image)}
                row |= {"hash": difference_hash(picture.image)}
            rows.append(row)
        return rows

    def _source(self, source: Sequence[Any] | None) -> Image.Image | None:
        return None if source is None else Image.fromarray(self._shard(source[1])[source[2]])


def read_made(recipe: Recipe) -> dict[Key, Made]:
    """All attempts in a class's directory, without the pixels; an image that was made twice is the same image."""
    found = dict[Key, Made]()
    for path in made_files(recipe):
        for row, r in enumerate(rows_of(read_table(path, FACTS))):
            key = (recipe.name, r.pop("index"), r.pop("attempt"))
            found[key] = Made(file=path, row=row, **r)
    return found


def made_files(recipe: Recipe) -> list[str]:
    """The files in a class's directory."""
    directory = recipe.directory
    if not directory.started():
        return []
    return [f"{directory.path}/{name}" for name in directory.fs.names(directory.place) if name.endswith(".parquet")]

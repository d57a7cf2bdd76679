"""The selection of generated images: the filters, the teacher's probabilities, and their order.

Shapes: C classes, N images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from raydistill.cluster.plan import Plan
from raydistill.cluster.tasks import in_tasks
from raydistill.config import Generate, RunConfig, members
from raydistill.data.near_duplicates import NearHashes, difference_hash
from raydistill.data.sample import SampleSet, working_images
from raydistill.data.targets import read_joined, read_samples
from raydistill.generation.features import teach_whole, whole_features
from raydistill.generation.made import FILES_OF_A_TASK, Key, Made
from raydistill.identity import backbone_name
from raydistill.models.heads import load_head
from raydistill.storage.filesystems import open_filesystem
from raydistill.storage.tables import values

_SHARDS_OF_A_TASK = 4


class Opinion(NamedTuple):
    """The number of the class that the teacher names first, and the probability that it gives the image's own."""

    first: int
    probability: float


@dataclass(frozen=True)
class Chosen:
    """`kept` images in the order of selection, each with the weight of its hard label; `verdicts` of all images that
    were checked; `needed` are the images to make before the selection can end."""

    kept: dict[Key, float]
    verdicts: dict[Key, str]
    rejected: Counter[str]
    needed: list[Key]
    missing: dict[str, int]


def choose(
    settings: Generate,
    wanted: Mapping[str, int],
    made: Mapping[Key, Made],
    leaked: Container[str],
    opinions: Mapping[tuple[str, str], Opinion] | None,
) -> Chosen:
    """Go through the indices in order, all classes at each, and keep the first good attempt at every image.

    So a larger number only adds images. `leaked` holds the sample ids of images that show a val or test image,
    `opinions` those of the teacher by class and sample id.
    """
    names = list(wanted)
    chosen = Chosen({}, {}, Counter(), [], {})
    taken_ids: set[str] = set()
    distance = settings.filter.duplicate_distance
    taken = None if distance is None else {name: NearHashes(distance) for name in names}
    for index in range(max(wanted.values(), default=0)):
        for k, name in enumerate(names):
            if index >= wanted[name]:
                continue
            for attempt in range(settings.attempts):
                key = (name, index, attempt)
                one = made.get(key)
                if one is None:
                    chosen.needed.append(key)
                    break
                near = None if taken is None else taken[name]
                reason = _fault(settings, one, taken_ids, near, leaked)
                weight = 1.0
                if not reason and opinions is not None:
                    reason, weight = _doubt(settings, name, k, opinions[name, one.id])
                chosen.verdicts[key] = reason or "kept"
                if not reason:
                    chosen.kept[key] = weight
                    taken_ids.add(one.id)
                    if near is not None:
                        near.add(one.hash)
                    break
                chosen.rejected[reason] += 1
            else:
                chosen.missing[name] = chosen.missing.get(name, 0) + 1
    return chosen


def _fault(settings: Generate, one: Made, taken_ids: set[str], taken: NearHashes | None, leaked: Container[str]) -> str:
    if one.reason:
        return one.reason
    if one.contrast < settings.filter.contrast:
        return "near-constant"
    if one.id in taken_ids:
        return "duplicate"
    if one.id in leaked:
        return "duplicate of a val or test image"
    if taken is not None and taken.has_near(one.hash):
        return "near duplicate"
    return ""


def _doubt(settings: Generate, name: str, k: int, opinion: Opinion) -> tuple[str, float]:
    least = settings.filter.class_confidence.get(name, settings.filter.confidence)
    if settings.filter.agreement and opinion.first != k:
        return "the teacher names another class", 0.0
    if least is not None and opinion.probability < np.float32(least):  # as it was computed
        return "the teacher is not confident", 0.0
    return "", opinion.probability if settings.filter.weigh else 1.0


class HeldOut:
    """The val and test images, which no generated image may repeat.

    It compares working images, because the hash of a picture depends on its size.
    """

    def __init__(self, samples: SampleSet, distance: int, plan: Plan) -> None:
        shards = [(split, k) for split in ("val", "test") for k in range(len(samples.shards.get(split, ())))]
        units = [{"split": split, "shard": k} for split, k in shards]
        tables = in_tasks(partial(_hashes_of, samples), units, _SHARDS_OF_A_TASK, plan)
        self._real = NearHashes(distance, [one for table in tables for one in values(table["hash"])])
        self._checked, self._shown = set[str](), set[str]()

    def shown_by(self, made: Mapping[Key, Made]) -> set[str]:
        """Sample ids of the images that show one of them. It checks each image once."""
        for one in made.values():
            if one.id and one.id not in self._checked:
                self._checked.add(one.id)
                if self._real.has_near(one.shown):
                    self._shown.add(one.id)
        return self._shown


def _hashes_of(samples: SampleSet, batch: dict[str, np.ndarray]) -> pa.Table:
    hashes = []
    for split, shard in zip(batch["split"], batch["shard"], strict=True):
        images_RHH3 = working_images(read_samples(samples, str(split), int(shard)), samples.size)
        hashes += [difference_hash(Image.fromarray(image)) for image in images_RHH3]
    return pa.table({"hash": pa.array(hashes, pa.binary())})


class Judge:
    """The adapted teacher's opinion of generated images, from features in files beside them."""

    def __init__(self, config: RunConfig, head: str, plan: Plan) -> None:
        self._head, self._plan = head, plan
        self._names = {backbone_name(member): member for member in members(config)}  # of the teacher or a committee
        self._read, self._opinions = set[str](), dict[tuple[str, str], Opinion]()

    def of(self, made: Mapping[Key, Made], names: Sequence[str]) -> Mapping[tuple[str, str], Opinion]:
        """By class and sample id; the classes are in the order of `names`. A pool of teachers computes the features
        that are missing; of few files this process does."""
        class_of = {one.file: key[0] for key, one in made.items() if one.id and one.file not in self._read}
        number, files = {name: k for k, name in enumerate(names)}, sorted(class_of)
        there = set[str]()
        for folder in {file.rpartition("/")[0] for file in files}:
            fs, place = open_filesystem(folder)
            there.update(f"{folder}/{name}" for name in fs.names(place))
        for name, teacher in self._names.items():
            teach_whole(teacher, [file for file in files if whole_features(file, name) not in there], self._plan)
        units = [{"file": file, "number": number[class_of[file]]} for file in files]
        for table in in_tasks(partial(_opinions_of, self._head, [*self._names]), units, FILES_OF_A_TASK, self._plan):
            columns = (values(table[name]) for name in ("id", "number", "first", "probability"))
            for i, k, first, probability in zip(*columns, strict=True):
                self._opinions[names[k], i] = Opinion(first, probability)
        self._read.update(files)
        return self._opinions


def _opinions_of(head: str, teachers: Sequence[str], batch: dict[str, np.ndarray]) -> pa.Table:
    linear, tables = load_head(head), []
    for file, number in zip(batch["file"], batch["number"], strict=True):
        ids, features_1ND = read_joined([whole_features(str(file), name) for name in teachers])
        likely_NC = torch.from_numpy(linear.logits(features_1ND[0])).softmax(dim=1).numpy()
        columns = {"id": pa.array(ids, pa.string()), "number": [int(number)] * len(ids)}
        columns |= {"first": likely_NC.argmax(axis=1), "probability": likely_NC[:, int(number)]}
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)

"""The selection of generated images: the filters, the teacher's probabilities, and their order.

Shapes: C classes, N images.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from raydistill.config import Generate, Images, RunConfig
from raydistill.data.near_duplicates import difference_hash, hash_words
from raydistill.data.sample import SampleSet, sample_id, working_images
from raydistill.data.targets import read_all_targets, read_samples
from raydistill.generation.features import FileTeacher, made_images, whole_features, working_image
from raydistill.generation.recipes import Key, Made
from raydistill.identity import backbone_name, teacher_pin
from raydistill.models.heads import load_head
from raydistill.storage.directory import workspace_root
from raydistill.storage.filesystems import exists


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
    likely: Mapping[str, np.ndarray] | None,
) -> Chosen:
    """Go through the indices in order, all classes at each, and keep the first good attempt at every image.

    So a larger number only adds images. `leaked` holds the sample ids of images that show a val or test image, `likely`
    the teacher's class probabilities by sample id.
    """
    names = list(wanted)
    chosen = Chosen({}, {}, Counter(), [], {})
    taken_ids: set[str] = set()
    taken: dict[str, list[bytes]] = defaultdict(list)
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
                reason = _fault(settings, one, taken_ids, taken[name], leaked)
                weight = 1.0
                if not reason and likely is not None:
                    reason, weight = _doubt(settings, name, k, likely[one.id])
                chosen.verdicts[key] = reason or "kept"
                if not reason:
                    chosen.kept[key] = weight
                    taken_ids.add(one.id)
                    taken[name].append(one.hash)
                    break
                chosen.rejected[reason] += 1
            else:
                chosen.missing[name] = chosen.missing.get(name, 0) + 1
    return chosen


def _fault(settings: Generate, one: Made, taken_ids: set[str], taken: list[bytes], leaked: Container[str]) -> str:
    if one.reason:
        return one.reason
    if one.contrast < settings.filter.contrast:
        return "near-constant"
    if one.id in taken_ids:
        return "duplicate"
    if one.id in leaked:
        return "duplicate of a val or test image"
    distance = settings.filter.duplicate_distance
    if distance is not None and _nearest(one.hash, hash_words(taken)) <= distance:
        return "near duplicate"
    return ""


def _doubt(settings: Generate, name: str, k: int, likely_C: np.ndarray) -> tuple[str, float]:
    least = settings.filter.class_confidence.get(name, settings.filter.confidence)
    if settings.filter.agreement and int(likely_C.argmax()) != k:
        return "the teacher names another class", 0.0
    if least is not None and likely_C[k] < least:
        return "the teacher is not confident", 0.0
    return "", float(likely_C[k]) if settings.filter.weigh else 1.0


def _nearest(one: bytes, others_N4: np.ndarray) -> int:
    if not len(others_N4):
        return 257
    return int(np.bitwise_count(others_N4 ^ np.frombuffer(one, np.uint64)).sum(axis=1).min())


class HeldOut:
    """The val and test images, which no generated image may repeat.

    It compares working images, because the hash of a picture depends on its size.
    """

    def __init__(self, samples: SampleSet, images: Images, distance: int) -> None:
        self._images, self._distance = images, distance
        hashes = []
        for split in ("val", "test"):
            for shard in range(len(samples.shards.get(split, ()))):
                images_RHH3 = working_images(read_samples(samples, split, shard), samples.size)
                hashes += [difference_hash(Image.fromarray(image)) for image in images_RHH3]
        self._real = hash_words(hashes)
        self._read: set[str] = set()
        self._shown: set[str] = set()

    def shown_by(self, made: Mapping[Key, Made]) -> set[str]:
        """Sample ids of the images that show one of them. It checks each file once."""
        files = {one.file for one in made.values() if one.id}
        for file in sorted(files - self._read if len(self._real) else ()):
            for image in made_images(file):
                own = difference_hash(working_image(image, self._images))
                if _nearest(own, self._real) <= self._distance:
                    self._shown.add(sample_id(image))
            self._read.add(file)
        return self._shown


class Judge:
    """The adapted teacher's class probabilities of generated images, from features in files beside them."""

    def __init__(self, config: RunConfig, head: str) -> None:
        self._head, self._config, self._name = load_head(head), config, backbone_name(config)
        self._pin = teacher_pin(workspace_root(config), config)
        self._read: set[str] = set()
        self._likely: dict[str, np.ndarray] = {}

    def of(self, made: Mapping[Key, Made]) -> dict[str, np.ndarray]:
        """Class probabilities by sample id. It computes the features of files that lack them."""
        files = {one.file for one in made.values() if one.id}
        teacher, threads = None, torch.get_num_threads()
        for file in sorted(files - self._read):
            place = whole_features(file, self._name)
            if not exists(place):
                teacher = teacher or FileTeacher(self._config, self._name, self._pin, sees_views=False)
                teacher({"file": np.array([file])})
            ids, features_1ND = read_all_targets(place)
            logits_NC = torch.from_numpy(self._head.logits(features_1ND[0].astype(np.float32)))
            self._likely.update(zip(ids, logits_NC.softmax(dim=1).numpy(), strict=True))
            self._read.add(file)
        torch.set_num_threads(threads)  # TeacherActor set one thread
        return self._likely

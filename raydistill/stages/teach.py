"""teach: the teacher's features of every view, in shards that line up with the sample shards.

Shapes: R rows of a shard, N of them new to the teacher, K views, H working pixels, P parameters of a view, D features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy
from safetensors.numpy import load

from raydistill.config import RunConfig, Teacher, Views
from raydistill.data.decode import pixels
from raydistill.data.known import KnownRows, find_known, read_known
from raydistill.data.sample import SampleSet, shard_name
from raydistill.data.targets import UNLABELLED, encode_targets, read_ids, read_labels, read_samples
from raydistill.data.views import WHOLE_IMAGE, render, stored_views
from raydistill.errors import StageError
from raydistill.infra.artifacts import StageDirectory, refuse_small_disk, taught_before
from raydistill.infra.plan import Plan
from raydistill.infra.progress import Progress
from raydistill.infra.restarts import Restart, new_tries, trying
from raydistill.models.teacher import load_head, load_teacher
from raydistill.storage.filesystems import exists, read_bytes, write_bytes
from raydistill.storage.tables import values


@dataclass(frozen=True)
class SoftTargets:
    """What `teach` leaves behind."""

    path: str
    num_images: int
    num_views: int
    num_features: int


def stream_soft_targets(
    config: RunConfig, samples: SampleSet, head: str, directory: StageDirectory, plan: Plan, progress: Progress
) -> SoftTargets:
    """Run every stored view of the train split through the teacher pool; shards that exist are not made again, nor
    views of images that a smaller or larger set had too.

    `head` is the directory of `adapt`. Raises ConfigError where the disk may be too small.
    """
    assert config.views.per_image != "fresh", "fresh views are not stored"
    directory.begin()
    views, before = config.views.per_image, taught_before(directory)
    known = find_known(before) if before else None
    missing = [n for k, n in enumerate(samples.shards["train"]) if not exists(_file(directory.path, "train", k))]
    refuse_large_targets(config, sum(missing), head)
    width = write_features(config, samples, ("train",), views, directory, plan, progress, "teach", known)
    result = SoftTargets(directory.path, samples.num_rows("train"), views, width)
    directory.finish(asdict(result))
    return result


def refuse_large_targets(config: RunConfig, num_images: int, head: str) -> None:
    """Raises ConfigError where the soft targets of so many images may not fit on the disk."""
    views, width = config.views.per_image, load_head(head).weight_CD.shape[1]
    assert views != "fresh", "fresh views are not stored"
    need = num_images * (views * width * 2 + 16)  # float16, and the image's id
    what = f"teach: {width} features of {views} views of each image"
    refuse_small_disk(config, what, need, "lower views.per_image, choose another workspace")


def write_features(
    config: RunConfig,
    samples: SampleSet,
    splits: Sequence[str],
    num_views: int,
    directory: StageDirectory,
    plan: Plan,
    progress: Progress,
    title: str,
    known: KnownRows | None = None,
) -> int:
    """Features of `num_views` random views of every row or, with 0, of the whole image of the labelled rows; a file for
    each sample shard.

    One Ray Data row is one shard: a task reads and decodes it, an actor of the pool renders, infers and commits the
    file by rename. So a lost actor or node costs its open shards, and a later run makes only what is missing. Views of
    images that are `known` are copied. Returns D.
    """
    rows = {name: count for name, count in _rows_to_do(samples, splits, labelled_only=num_views == 0).items() if count}
    if not rows:  # no image was generated, since none was wanted
        return 0
    missing = [n for n in rows if not exists(_file(directory.path, *n))]
    each = max(num_views, 1)
    total, todo = sum(rows.values()) * each, sum(rows[name] for name in missing) * each
    copied = 0
    with progress.task(title, total, "views", done=total - todo) as advance:
        for written in _pool(config, samples, missing, num_views, directory.path, plan, known) if missing else ():
            found = int(written["copied"]) * each
            advance(found, worked=False)
            advance(int(written["views"]) - found)
            progress.again(title, int(written["images_again"]), float(written["seconds_again"]))
            copied += int(written["copied"])
    if copied:
        progress.line(f"{title:<9} {copied:,} of these images were known: their views were copied, not seen again")
    width: int = load(read_bytes(_file(directory.path, *next(iter(rows)))))["features"].shape[2]
    return width


def _file(path: str, split: str, shard: int) -> str:
    return f"{path}/{shard_name(split, shard)}.safetensors"


def _rows_to_do(samples: SampleSet, splits: Sequence[str], labelled_only: bool) -> dict[tuple[str, int], int]:
    names = [(split, k) for split in splits for k in range(len(samples.shards[split]))]
    if not labelled_only:
        return {(split, k): samples.shards[split][k] for split, k in names}
    return {(split, k): int((read_labels(samples, split, k) != UNLABELLED).sum()) for split, k in names}


def _pool(
    config: RunConfig,
    samples: SampleSet,
    shards: list[tuple[str, int]],
    num_views: int,
    path: str,
    plan: Plan,
    known: KnownRows | None,
) -> Iterator[dict[str, Any]]:
    """What each actor call wrote, as the shards are finished."""
    assert config.teacher is not None
    units = [
        {"split": s, "shard": k, "known": json.dumps({} if known is None else known.find(read_ids(samples, s, k)))}
        for s, k in shards
    ]
    dataset = ray.data.from_items(units, override_num_blocks=len(units))
    tries = new_tries()
    shards_read = dataset.map_batches(
        _LoadShard(samples, config.views, config.seed, num_views, tries),
        batch_size=1,
        batch_format="numpy",
        num_cpus=plan.load_cpus,
    )
    written = shards_read.map_batches(
        ShardTeacher,
        fn_constructor_kwargs={
            "teacher": config.teacher,
            "threads": plan.teacher_threads,
            "path": path,
            "tries": tries,
        },
        batch_size=1,
        batch_format="numpy",
        **teacher_pool(plan, len(shards)),
    )
    return iter(written.iter_rows())


def teacher_pool(plan: Plan, most_useful: int) -> dict[str, Any]:
    """What Ray Data is told of the pool of teacher actors, of which there are no more than are of use."""
    fewest, most = plan.teacher_actors
    most = max(min(most, most_useful), 1)
    pool = ActorPoolStrategy(min_size=min(fewest, most), max_size=most)
    return {"compute": pool, "num_cpus": plan.teacher_cpus, "num_gpus": plan.teacher_gpus or None}


class _LoadShard:
    """A Ray Data task: one sample shard, read and decoded, with the parameters of its views; one row out. Of images
    that are known it has the features instead."""

    def __init__(self, samples: SampleSet, views: Views, seed: int, num_views: int, tries: Any) -> None:
        self._samples, self._views, self._seed, self._num_views = samples, views, seed, num_views
        self._tries = tries

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        split, shard = str(batch["split"][0]), int(batch["shard"][0])
        table = read_samples(self._samples, split, shard)
        if not self._num_views:
            table = table.filter(table["label"].is_valid())
        ids = values(table["sample_id"])
        if self._num_views:
            parameters_KRP = stored_views(self._views, self._seed, ids)
        else:
            parameters_KRP = np.tile(WHOLE_IMAGE, (1, len(ids), 1))
        is_known_R, known_KRD = read_known(json.loads(str(batch["known"][0])), len(ids))
        new_R = np.flatnonzero(~is_known_R)
        with trying(self._tries, f"shard {shard_name(split, shard)} ({len(new_R)} images to decode)"):
            images = [pixels(image) for image in values(table["image"].take(new_R))]
        side = self._samples.size
        return {
            "shard": np.array([shard_name(split, shard)]),
            "sample_ids": np.array([" ".join(ids)]),
            "images": np.reshape(images, (1, len(images), side, side, 3)).astype(np.uint8),
            "parameters": parameters_KRP[None, :, new_R],
            "new": new_R[None],
            "known": known_KRD[None],
        }


class TeacherActor:
    """Holds the teacher for as long as the pool lives. `tries` is the pool's, where Ray runs it."""

    def __init__(self, teacher: Teacher, threads: int, tries: Any = None) -> None:
        self._restart, self._tries = Restart(), tries
        torch.set_num_threads(threads)
        with trying(tries, self._restart.starts(teacher.model)):
            self._backbone, _, _ = load_teacher(teacher)
            self._device = torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")
            # Pixel by pixel, convolutions took little more than half the time on CPUs.
            self._backbone.to(self._device, memory_format=torch.channels_last)
        self._batch_size = teacher.batch_size

    def features(self, images_RHHC: np.ndarray, parameters_RP: np.ndarray) -> np.ndarray:
        """(R, D) float16 features of one view of each image."""
        parts = []
        for first in range(0, len(images_RHHC), self._batch_size):
            rows = slice(first, first + self._batch_size)
            images = torch.from_numpy(np.array(images_RHHC[rows])).to(
                self._device
            )  # a copy: Ray's blocks are read-only
            views = render(images, torch.from_numpy(np.array(parameters_RP[rows])), self._backbone.preprocessing)
            parts.append(self._backbone(views).half().cpu().numpy())
        return np.concatenate(parts)


class ShardTeacher(TeacherActor):
    """Makes one target shard a call. A call that Ray repeats, since its actor was lost once the file was written, finds
    the file and is done."""

    def __init__(self, teacher: Teacher, threads: int, path: str, tries: Any = None) -> None:
        super().__init__(teacher, threads, tries)
        self._path = path

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        name, ids = str(batch["shard"][0]), str(batch["sample_ids"][0]).split()
        images_NHHC, parameters_KNP, new_N = batch["images"][0], batch["parameters"][0], batch["new"][0]
        file = f"{self._path}/{name}.safetensors"
        missing = not exists(file)
        if missing:
            features_KRD = np.array(batch["known"][0])
            with trying(self._tries, f"shard {name} ({len(ids)} images, {ids[0]} the first)"):
                if len(new_N):
                    features_KND = np.stack([self.features(images_NHHC, views_NP) for views_NP in parameters_KNP])
                    refuse_not_finite(features_KND, [ids[row] for row in new_N])
                    if not features_KRD.size:
                        features_KRD = np.empty((len(features_KND), len(ids), features_KND.shape[2]), np.float16)
                    features_KRD[:, new_N] = features_KND
                write_bytes(file, encode_targets(ids, features_KRD))
        return {
            "views": np.array([len(parameters_KNP) * len(ids)]),
            "copied": np.array([len(ids) - len(new_N)]),
            **self._restart.note(len(new_N) * missing),
        }


def fresh_views(
    teacher: Teacher,
    gather: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    units: list[dict[str, int]],
    plan: Plan,
    tries: Any,
) -> ray.data.Dataset:
    """The online path: rows of new views with the teacher's features beside them, in the order of `units`, as one long
    execution in which the teacher actors start once. `gather` turns a unit into its rows."""
    rows = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        gather, batch_size=1, batch_format="numpy", num_cpus=plan.load_cpus
    )
    return rows.map_batches(
        StreamTeacher,
        fn_constructor_kwargs={"teacher": teacher, "threads": plan.teacher_threads, "tries": tries},
        # A unit at a time, or the whole stream would become one task: on CPUs Ray fuses this with the step before,
        # whose rows are units, and would gather `batch_size` of them first. With GPUs it wants a number, and does not
        # fuse.
        batch_size=teacher.batch_size if plan.teacher_gpus else None,
        batch_format="numpy",
        **teacher_pool(plan, len(units)),
    )


class StreamTeacher(TeacherActor):
    """Adds the teacher's features to rows on their way to the trainers."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with trying(self._tries, f"{len(batch['image'])} images, {batch['sample_id'][0]} the first"):
            features_RD = self.features(batch["image"], batch["parameters"])
        refuse_not_finite(features_RD[None], batch["sample_id"].tolist())
        return {**batch, "features": features_RD}


def refuse_not_finite(features_KRD: np.ndarray, ids: Sequence[str]) -> None:
    """Raises StageError naming the first sample whose features are NaN, infinite, or beyond float16."""
    bad_KR = ~np.isfinite(features_KRD).all(axis=2)
    if bad_KR.any():
        row = int(np.argwhere(bad_KR)[0][1])
        raise StageError(
            f"the teacher's features of sample {ids[row]} are not finite as float16 ({int(bad_KR.sum())} of "
            f"{bad_KR.size} views); check the teacher's weights and teacher.size"
        )

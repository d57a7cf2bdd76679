"""One pass of the teacher over sample shards: `adapt` makes a head of it, `teach` soft targets.

Shapes: R rows of a shard, N of them not yet taught, K views, H working pixels, P parameters of a view, D features.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from raydistill.cluster.plan import Plan
from raydistill.cluster.restarts import new_tries, trying
from raydistill.cluster.tasks import in_tasks
from raydistill.config import RunConfig, Teacher, Views
from raydistill.config.section import Precision
from raydistill.data.compact import Projection
from raydistill.data.reuse import KnownRows, read_known
from raydistill.data.sample import SampleSet, shard_name, working_images
from raydistill.data.targets import (
    UNLABELLED,
    encode_targets,
    read_all_targets,
    read_ids,
    read_joined,
    read_labels,
    read_samples,
)
from raydistill.data.views import WHOLE_IMAGE, stored_views
from raydistill.engine.precision import described
from raydistill.engine.teacher_pool import TeacherActor, refuse_not_finite, teacher_pool
from raydistill.identity import teacher_pin
from raydistill.models.heads import load_head
from raydistill.runtime import metrics
from raydistill.runtime.progress import Progress
from raydistill.storage.directory import StageDirectory, workspace_root
from raydistill.storage.filesystems import exists, write_bytes
from raydistill.storage.tables import values

logger = logging.getLogger(__name__)
_FILES_OF_A_TASK = 16  # to join
_FEW_VIEWS = 1024


@dataclass(frozen=True)
class FeaturePass:
    """The input of the teacher: `num_views` random views of every row or, with 0, the whole image of every labelled
    row. It writes one file to `path` for each sample shard. It copies the views of `known` images. With the `head` in a
    directory, it compares answers with those in fp32; `columns` are those of the head that read a member's features.
    With a `projection` it writes compact targets. `shards`: None for all."""

    config: RunConfig
    samples: SampleSet
    splits: Sequence[str]
    num_views: int
    path: str
    known: KnownRows | None = None
    head: str | None = None
    columns: slice | None = None
    projection: Projection | None = None
    shards: tuple[int, ...] | None = None

    @property
    def pin(self) -> str:
        return teacher_pin(workspace_root(self.config), self.config)


class Written(NamedTuple):
    """The width D of features, their precision and, if answers were compared with those in fp32, the share of `equal`
    ones and the largest `difference` of a logit. An actor took `seconds_a_view`; None if no view was new."""

    num_features: int
    precision: Precision
    equal: float | None = None
    difference: float | None = None
    seconds_a_view: float | None = None


def write_features(
    wanted: FeaturePass, title: str, plan: Plan, progress: Progress, left: Collection[str] = ()
) -> Written:
    """Write the teacher's features, except the files that an earlier command `left`.

    One Ray Data row is one shard: a task reads and decodes it, an actor of the pool renders the views, infers and
    commits the file by rename. So a lost actor or node costs its open shards, and a later run makes only the missing.
    """
    teacher = wanted.config.teacher
    assert teacher is not None
    rows = {name: count for name, count in _rows_to_do(wanted).items() if count}
    if not rows:  # the job generates no image
        return Written(0, teacher.precision)
    missing = [n for n in rows if target_file(*n) not in left]
    each = max(wanted.num_views, 1)
    total, todo = sum(rows.values()) * each, sum(rows[name] for name in missing) * each
    copied, overflowed, compared, new, seconds = 0, 0, dict[str, float](), 0, 0.0
    with progress.task(title, total, "views", done=total - todo) as advance:
        for written in _pool(wanted, missing, plan) if missing else ():
            found = int(written["copied"]) * each
            advance(found, worked=False)
            advance(int(written["views"]) - found)
            progress.again(title, int(written["images_again"]), float(written["seconds_again"]))
            copied += int(written["copied"])
            new, seconds = new + int(written["views"]) - found, seconds + float(written["seconds"])
            overflowed += int(written["overflowed"])
            compared = compared or json.loads(written["compared"])
    precision, words = described(teacher.precision, wanted.pin)
    if compared:
        words += "; {equal} of {answers} answers equal, largest difference of a logit {difference:.2g}".format(
            **compared
        )
    if wanted.head is not None and words != "fp32":
        progress.line(f"{title:<9} {words}")
    if overflowed:
        logger.warning(
            "%s: %d views were computed again in fp32, because they, or others of their batch, overflow in %s; "
            "set teacher.precision=bf16 or fp32", title, overflowed, precision,
        )  # fmt: skip
    if copied:
        progress.line(f"{title:<9} copied the views of {copied:,} images that were taught before")
    width = read_all_targets(shard_file(wanted.path, *next(iter(rows))))[1].shape[2]
    of_view = seconds / new if new else None
    if not compared:
        return Written(width, precision, seconds_a_view=of_view)
    return Written(width, precision, compared["equal"] / compared["answers"], compared["difference"], of_view)


def join_features(wanted: FeaturePass, parts: Sequence[str], plan: Plan, left: Collection[str] = ()) -> int:
    """Write the features of a committee's members, whose directories are `parts`, side by side. Gives their width."""
    names = [target_file(*name) for name, count in _rows_to_do(wanted).items() if count]
    missing = [{"file": name} for name in names if name not in left]
    for _ in in_tasks(partial(_join, wanted, parts), missing, _FILES_OF_A_TASK, plan):
        pass
    return read_all_targets(f"{wanted.path}/{names[0]}")[1].shape[2] if names else 0


def _join(wanted: FeaturePass, parts: Sequence[str], batch: dict[str, np.ndarray]) -> pa.Table:
    for name in map(str, batch["file"]):
        ids, features_KRD = read_joined([f"{part}/{name}" for part in parts])
        if wanted.projection is not None:
            features_KRD = wanted.projection.project(features_KRD)
        write_bytes(f"{wanted.path}/{name}", encode_targets(ids, features_KRD, wanted.projection))
    return pa.table({"file": batch["file"].astype(str)})


def precision_of(parts: Iterable[StageDirectory]) -> Precision:
    """The precision of features side by side: of the first that is not in fp32."""
    return next((p for part in parts if (p := (part.done() or {}).get("precision", "fp32")) != "fp32"), "fp32")


def shard_file(path: str, split: str, shard: int) -> str:
    return f"{path}/{target_file(split, shard)}"


def target_file(split: str, shard: int) -> str:
    return f"{shard_name(split, shard)}.safetensors"


def _rows_to_do(wanted: FeaturePass) -> dict[tuple[str, int], int]:
    samples = wanted.samples
    names = [(split, k) for split in wanted.splits for k in wanted.shards or range(len(samples.shards[split]))]
    if wanted.num_views:
        return {(split, k): samples.shards[split][k] for split, k in names}
    return {(split, k): int((read_labels(samples, split, k) != UNLABELLED).sum()) for split, k in names}


def _pool(wanted: FeaturePass, shards: list[tuple[str, int]], plan: Plan) -> Iterator[dict[str, Any]]:
    """What each actor call wrote, as the shards finish. Few views are seen by this process: a pool takes longer to
    start."""
    config, samples, known = wanted.config, wanted.samples, wanted.known
    num_views = sum(_rows_to_do(wanted)[shard] for shard in shards) * max(wanted.num_views, 1)
    is_here = num_views <= _FEW_VIEWS and not plan.teacher_gpus and config.cluster.address is None
    tries = None if is_here else new_tries()
    units = [
        {"split": s, "shard": k, "known": json.dumps({} if known is None else known.find(read_ids(samples, s, k)))}
        for s, k in shards
    ]
    load = _LoadShard(samples, config.views, config.seed, wanted.num_views, tries, wanted.projection)
    teacher: dict[str, Any] = {"teacher": config.teacher, "threads": plan.teacher_threads, "pin": wanted.pin}
    teacher |= {"path": wanted.path, "head": wanted.head, "columns": wanted.columns}
    teacher |= {"tries": tries, "projection": wanted.projection}
    if is_here:
        threads = torch.get_num_threads()
        try:
            shard_teacher = ShardTeacher(**teacher)
            for unit in units:
                written_1 = shard_teacher(load({name: np.array([value]) for name, value in unit.items()}))
                yield {name: value_1[0] for name, value_1 in written_1.items()}
        finally:
            torch.set_num_threads(threads)  # ShardTeacher set its own
        return
    shards_read = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        load, batch_size=1, batch_format="numpy", num_cpus=plan.load_cpus
    )
    written = shards_read.map_batches(
        ShardTeacher,
        fn_constructor_kwargs=teacher,
        batch_size=1,
        batch_format="numpy",
        **teacher_pool(plan, len(shards)),
    )
    yield from written.iter_rows()


class _LoadShard:
    """A Ray Data task: reads and decodes one sample shard, and gives one row with its images and the parameters of its
    views. Known images come as features instead."""

    def __init__(
        self, samples: SampleSet, views: Views, seed: int, num_views: int, tries: Any, projection: Projection | None
    ) -> None:
        self._samples, self._views, self._seed, self._num_views = samples, views, seed, num_views
        self._tries, self._projection = tries, projection

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
        is_known_R, known_KRD = read_known(json.loads(str(batch["known"][0])), len(ids), self._projection)
        new_R = np.flatnonzero(~is_known_R)
        with trying(self._tries, f"shard {shard_name(split, shard)} ({len(new_R)} images to decode)"):
            images_NHH3 = working_images(table.take(new_R), self._samples.size)
        return {
            "shard": np.array([shard_name(split, shard)]),
            "sample_ids": np.array([" ".join(ids)]),
            "images": images_NHH3[None],
            "parameters": parameters_KRP[None, :, new_R],
            "new": new_R[None],
            "known": known_KRD[None],
        }


class ShardTeacher(TeacherActor):
    """Makes one target shard in each call. Ray repeats a call whose actor was lost; the repeat skips a written file."""

    def __init__(
        self, teacher: Teacher, threads: int, pin: str, path: str, head: str | None = None, tries: Any = None,
        projection: Projection | None = None, columns: slice | None = None,
    ) -> None:  # fmt: skip
        super().__init__(teacher, threads, pin, tries)
        self._path, self._projection = path, projection
        self._head = None if head is None else load_head(head).columns(columns)
        self.stage = metrics.stage_of(path)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        name, ids = str(batch["shard"][0]), str(batch["sample_ids"][0]).split()
        images_NHHC, parameters_KNP, new_N = batch["images"][0], batch["parameters"][0], batch["new"][0]
        file = f"{self._path}/{name}.safetensors"
        missing, compared, overflowed, seconds = not exists(file), {}, self.num_overflowed, 0.0
        if missing:
            features_KRD = np.array(batch["known"][0])
            with trying(self._tries, f"shard {name} ({len(ids)} images, {ids[0]} the first)"):
                if len(new_N):
                    started = time.monotonic()
                    features_KND = self.features(images_NHHC, parameters_KNP)
                    seconds = time.monotonic() - started
                    refuse_not_finite(features_KND, [ids[row] for row in new_N])
                    if self._head is not None:  # the first batch of this actor
                        compared = self.compared(self._head, images_NHHC, parameters_KNP, features_KND)
                        self._head = None
                    if self._projection is not None:
                        features_KND = self._projection.project(features_KND)
                        refuse_not_finite(features_KND, [ids[row] for row in new_N])
                    if not features_KRD.size:
                        features_KRD = np.empty((len(features_KND), len(ids), features_KND.shape[2]), np.float16)
                    features_KRD[:, new_N] = features_KND
                write_bytes(file, encode_targets(ids, features_KRD, self._projection))
        return {
            "views": np.array([len(parameters_KNP) * len(ids)]),
            "copied": np.array([len(ids) - len(new_N)]),
            "overflowed": np.array([self.num_overflowed - overflowed]),
            "compared": np.array([json.dumps(compared)]),
            "seconds": np.array([seconds]),
            **self._restart.note(len(new_N) * missing),
        }

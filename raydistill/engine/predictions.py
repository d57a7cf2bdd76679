"""What student and teacher predict of held-out images, a shard at a time: in a pool of actors, or in this process.

Shapes: R rows of a shard, C classes, K classes whose logits are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from raydistill.cluster.plan import Plan
from raydistill.cluster.restarts import new_tries, trying
from raydistill.config import RunConfig
from raydistill.data.sample import SampleSet, shard_name
from raydistill.data.targets import labels_of, read_samples, read_targets
from raydistill.engine.measures import Answers
from raydistill.models.heads import load_head
from raydistill.models.student import read_student, shard_logits
from raydistill.storage.tables import values

# Above this many classes only the logits of the likeliest ones are kept: a file never grows with images x classes.
_MOST_WHOLE, _LIKELIEST = 1000, 100


@dataclass(frozen=True)
class PredictionPass:
    """The labelled images of some splits, for the student in the directory of `distill` and, with a `head` in that of
    `adapt`, for the teacher, whose `features` are in a directory for each split."""

    config: RunConfig
    samples: SampleSet
    splits: tuple[str, ...]
    student: str
    head: str | None
    features: Mapping[str, str]


def predictions(wanted: PredictionPass, plan: Plan | None) -> Iterator[pa.Table]:
    """A table for each shard, in order (see `table_of`), from a pool of student actors; without a plan from this
    process, so that few images do not wait for Ray."""
    units = [
        {"split": split, "shard": shard}
        for split in wanted.splits
        for shard in range(len(wanted.samples.shards[split]))
    ]
    if plan is None:
        predictor = ShardPredictor(wanted)
        for unit in units:
            yield predictor({name: np.array([value]) for name, value in unit.items()})
        return
    shards = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        ShardPredictor,
        fn_constructor_kwargs={"wanted": wanted, "tries": new_tries()},
        batch_size=1,
        batch_format="numpy",
        **_student_pool(plan, len(units)),
    )
    yield from shards.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _student_pool(plan: Plan, most_useful: int) -> dict[str, Any]:
    """Ray Data options of a pool that grows to one actor for each GPU or, without any, for each CPU."""
    most = max(1, min(int(plan.gpus or plan.cpus), most_useful))
    cpus = min(1.0, plan.cpus / most)
    return {
        "compute": ActorPoolStrategy(min_size=1, max_size=most),
        "num_cpus": cpus,
        "num_gpus": 1 if plan.gpus else None,
    }


class ShardPredictor:
    """Holds the student, and gives the predictions for one shard in each call. `tries` are the pool's; None without
    Ray."""

    def __init__(self, wanted: PredictionPass, tries: Any = None) -> None:
        self._wanted, self._tries = wanted, tries
        with trying(tries, f"{wanted.student}, to be loaded by an actor"):
            on_gpu = torch.cuda.is_available() and (tries is None or bool(ray.get_gpu_ids()))
            self._device = torch.device("cuda" if on_gpu else "cpu")
            if tries is not None:
                torch.set_num_threads(1)  # an actor for each core does more than threads inside each operation
            self._student = read_student(wanted.student, wanted.config.student)[0].to(self._device)
            self._head = None if wanted.head is None else load_head(wanted.head)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        wanted, split, shard = self._wanted, str(batch["split"][0]), int(batch["shard"][0])
        samples, size = wanted.samples, wanted.config.evaluate.batch_size
        with trying(
            self._tries, f"shard {shard_name(split, shard)} ({samples.shards[split][shard]} images to predict)"
        ):
            rows = read_samples(samples, split, shard)
            rows = rows.filter(rows["label"].is_valid())
            logits = {"student": shard_logits(self._student, rows, samples.size, self._device, size)}
            if self._head is not None:
                ids = values(rows["sample_id"])
                logits["teacher"] = self._head.logits(read_targets(wanted.features[split], split, shard, ids)[0])
            return table_of(rows.select(["sample_id", "label", "split"]), logits, len(samples.classes))


def table_of(rows: pa.Table, logits: Mapping[str, np.ndarray], num_classes: int) -> pa.Table:
    """Rows with, of student and teacher (null without one), the predicted `_class`, its `_probability`, whether the
    label is `_in_top5`, and the `_logits`. With very many classes these are the highest only, in descending order, and
    `_classes` are theirs; `student_whole` has all then."""
    labels_R = labels_of(rows)
    for who in ("student", "teacher"):
        for name, column in _columns(logits.get(who), labels_R, num_classes).items():
            rows = rows.append_column(f"{who}_{name}", column)
    if num_classes > _MOST_WHOLE:
        rows = rows.append_column("student_whole", _lists(logits["student"], pa.float32()))
    return rows


def kept_columns(table: pa.Table) -> pa.Table:
    """The table without what only measures need."""
    return table.drop_columns([n for n in table.column_names if n.endswith("_in_top5") or n == "student_whole"])


def student_logits(table: pa.Table) -> np.ndarray:
    """(R, C) float32 logits of all classes."""
    name = "student_whole" if "student_whole" in table.column_names else "student_logits"
    return table[name].combine_chunks().flatten().to_numpy().reshape(len(table), -1)


def _columns(logits_RC: np.ndarray | None, labels_R: np.ndarray, num_classes: int) -> dict[str, pa.Array]:
    kinds = {"class": pa.int32(), "probability": pa.float32(), "in_top5": pa.bool_(), "logits": pa.list_(pa.float32())}
    if num_classes > _MOST_WHOLE:
        kinds["classes"] = pa.list_(pa.int32())
    if logits_RC is None:
        return {name: pa.nulls(len(labels_R), kind) for name, kind in kinds.items()}
    answers = Answers.of(logits_RC, labels_R)
    found = {
        "class": pa.array(answers.class_N, pa.int32()),
        "probability": pa.array(answers.probability_N),
        "in_top5": pa.array(answers.in_top5_N),
    }
    if "classes" not in kinds:
        return found | {"logits": _lists(logits_RC, pa.float32())}
    kept = torch.from_numpy(logits_RC).topk(_LIKELIEST, dim=1)
    return found | {
        "logits": _lists(kept.values.numpy(), pa.float32()),
        "classes": _lists(kept.indices.numpy(), pa.int32()),
    }


def _lists(rows_RK: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    ends = np.arange(len(rows_RK) + 1, dtype=np.int32) * rows_RK.shape[1]
    return pa.ListArray.from_arrays(ends, pa.array(rows_RK.ravel(), kind))

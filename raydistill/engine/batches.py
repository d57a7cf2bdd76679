"""The training job that workers receive, and each worker's batches.

Shapes: V images of this worker's share of a batch, H working pixels, P parameters of a view, D features.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from raydistill.config import RunConfig
from raydistill.data.compact import PROJECTION_FILE, read_projection
from raydistill.data.order import Pools, Visits, batch_order
from raydistill.data.sample import SampleSet
from raydistill.data.train_split import Batch, InMemory, OnDevice, Part, Streamed, TrainSplit
from raydistill.data.views import num_parameters
from raydistill.engine.workers import Worker
from raydistill.errors import CheckpointError, ConfigError
from raydistill.models.heads import LinearHead, load_head
from raydistill.runtime.memory import available_bytes
from raydistill.storage.filesystems import write_bytes

_BATCHES_AHEAD = 4
_STEPS_ANNOUNCED = 32  # before a streamed shard is needed, its reading begins
# The least share of labelled images in a batch. With 100 labels in 10,000 images a batch of 64 would have one or none,
# and a noisy cross-entropy: this share raised an EfficientNet-Lite0 from 0.45 to 0.56.
_LEAST_LABELLED_SHARE = 0.33
# The share of a device's or node's free memory for the train split with `cache: auto`, of a node's in all workers
# together, and for streamed shards.
_MEMORY_SHARE = 0.25


@dataclass(frozen=True)
class DistillJob:
    """All that a worker needs, in a form that can be sent to other processes."""

    config: RunConfig
    samples: SampleSet
    path: str
    head: str | None  # the directory of `adapt`; None: no teacher
    targets: str | None  # the directory of `teach`; None: no teacher, or fresh views
    generated: SampleSet | None = None
    generated_targets: str | None = None
    weights: dict[str, float] | None = None  # of the hard labels of generated images, by sample id
    class_weights: tuple[float, ...] | None = None  # of `loss.class_weights`, in the order of the classes

    @property
    def batch_size(self) -> int:
        """At most the size of the real train split. With fewer labels and no teacher, a batch repeats images as other
        views, so that every arm trains on equally many images in equally many steps."""
        return min(self.config.distill.batch_size, self.samples.num_rows("train"))

    @property
    def steps_per_epoch(self) -> int:
        """The steps that show every real train image once, if all are drawn equally often; the last step takes images
        of the next pass. It depends on the number of images only, so all workers agree, and so do runs with and
        without a teacher or generated images."""
        return -(-self.samples.num_rows("train") // self.batch_size)

    @property
    def total_steps(self) -> int:
        return self.config.distill.epochs * self.steps_per_epoch

    @property
    def looks_at_val(self) -> bool:
        """Whether an earlier epoch than the last may ship."""
        return self.config.distill.keep != "last" and self.samples.num_labelled["val"] > 0

    def teacher_head(self) -> LinearHead | None:
        """The head for the features as they are stored."""
        if self.head is None:
            return None
        if self.targets is None or self.config.views.store == "full":
            return load_head(self.head)
        projection = read_projection(self.targets)
        if projection is None:
            raise CheckpointError(
                f"{self.targets}/{PROJECTION_FILE} is missing; delete the folder and run the command again"
            )
        return load_head(self.head).of(projection)

    @property
    def train_split(self) -> TrainSplit:
        parts = [Part(self.samples, self.targets)]
        if self.generated is not None:
            assert self.config.generate is not None
            hard = self.config.generate.task_weight > 0
            parts.append(Part(self.generated, self.generated_targets, self.weights, hard))
        return TrainSplit(tuple(parts), self.config.views, self.config.seed)

    def pools(self) -> Pools:
        """What training draws from, and how often. Without a teacher that is labelled images only."""
        labelled, others, generated = self.train_split.pools()
        share = self.config.distill.labelled_share
        if share is None:
            share = max(labelled.total / (labelled.total + others.total), _LEAST_LABELLED_SHARE)
        if not self.config.loss.needs_teacher or not others.total:
            share = 1.0
        generated_share = 0.0
        if self.config.generate is not None and generated.total:
            num_real = labelled.total if share == 1.0 else labelled.total + others.total
            natural = generated.total / (generated.total + num_real)
            generated_share = natural if self.config.generate.share is None else self.config.generate.share
        return Pools(labelled, others, share, generated, generated_share)

    def order(self, start_step: int) -> Iterator[Visits]:
        """The global batches from `start_step` on."""
        return batch_order(self.pools(), self.batch_size, self.config.seed, start_step)


def worker_batches(job: DistillJob, worker: Worker, step: int) -> Iterator[Batch]:
    """This worker's batches from `step` to the last, from the shards or from Ray's stream of fresh views."""
    left = job.total_steps - step
    if left <= 0:
        return iter(())
    source = read_batches(job, step, worker) if worker.stream is None else stream_batches(job, worker)
    if step == 0 and worker.rank == 0:
        source = _note_first(job, source)
    return itertools.islice(source, left)


def _note_first(job: DistillJob, source: Iterator[Batch]) -> Iterator[Batch]:
    """Record when training began: everything before is fixed cost."""
    first = next(source)
    write_bytes(f"{job.path}/first_batch.json", json.dumps({"time": time.time()}).encode())
    yield first
    yield from source


def stream_batches(job: DistillJob, worker: Worker) -> Iterator[Batch]:
    """Fresh views and their features, from the teacher pool."""
    size = job.batch_size // worker.size
    for rows in worker.stream.iter_batches(batch_size=size, batch_format="numpy", prefetch_batches=2, drop_last=True):
        weights = rows.get("weight")
        yield Batch(rows["image"], rows["parameters"], rows["label"], rows["features"], rows["row"], weights)


def read_batches(job: DistillJob, first_step: int, worker: Worker) -> Iterator[Batch]:
    """This worker's share of every global batch from `first_step` on, prepared a few batches ahead in a thread."""
    split, device = job.train_split, torch.device(worker.device)
    shards = job.pools().shards_of(worker.rank, worker.size, job.batch_size)
    cache = _cache(job, worker, shards)
    on_device = OnDevice(split, device, shards) if cache == "device" else None
    streamed = None
    if cache == "stream":
        streamed = Streamed(split, _MEMORY_SHARE * available_bytes() / worker.workers_on_node)
    source = on_device or streamed or InMemory(split, shards)
    order = (visits.of_worker(worker.rank, worker.size) for visits in job.order(first_step))
    mine = (source.gather(visits) for visits in (order if streamed is None else _announced(order, streamed)))
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(next, mine) for _ in range(_BATCHES_AHEAD))
        try:
            while True:
                batch = ahead.popleft().result()
                ahead.append(pool.submit(next, mine))
                yield on_device.taken(batch) if on_device else batch
        finally:  # the loop has ended
            for future in ahead:
                future.cancel()
            if streamed is not None:
                streamed.close()


def _announced(order: Iterator[Visits], source: Streamed) -> Iterator[Visits]:
    """The same visits, each announced to the source some steps before it comes."""
    coming = deque[Visits]()
    for visits in order:
        source.expect(visits)
        coming.append(visits)
        if len(coming) > _STEPS_ANNOUNCED:
            yield coming.popleft()


def _cache(job: DistillJob, worker: Worker, shards: set[int]) -> str:
    """Where the worker's shards lie. `auto`: on a GPU, in memory if a node's holds those of all its workers, or in
    storage. Raises ConfigError: the device's memory cannot hold them."""
    cache, device = job.config.distill.cache, torch.device(worker.device)
    if cache in ("memory", "stream"):
        return cache
    per_image = 0
    head = job.teacher_head()
    if job.targets is not None and head is not None and job.config.views.per_image != "fresh":
        features = 2 * head.weight_CD.shape[1]  # float16
        per_image = job.config.views.per_image * (features + 4 * num_parameters(job.config.views))
    size = job.train_split.num_bytes(per_image, shards)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if cache == "device" and size > free:
        raise ConfigError(
            f"distill.cache=device: the train split takes {size:,} bytes, and {free:,.0f} are free on {device}; set "
            "distill.cache=auto"
        )
    if cache == "device" or (device.type == "cuda" and size < _MEMORY_SHARE * free):
        return "device"
    return "memory" if size * worker.workers_on_node < _MEMORY_SHARE * available_bytes() else "stream"

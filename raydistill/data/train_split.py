"""The train split: where it is stored, and the batches that the trainer reads from its shards.

Shapes: K views, R rows of a shard, P parameters of a view, D features, V visits, N rows of the split, H pixels.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from raydistill.config import Views
from raydistill.data.device import to_device
from raydistill.data.order import Pool, Visits
from raydistill.data.sample import SampleSet, shard_name, working_images
from raydistill.data.targets import UNLABELLED, labels_of, read_samples, read_views
from raydistill.data.views import stored_views, view_parameters
from raydistill.errors import damaged_file
from raydistill.storage.tables import values

logger = logging.getLogger(__name__)

_READERS = 16  # threads that wait for storage


@dataclass(frozen=True)
class Batch:
    """The data that one worker trains on in one step."""

    images_VHHC: np.ndarray | torch.Tensor  # uint8
    parameters_VP: np.ndarray  # float32
    labels_V: np.ndarray  # int64, UNLABELLED if there is none
    features_VD: np.ndarray | torch.Tensor | None  # float16; None without a teacher
    rows_V: np.ndarray | torch.Tensor  # int64, the index of the image in the train split
    weights_V: np.ndarray | None = None  # float32, of the hard labels; None if all are 1
    places_V: np.ndarray | None = None  # int64, in the global batch; None from Ray's stream

    def arrays(
        self,
    ) -> tuple[np.ndarray | torch.Tensor | None, ...]:  # without the parameters, which `render` takes from the CPU
        return (self.images_VHHC, self.labels_V, self.features_VD, self.rows_V, self.weights_V)


@dataclass(frozen=True)
class Part:
    """Train shards at one path. `targets`: None without a teacher. `weights`: of the hard labels, by sample id; None if
    all are 1."""

    samples: SampleSet
    targets: str | None
    weights: dict[str, float] | None = None
    hard_labels: bool = True  # false: the student does not see labels

    @property
    def num_shards(self) -> int:
        return len(self.samples.shards["train"])


@dataclass(frozen=True)
class TrainSplit:
    """Where the train split is stored, real images before generated ones, and how its views are drawn."""

    parts: tuple[Part, ...]
    views: Views
    seed: int

    @property
    def shard_rows(self) -> list[int]:
        return [rows for part in self.parts for rows in part.samples.shards["train"]]

    def _place(self, index: int) -> tuple[Part, int]:
        for part in self.parts:
            if index < part.num_shards:
                return part, index
            index -= part.num_shards
        raise IndexError(index)

    def shard(self, index: int) -> Shard:
        part, own = self._place(index)
        table = read_samples(part.samples, "train", own)
        ids = values(table["sample_id"])
        weights = None
        if any(p.weights is not None for p in self.parts):
            weights = np.array([1.0 if part.weights is None else part.weights[i] for i in ids], np.float32)
        features, stored = (None, None) if part.targets is None else read_views(part.targets, "train", own, ids)
        labels = labels_of(table)
        if index < len(self._is_labelled) and (labels == UNLABELLED).any() == self._is_labelled[index]:
            path = f"{part.samples.path}/{shard_name('train', own)}.parquet"
            raise damaged_file(path, "images with and without labels are in each other's place")
        if not part.hard_labels:
            labels = np.full(len(ids), UNLABELLED)
        if stored is None and self.views.per_image != "fresh":
            stored = stored_views(self.views, self.seed, ids)
        return Shard(ids, working_images(table, part.samples.size), labels, stored, features, weights)

    def pools(self) -> tuple[Pool, Pool, Pool]:
        """Labelled, other and generated rows. In real shards the labelled rows come first, in shards of their own."""
        is_labelled, rows = self._is_labelled, {k: count for k, count in enumerate(self.shard_rows) if count}
        real = len(is_labelled)
        return (
            Pool({k: count for k, count in rows.items() if k < real and is_labelled[k]}),
            Pool({k: count for k, count in rows.items() if k < real and not is_labelled[k]}, backwards=True),
            Pool({k: count for k, count in rows.items() if k >= real}, backwards=all(is_labelled)),
        )

    @cached_property
    def _is_labelled(self) -> list[bool]:
        """Of each real shard."""
        real = self.parts[0].samples
        return [end <= real.num_labelled["train"] for end in itertools.accumulate(real.shards["train"])]

    def num_bytes(self, feature_bytes: int, shards: Iterable[int]) -> int:
        """Bytes of memory that these shards take."""
        return sum(self.shard_rows[k] for k in shards) * (self.parts[0].samples.size ** 2 * 3 + feature_bytes)

    def view_indices(self, visits: Visits) -> np.ndarray:
        """Stored views are replayed in turn; a fresh view never repeats."""
        return visits.visit if self.views.per_image == "fresh" else visits.visit % self.views.per_image

    def row_numbers(self, visits: Visits) -> np.ndarray:
        """(V,): each visit's row in the whole split."""
        return np.cumsum([0, *self.shard_rows])[visits.shard] + visits.row

    def gather(self, shard: Shard, row_V: np.ndarray, view_V: np.ndarray) -> Gathered:
        """These rows of a shard, as these views."""
        if shard.parameters_KRP is None:
            parameters_VP = view_parameters(self.views, self.seed, [shard.ids[row] for row in row_V], view_V)
        else:
            parameters_VP = shard.parameters_KRP[view_V, row_V]
        features_VD = None if shard.features_KRD is None else shard.features_KRD[view_V, row_V]
        weights_V = None if shard.weights_R is None else shard.weights_R[row_V]
        return shard.images_RHHC[row_V], parameters_VP, shard.labels_R[row_V], features_VD, weights_V


# Images (V, H, H, 3), parameters (V, P), labels (V,), features (V, D) and weights (V,) or None.
Gathered = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]


@dataclass(frozen=True)
class Shard:
    """One shard in memory."""

    ids: list[str]
    images_RHHC: np.ndarray  # uint8
    labels_R: np.ndarray
    parameters_KRP: np.ndarray | None  # of the stored views; None if views are fresh
    features_KRD: np.ndarray | None
    weights_R: np.ndarray | None

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in vars(self).values() if isinstance(array, np.ndarray))


class InMemory:
    """Some shards, or the whole split, for sets that fit."""

    def __init__(
        self,
        split: TrainSplit,
        shards: Iterable[int] | None = None,
        images_NHHC: np.ndarray | torch.Tensor | None = None,
    ) -> None:
        """The images go into `images_NHHC`, if given, which may lie on a device."""
        self._split, rows = split, split.shard_rows
        held = range(len(rows)) if shards is None else sorted(shards)
        images = np.empty(_shape(split, held), np.uint8) if images_NHHC is None else images_NHHC
        parts, first, self._first = list[Shard](), 0, np.full(len(rows), -1)
        for k in held:
            shard = split.shard(k)
            own = shard.images_RHHC
            images[first : first + rows[k]] = own if isinstance(images, np.ndarray) else torch.from_numpy(own.copy())
            parts.append(replace(shard, images_RHHC=own[:0]))  # it would take as much again
            self._first[k] = first
            first += rows[k]

        def joined(name: str, axis: int = 0) -> np.ndarray | None:
            arrays = [array for array in (getattr(shard, name) for shard in parts) if array is not None]
            return np.concatenate(arrays, axis) if arrays else None

        ids, labels = [i for shard in parts for i in shard.ids], np.concatenate([shard.labels_R for shard in parts])
        stored = (joined("parameters_KRP", 1), joined("features_KRD", 1), joined("weights_R"))
        in_memory = images if isinstance(images, np.ndarray) else np.arange(len(ids))
        self._all = Shard(ids, in_memory, labels, *stored)

    def _held_rows(self, visits: Visits) -> np.ndarray:
        """(V,): each visit's row among the rows in memory."""
        first_V = self._first[visits.shard]
        assert (first_V >= 0).all(), "a worker visits the shards of its streams only"
        return first_V + visits.row

    def gather(self, visits: Visits) -> Batch:
        views_V = self._split.view_indices(visits)
        images, parameters, labels, features, weights = self._split.gather(self._all, self._held_rows(visits), views_V)
        rows_V = self._split.row_numbers(visits)
        return Batch(images, parameters, labels, features, rows_V, weights, visits.place)


class OnDevice(InMemory):
    """The whole split in the memory of a device. Batches hold numbers of rows until `taken`, so nothing but these
    numbers, labels and parameters is copied to the device in a step."""

    def __init__(self, split: TrainSplit, device: torch.device, shards: Iterable[int] | None = None) -> None:
        held = range(len(split.shard_rows)) if shards is None else sorted(shards)
        self._images_NHHC = torch.empty(_shape(split, held), dtype=torch.uint8, device=device)
        super().__init__(split, held, self._images_NHHC)
        self._features_ND = None
        if (features_KRD := self._all.features_KRD) is not None:
            self._features_ND = torch.from_numpy(features_KRD).flatten(0, 1).to(device)
            numbers_KR = np.arange(len(self._features_ND)).reshape(features_KRD.shape[:2])
            self._all = replace(self._all, features_KRD=numbers_KR)

    def taken(self, batch: Batch) -> Batch:
        """The batch with images and features."""
        held_V, numbers_V = (self._placed(numbers) for numbers in (batch.images_VHHC, batch.features_VD))
        features_VD = None if self._features_ND is None else self._features_ND.index_select(0, numbers_V)
        return replace(batch, images_VHHC=self._images_NHHC.index_select(0, held_V), features_VD=features_VD)

    def _placed(self, numbers: Any) -> Any:
        return None if numbers is None else to_device(torch.from_numpy(numbers), self._images_NHHC.device)


def _shape(split: TrainSplit, shards: Iterable[int]) -> tuple[int, int, int, int]:
    side = split.parts[0].samples.size
    return sum(split.shard_rows[k] for k in shards), side, side, 3


class Streamed:
    """Each stream's current shard, and those that come next, read ahead by threads, which hides a store's latency.

    Above `most_bytes` of memory nothing is read ahead and the shards that were used least recently are dropped, with a
    warning.
    """

    def __init__(self, split: TrainSplit, most_bytes: float = math.inf) -> None:
        self._split, self._most_bytes, self._bytes, self._said = split, most_bytes, 0, False
        self._readers = ThreadPoolExecutor(_READERS)
        self._coming: dict[int, Future[Shard]] = {}
        self._held: OrderedDict[int, Shard] = OrderedDict()  # the most recently used one last
        self._current: dict[int, int] = {}  # the shard of each stream
        self._largest = 0

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)

    def expect(self, visits: Visits) -> None:
        """Begin to read the shards that these visits need."""
        for k in np.unique(visits.shard).tolist():
            # What is under way is counted as the largest shard so far.
            has_room = self._bytes + (len(self._coming) + 1) * self._largest <= self._most_bytes
            if k not in self._held and k not in self._coming and has_room:
                self._coming[k] = self._readers.submit(self._split.shard, k)

    def _shard(self, number: int) -> Shard:
        shard = self._held.pop(number, None)
        if shard is None:
            coming = self._coming.pop(number, None)
            shard = self._split.shard(number) if coming is None else coming.result()
            self._bytes += shard.num_bytes
            self._largest = max(self._largest, shard.num_bytes)
            while self._held and self._bytes > self._most_bytes:
                self._say_that_memory_is_short()
                self._bytes -= self._held.popitem(last=False)[1].num_bytes
        self._held[number] = shard
        return shard

    def _say_that_memory_is_short(self) -> None:
        if not self._said:
            self._said = True
            logger.warning(
                "%d shards of train images take %s bytes, above the %s available to them, and are read again and "
                "again; lower images.shard_size, or give the workers more memory",
                len(self._held) + 1, f"{self._bytes:,}", f"{self._most_bytes:,.0f}",
            )  # fmt: skip

    def _drop_what_streams_left(self, visits: Visits) -> None:
        self._current |= zip(visits.stream.tolist(), visits.shard.tolist(), strict=True)
        for number in self._held.keys() - self._current.values():
            self._bytes -= self._held.pop(number).num_bytes

    def ids(self, visits: Visits) -> list[str]:
        return [self._shard(int(k)).ids[int(r)] for k, r in zip(visits.shard, visits.row, strict=True)]

    def gather(self, visits: Visits) -> Batch:
        views_V = self._split.view_indices(visits)
        order, ends = np.argsort(visits.shard, kind="stable"), np.flatnonzero(np.diff(np.sort(visits.shard))) + 1
        parts = [
            self._split.gather(self._shard(int(visits.shard[at[0]])), visits.row[at], views_V[at])
            for at in np.split(order, ends)
        ]
        self._drop_what_streams_left(visits)
        back = np.argsort(order)
        images, parameters, labels = (np.concatenate([part[n] for part in parts])[back] for n in range(3))
        features, weights = (
            None if parts[0][n] is None else np.concatenate([part[n] for part in parts])[back] for n in (3, 4)
        )
        return Batch(images, parameters, labels, features, self._split.row_numbers(visits), weights, visits.place)

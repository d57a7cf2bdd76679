"""The train split: where it is stored, and the batches that the trainer reads from its shards.

Shapes: K views, R rows of a shard, P parameters of a view, D features, V visits, N rows of the split, H pixels.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from raydistill.config import Views
from raydistill.data.sample import WINDOW_SHARDS, SampleSet, Visits, working_images
from raydistill.data.targets import UNLABELLED, labels_of, read_labels, read_samples, read_targets
from raydistill.data.views import stored_views, to_device, view_parameters
from raydistill.storage.tables import values

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """The data that one worker trains on in one step."""

    images_VHHC: np.ndarray | torch.Tensor  # uint8
    parameters_VP: np.ndarray  # float32
    labels_V: np.ndarray  # int64, UNLABELLED if there is none
    features_VD: np.ndarray | torch.Tensor | None  # float16; None without a teacher
    rows_V: np.ndarray | torch.Tensor  # int64, the index of the image in the train split
    weights_V: np.ndarray | None = None  # float32, of the hard labels; None if all are 1

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
        features = None if part.targets is None else read_targets(part.targets, "train", own, ids)
        labels = labels_of(table) if part.hard_labels else np.full(len(ids), UNLABELLED)
        stored = None if self.views.per_image == "fresh" else stored_views(self.views, self.seed, ids)
        return Shard(ids, working_images(table, part.samples.size), labels, stored, features, weights)

    def labels(self) -> list[np.ndarray]:
        """The labels of every shard; the order of visits needs nothing else."""
        return [read_labels(part.samples, "train", k) for part in self.parts for k in range(part.num_shards)]

    def num_bytes(self, feature_bytes: int) -> int:
        """Bytes of memory that the whole split takes."""
        return sum(self.shard_rows) * (self.parts[0].samples.size ** 2 * 3 + feature_bytes)

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
    """The whole split, for sets that fit."""

    def __init__(self, split: TrainSplit, images_NHHC: np.ndarray | torch.Tensor | None = None) -> None:
        """The images go into `images_NHHC`, if given, which may lie on a device."""
        self._split = split
        images = np.empty(_shape(split), np.uint8) if images_NHHC is None else images_NHHC
        shards, first = [], 0
        for k, rows in enumerate(split.shard_rows):
            shard = split.shard(k)
            own = shard.images_RHHC
            images[first : first + rows] = own if isinstance(images, np.ndarray) else torch.from_numpy(own.copy())
            shards.append(replace(shard, images_RHHC=own[:0]))  # it would take as much again
            first += rows

        def joined(name: str, axis: int = 0) -> np.ndarray | None:
            parts = [array for array in (getattr(shard, name) for shard in shards) if array is not None]
            return np.concatenate(parts, axis) if parts else None

        ids, labels = [i for shard in shards for i in shard.ids], np.concatenate([shard.labels_R for shard in shards])
        stored = (joined("parameters_KRP", 1), joined("features_KRD", 1), joined("weights_R"))
        held = images if isinstance(images, np.ndarray) else np.empty((len(ids), 0), np.uint8)
        self._all = Shard(ids, held, labels, *stored)

    def gather(self, visits: Visits) -> Batch:
        rows_V = self._split.row_numbers(visits)
        images, parameters, labels, features, weights = self._split.gather(
            self._all, rows_V, self._split.view_indices(visits)
        )
        return Batch(images, parameters, labels, features, rows_V, weights)


class OnDevice(InMemory):
    """The whole split in the memory of a device. Batches hold numbers of rows until `taken`, so nothing but these
    numbers, labels and parameters is copied to the device in a step."""

    def __init__(self, split: TrainSplit, device: torch.device) -> None:
        self._images_NHHC = torch.empty(_shape(split), dtype=torch.uint8, device=device)
        super().__init__(split, self._images_NHHC)
        self._features_ND = None
        if (features_KRD := self._all.features_KRD) is not None:
            self._features_ND = torch.from_numpy(features_KRD).flatten(0, 1).to(device)
            numbers_KR = np.arange(len(self._features_ND)).reshape(features_KRD.shape[:2])
            self._all = replace(self._all, features_KRD=numbers_KR)

    def taken(self, batch: Batch) -> Batch:
        """The batch with images and features."""
        rows_V, numbers_V = (self._placed(numbers) for numbers in (batch.rows_V, batch.features_VD))
        features_VD = None if self._features_ND is None else self._features_ND.index_select(0, numbers_V)
        images_VHHC = self._images_NHHC.index_select(0, rows_V)
        return replace(batch, images_VHHC=images_VHHC, features_VD=features_VD, rows_V=rows_V)

    def _placed(self, numbers: Any) -> Any:
        return None if numbers is None else to_device(torch.from_numpy(numbers), self._images_NHHC.device)


def _shape(split: TrainSplit) -> tuple[int, int, int, int]:
    side = split.parts[0].samples.size
    return sum(split.shard_rows), side, side, 3


class Streamed:
    """Shards are read when a visit needs them and dropped some windows later.

    Labelled and unlabelled rows of each part are visited in separate windows, so a batch takes from as many windows as
    there are such pools. `most_bytes` of memory hold two windows of each, the last and the current one. If they do not,
    the least recently used shards are dropped, with a warning.
    """

    def __init__(self, split: TrainSplit, most_bytes: float = math.inf) -> None:
        self._split = split
        self._held: OrderedDict[int, Shard] = OrderedDict()  # the most recently used one last
        self._in_windows = 2 * len(split.parts) * WINDOW_SHARDS
        self._most_bytes, self._bytes, self._said = most_bytes, 0, False

    def _shard(self, number: int) -> Shard:
        shard = self._held.pop(number, None)
        if shard is None:
            shard = self._split.shard(number)
            self._bytes += shard.num_bytes
            while self._held and (len(self._held) >= 2 * self._in_windows or self._bytes > self._most_bytes):
                self._say_if_too_little()
                self._bytes -= self._held.popitem(last=False)[1].num_bytes
        self._held[number] = shard
        return shard

    def _say_if_too_little(self) -> None:
        if not self._said and len(self._held) < min(self._in_windows, len(self._split.shard_rows)):
            self._said = True
            logger.warning(
                "%d shards of train images take %s bytes, above the %s available to them, and are read again and "
                "again; lower images.shard_size, or give the workers more memory",
                len(self._held) + 1, f"{self._bytes:,}", f"{self._most_bytes:,.0f}",
            )  # fmt: skip

    def ids(self, visits: Visits) -> list[str]:
        return [self._shard(int(k)).ids[int(r)] for k, r in zip(visits.shard, visits.row, strict=True)]

    def gather(self, visits: Visits) -> Batch:
        views_V = self._split.view_indices(visits)
        order, ends = np.argsort(visits.shard, kind="stable"), np.flatnonzero(np.diff(np.sort(visits.shard))) + 1
        parts = [
            self._split.gather(self._shard(int(visits.shard[at[0]])), visits.row[at], views_V[at])
            for at in np.split(order, ends)
        ]
        back = np.argsort(order)
        images, parameters, labels = (np.concatenate([part[n] for part in parts])[back] for n in range(3))
        features, weights = (
            None if parts[0][n] is None else np.concatenate([part[n] for part in parts])[back] for n in (3, 4)
        )
        return Batch(images, parameters, labels, features, self._split.row_numbers(visits), weights)

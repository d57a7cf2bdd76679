"""Reuses stored soft targets of images that an earlier data set also had: after a data set grows, only its new images
cost a teacher pass.

Shapes: M rows of all files, F files, R rows asked for, K views, D features.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydistill.data.compact import Projection
from raydistill.data.targets import read_projected, read_sample_ids
from raydistill.errors import CheckpointError

log = logging.getLogger(__name__)
# By file: the rows to read, each as the asking row and its own number.
Places = dict[str, list[tuple[int, int]]]


@dataclass(frozen=True)
class KnownRows:
    """Where the features of the same teacher and views are stored."""

    files: tuple[str, ...]
    first_F: np.ndarray  # the number of each file's first row, counted through all files
    ids_M: pa.Array  # 16 bytes each

    def find(self, ids: Sequence[str]) -> Places:
        """Where each of these images is stored; unknown images are left out."""
        at_R = pc.index_in(_packed(bytes.fromhex("".join(ids))), self.ids_M).fill_null(-1).to_numpy()
        file_R = np.searchsorted(self.first_F, at_R, side="right") - 1
        places: Places = {}
        for row in np.flatnonzero(at_R >= 0).tolist():
            number = int(file_R[row])
            places.setdefault(self.files[number], []).append((row, int(at_R[row] - self.first_F[number])))
        return places


def find_known(files: Sequence[str]) -> KnownRows:
    """The content of these files of soft targets. A damaged one is named and left out."""
    whole, ids = [], []
    for file in files:
        try:
            ids.append(read_sample_ids(file))
            whole.append(file)
        except CheckpointError as error:
            log.warning("%s; its soft targets are not reused", error)
    ends = np.cumsum([len(one) // 16 for one in ids], dtype=np.int64)
    first_F = np.concatenate([[0], ends[:-1]]) if ids else ends
    return KnownRows(tuple(whole), first_F, _packed(b"".join(ids)))


def read_known(places: Places, num_rows: int, projection: Projection | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which of the rows are known (R,), and (K, R, D) float16 features of those, or their coordinates of the
    `projection`; (0, R, 0) if none is. Raises CheckpointError if a file is damaged."""
    is_known_R = np.zeros(num_rows, bool)
    features_KRD = np.empty((0, num_rows, 0), np.float16)
    for file, pairs in places.items():
        rows, own = np.array(pairs).T
        stored_KMD = read_projected(file, projection)
        if not is_known_R.any():
            features_KRD = np.empty((len(stored_KMD), num_rows, stored_KMD.shape[2]), np.float16)
        features_KRD[:, rows] = stored_KMD[:, own]
        is_known_R[rows] = True
    return is_known_R, features_KRD


def _packed(data: bytes) -> pa.Array:
    return pa.Array.from_buffers(pa.binary(16), len(data) // 16, [None, pa.py_buffer(data)])

"""Writes the kept images in sample shards like those of `prepare`, in tasks."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydistill.cluster.plan import Plan
from raydistill.cluster.tasks import in_tasks, tasks
from raydistill.config import SHARD_BYTES, Images
from raydistill.data.jpeg import stored
from raydistill.data.sample import encode_shard, shard_name
from raydistill.generation.made import FILES_OF_A_TASK, Made, images_in, square_image
from raydistill.storage.filesystems import write_bytes
from raydistill.storage.tables import values

_PART_BYTES = 4 * SHARD_BYTES  # of pixels that a task brings together, some shards


def write_shards(folder: str, order: Sequence[tuple[Made, int | None]], images: Images, plan: Plan) -> list[int]:
    """Write images with their labels into train shards in `folder`, in their order; returns the rows of each shard.
    Each file of generated images is read once; where all pixels fit into one shard's memory, this process writes."""
    size, by_file = images.rows_per_shard, defaultdict[str, list[tuple[int, int, str, int | None]]](list)
    for position, (one, label) in enumerate(order):
        by_file[one.file].append((one.row, position, one.id, label))
    units = [{"file": file, "rows": json.dumps(rows)} for file, rows in by_file.items()]
    sizes = [min(size, len(order) - first) for first in range(0, len(order), size)]
    place, write = partial(_place, images), partial(_write, folder)
    pixels = 3 * images.size**2 * len(order)
    if not order:
        return []
    if pixels <= SHARD_BYTES:
        placed = pa.concat_tables(in_tasks(place, units, len(units), plan))
        written = [write(placed.filter(pc.equal(placed["shard"], shard))) for shard in range(len(sizes))]
    else:
        parts = min(max(2 * math.ceil(plan.cpus), pixels // _PART_BYTES), len(sizes))
        by_shard = tasks(place, units, FILES_OF_A_TASK, plan).groupby("shard", num_partitions=parts)
        of_groups = by_shard.map_groups(write, batch_format="pyarrow", num_cpus=plan.decode_cpus)
        written = list(of_groups.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    found = {shard: rows for table in written for shard, rows in zip(*map(values, table.columns), strict=True)}
    assert found == dict(enumerate(sizes)), "every image reaches its shard"
    return sizes


def _place(images: Images, batch: dict[str, np.ndarray]) -> pa.Table:
    """The working images of files, with their places."""
    files = zip(batch["file"], batch["rows"], strict=True)
    return pa.concat_tables([_of_file(str(file), json.loads(str(rows)), images) for file, rows in files])


def _of_file(file: str, rows: list[tuple[int, int, str, int | None]], images: Images) -> pa.Table:
    raw = images_in(file)
    return pa.table(
        {
            "shard": pa.array([position // images.rows_per_shard for _, position, _, _ in rows], pa.int32()),
            "position": pa.array([position for _, position, _, _ in rows], pa.int64()),
            "sample_id": [sample for _, _, sample, _ in rows],
            "image": [stored(square_image(raw[row], images).tobytes(), images) for row, _, _, _ in rows],
            "label": pa.array([label for _, _, _, label in rows], pa.int32()),
            "source": ["generated"] * len(rows),
            "split": ["train"] * len(rows),
        }
    )


def _write(folder: str, rows: pa.Table) -> pa.Table:
    (shard,) = set(values(rows["shard"]))
    write_bytes(f"{folder}/{shard_name('train', shard)}.parquet", encode_shard(rows.sort_by("position")))
    return pa.table({"shard": [shard], "rows": [len(rows)]})

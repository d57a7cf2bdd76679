"""Soft targets in shards that line up with the sample shards, and the readers of both.

Target shard k holds the teacher's features of the rows of sample shard k, in order, for each stored view. The teacher's
linear head makes logits of them, so a new head costs no teacher pass. Compact shards hold coordinates on principal
components instead.

Shapes: K views, R rows of a shard, P parameters of a view, D features, or components of a compact shard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load

from raydistill.data.compact import Projection, dequantised, quantised
from raydistill.data.jpeg import with_pixels
from raydistill.data.sample import SCHEMA, SampleSet, decode_shard, refuse_other_sizes, shard_name
from raydistill.data.views import MOST_PARAMETERS, NUM_PARAMETERS
from raydistill.errors import CheckpointError, damaged_file, missing_file
from raydistill.storage.filesystems import open_filesystem, read_bytes
from raydistill.storage.state import parsed
from raydistill.storage.tables import read_table, values
from raydistill.storage.tensors import header_bytes, refuse_altered, with_checksum

UNLABELLED = -1


@dataclass(frozen=True)
class Targets:
    """The content of a file."""

    ids_R16: np.ndarray  # uint8
    features_KRD: np.ndarray  # float16
    is_compact: bool
    parameters_KRP: np.ndarray | None  # float32, of views that the job did not draw itself


def encode_targets(
    sample_ids: Sequence[str],
    features_KRD: np.ndarray,
    projection: Projection | None = None,
    parameters_KRP: np.ndarray | None = None,
) -> bytes:
    """safetensors bytes of float16 features and of the ids they belong to; with the `projection` that the features
    have gone through, of its coordinates in a byte each."""
    ids = np.frombuffer(bytes.fromhex("".join(sample_ids)), np.uint8).reshape(len(sample_ids), 16)
    columns = {"features": features_KRD.astype(np.float16, copy=False)}
    if projection is not None:
        codes_KRD, scales_KR = quantised(features_KRD, projection.deviations_J)
        columns = {"codes": codes_KRD, "scales": scales_KR, "deviations": projection.deviations_J}
    if parameters_KRP is not None:
        columns["parameters"] = parameters_KRP
    return with_checksum(columns | {"sample_ids": ids})


def decode_targets(data: bytes, expected_ids: Sequence[str], name: str) -> np.ndarray:
    """(K, R, D) float16 features. Raises CheckpointError if they are damaged or belong to other samples."""
    return _decode_of(data, expected_ids, name).features_KRD


def _decode_of(data: bytes, expected_ids: Sequence[str], name: str) -> Targets:
    found = _decode(data, name)
    if found.ids_R16.tobytes().hex() != "".join(expected_ids):
        raise damaged_file(name, "it holds the soft targets of other samples")
    return found


def read_all_targets(path: str) -> tuple[list[str], np.ndarray]:
    """Sample ids and (K, R, D) float16 features of a whole file. Raises CheckpointError if it is damaged."""
    found = _decode(_bytes_of(path), path)
    return [row.tobytes().hex() for row in found.ids_R16], found.features_KRD


def read_joined(paths: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Sample ids and (K, R, D) float16: the features in files of the same samples, side by side. Raises
    CheckpointError: one is damaged, or they are of other samples."""
    found = [read_all_targets(path) for path in paths]
    for path, (ids, _) in zip(paths, found, strict=True):
        if ids != found[0][0]:
            raise damaged_file(path, f"its soft targets are of other samples than those of {paths[0]}")
    return found[0][0], np.concatenate([features_KRD for _, features_KRD in found], axis=2)


def read_projected(path: str, projection: Projection | None) -> np.ndarray:
    """(K, R, D) of a whole file, through the projection if the file has full features."""
    found = _decode(_bytes_of(path), path)
    if projection is None or found.is_compact:
        return found.features_KRD
    return projection.project(found.features_KRD)


def _decode(data: bytes, name: str) -> Targets:
    try:
        refuse_altered(data)
        tensors = load(data)
        is_compact = "codes" in tensors
        first = tensors["codes" if is_compact else "features"]
        views, rows, width = first.shape
        expected = {"sample_ids": (np.uint8, (rows, 16)), "features": (np.float16, first.shape)}
        if is_compact:
            expected = {"sample_ids": expected["sample_ids"], "codes": (np.int8, first.shape)}
            expected |= {"scales": (np.float16, (views, rows)), "deviations": (np.float32, (width,))}
        if "parameters" in tensors:
            count = MOST_PARAMETERS if tensors["parameters"].shape[-1] == MOST_PARAMETERS else NUM_PARAMETERS
            expected["parameters"] = (np.float32, (views, rows, count))
        for key, (kind, shape) in expected.items():
            if tensors[key].dtype != kind or tensors[key].shape != shape:
                raise ValueError(f"{key} {tensors[key].dtype} {tensors[key].shape}")
        features = dequantised(first, tensors["scales"], tensors["deviations"]) if is_compact else first
        return Targets(tensors["sample_ids"], features, is_compact, tensors.get("parameters"))
    except (SafetensorError, KeyError, ValueError) as error:
        raise damaged_file(name, error) from None


def read_sample_ids(path: str) -> bytes:
    """The ids of a file's rows, 16 bytes each, without its features. Raises CheckpointError if it is damaged."""
    fs, place = open_filesystem(path)
    try:
        # safetensors: the length of a JSON header, the header, and the tensors at the header's offsets.
        start = 8 + header_bytes(fs.cat_file(place, 0, 8))
        begin, end = parsed(fs.cat_file(place, 8, start), dict[str, Any])["sample_ids"]["data_offsets"]
        data = bytes(fs.cat_file(place, start + begin, start + end))
        if len(data) < end - begin:
            raise ValueError("it ends too early")
        return data
    except (ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:  # the last two for false lengths
        raise damaged_file(path, error) from None


def read_samples(samples: SampleSet, split: str, shard: int) -> pa.Table:
    """The rows of a shard, with pixels, however it stores them. Raises CheckpointError if it is damaged."""
    with _named(samples, split, shard) as path:
        table = decode_shard(_bytes_of(path), path)
        if samples.store == "jpeg":
            return with_pixels(table, samples.size, path)
        refuse_other_sizes(table, samples.size, path)
        return table


def read_targets(path: str, split: str, shard: int, expected_ids: Sequence[str]) -> np.ndarray:
    return read_views(path, split, shard, expected_ids)[0]


def read_views(path: str, split: str, shard: int, expected_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """(K, R, D) features of a shard, and (K, R, P) parameters of their views; None if the job draws these. Raises as
    `decode_targets`."""
    name = f"{path}/{shard_name(split, shard)}.safetensors"
    found = _decode_of(_bytes_of(name), expected_ids, name)
    return found.features_KRD, found.parameters_KRP


def split_features(samples: SampleSet, path: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) float32 features of the labelled rows of a split without augmentation, in its order, and (N,) labels."""
    features, labels = [], []
    for shard in range(len(samples.shards[split])):
        table = read_columns(samples, split, shard, "sample_id", "label")
        table = table.filter(table["label"].is_valid())
        if table.num_rows:
            features_1RD = read_targets(path, split, shard, values(table["sample_id"]))
            features.append(features_1RD[0].astype(np.float32))
            labels.append(labels_of(table))
    if not features:
        return np.empty((0, 0), np.float32), np.empty(0, np.int64)
    return np.concatenate(features), np.concatenate(labels)


def read_labels(samples: SampleSet, split: str, shard: int) -> np.ndarray:
    """The labels of a shard, UNLABELLED if there is none, without reading its images."""
    return labels_of(read_columns(samples, split, shard, "label"))


def read_ids(samples: SampleSet, split: str, shard: int) -> list[str]:
    """The ids of a shard's rows, without reading its images."""
    return values(read_columns(samples, split, shard, "sample_id")["sample_id"])


def read_columns(samples: SampleSet, split: str, shard: int, *names: str) -> pa.Table:
    """Some columns of a shard, without reading its images."""
    with _named(samples, split, shard) as path:
        return read_table(path, pa.schema([SCHEMA.field(name) for name in names]))


@contextlib.contextmanager
def _named(samples: SampleSet, split: str, shard: int) -> Iterator[str]:
    """The path of a shard. What is wrong with it is said with the images that it holds, counted in the split."""
    path, rows = f"{samples.path}/{shard_name(split, shard)}.parquet", samples.shards[split]
    first = sum(rows[:shard])
    try:
        yield path
    except (FileNotFoundError, CheckpointError) as error:
        found = missing_file(path) if isinstance(error, FileNotFoundError) else error
        raise CheckpointError(f"{split} images {first + 1:,} to {first + rows[shard]:,}: {found}") from None


def _bytes_of(path: str) -> bytes:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        raise missing_file(path) from None


def labels_of(table: pa.Table) -> np.ndarray:
    return table["label"].fill_null(UNLABELLED).to_numpy().astype(np.int64)

"""`teach --out FOLDER`: finished soft targets in the open format, without another pass of the teacher.

Shapes: K views, R rows of a shard, V of K x R rows, P parameters of a view, D features, C classes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import numpy as np

from raydistill.config import RunConfig
from raydistill.data.compact import Projection, quantised, read_projection
from raydistill.data.open_targets import (
    FORMAT,
    HEAD_FILE,
    NUM_PARAMETERS,
    SETTINGS_FILE,
    FeatureColumns,
    TargetFile,
    TargetSettings,
    ViewRows,
    encode_head_table,
    fingerprint_of,
)
from raydistill.data.sample import SampleSet, shard_name
from raydistill.data.targets import read_ids, read_targets
from raydistill.data.views import num_parameters, stored_views
from raydistill.errors import ConfigError
from raydistill.models.fingerprints import model_identity
from raydistill.models.heads import LinearHead, load_head
from raydistill.results import Outcome
from raydistill.runtime.progress import Progress
from raydistill.runtime.versions import installed
from raydistill.storage.filesystems import exists, write_bytes


def refuse_out(config: RunConfig, folder: str) -> None:
    """Raises ConfigError: there is nothing to write, or something is there already."""
    if not config.loss.needs_teacher or config.views.per_image == "fresh":
        raise ConfigError(
            "teach --out writes stored soft targets, and this job stores none; set views.per_image to a number, and "
            "loss.kd_weight above 0"
        )
    if config.teacher is not None and config.teacher.stored is not None:
        raise ConfigError(f"teach --out: teacher.model={config.teacher.name} is such a folder already; copy it")
    if exists(f"{folder}/{SETTINGS_FILE}"):
        raise ConfigError(f"teach --out {folder}: it holds soft targets already; name another folder")


def write_folder(
    config: RunConfig, outcome: Outcome, folder: str, licence: str | None, with_features: bool, progress: Progress
) -> TargetSettings:
    """Write one parquet file for each shard, and `soft_targets.json` last. Generated images are left out."""
    samples, adapted, taught = outcome.samples, outcome.adapted, outcome.directories["teach"]
    assert samples is not None
    assert adapted is not None
    projection = read_projection(taught)
    head, files, classes = load_head(adapted.path).of(projection), [], list(samples.classes)
    num_rows = samples.num_rows("train")
    with progress.task("write", num_rows, "images") as advance:
        for shard, count in enumerate(samples.shards["train"]):
            rows = _rows(config, samples, shard, taught, head, projection, with_features)
            files.append(_written(folder, f"{shard_name('train', shard)}.parquet", rows.encode(), len(rows.sample_ids)))
            advance(count)
    features = None
    if with_features:
        table = _written(folder, HEAD_FILE, encode_head_table(classes, head.weight_CD, head.bias_C), len(classes))
        unit = None if projection is None else [float(one) for one in projection.deviations_J]
        features = FeatureColumns(head.weight_CD.shape[1], "float16" if projection is None else "int8", unit, table)
    version = next(number for number, count in NUM_PARAMETERS.items() if count == num_parameters(config.views))
    views = config.views.resolved.model_dump(exclude={"store", "strength"})
    settings = TargetSettings(
        FORMAT, version, f"raydistill {installed(['raydistill'])['raydistill']}", _teacher(config, adapted.precision),
        config.images.model_dump(include={"size", "fit", "store"}),
        views | {"seed": config.seed}, classes, features, num_rows, licence, files,
        fingerprint_of(classes, files, features),
    )  # fmt: skip
    write_bytes(f"{folder}/{SETTINGS_FILE}", json.dumps(asdict(settings), indent=1, ensure_ascii=False).encode())
    return settings


def _teacher(config: RunConfig, precision: str) -> dict[str, Any]:
    """A folder counts by its last name: the rest is of this machine. Weights count by the hash of their content."""
    teacher = config.teacher
    assert teacher is not None
    names = [m.name if ":" in m.name else m.name.rstrip("/").rpartition("/")[2] for m in teacher.members]
    weights = hashlib.sha256(json.dumps([*map(model_identity, teacher.members)], sort_keys=True).encode()).hexdigest()
    kept = {"size": teacher.size, "head": teacher.head, "precision": precision}
    return {"model": " + ".join(names), "weights": weights, **kept}


def _written(folder: str, name: str, data: bytes, rows: int) -> TargetFile:
    write_bytes(f"{folder}/{name}", data)
    return TargetFile(name, rows, hashlib.sha256(data).hexdigest())


def _rows(
    config: RunConfig, samples: SampleSet, shard: int, taught: str, head: LinearHead, projection: Projection | None,
    with_features: bool,
) -> ViewRows:  # fmt: skip
    """All views of the first image, then all of the second, and so on."""
    ids = read_ids(samples, "train", shard)
    features_KRD = read_targets(taught, "train", shard, ids)
    views, rows, _ = features_KRD.shape
    parameters_VP = stored_views(config.views, config.seed, ids).swapaxes(0, 1).reshape(views * rows, -1)
    features_VD = features_KRD.swapaxes(0, 1).reshape(views * rows, -1)
    logits_VC, scale_V = head.logits(features_VD).astype(np.float16), None
    stored_VD: np.ndarray | None = features_VD if with_features else None
    if with_features and projection is not None:
        codes_1VD, scales_1V = quantised(features_VD[None], projection.deviations_J)
        stored_VD, scale_V = codes_1VD[0], scales_1V[0].astype(np.float32)
    names = [name for name in ids for _ in range(views)]
    return ViewRows(names, np.tile(np.arange(views), rows), parameters_VP, logits_VC, stored_VD, scale_V)

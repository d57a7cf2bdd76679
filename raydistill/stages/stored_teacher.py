"""A teacher that is a folder of stored answers (`teacher.model=targets:FOLDER`): no network, images found by their ids.

Shapes: K views, R rows of some shards, P parameters of a view, D features, or logits if there are no features.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from raydistill.config import BEYOND_COLOUR, RunConfig
from raydistill.data.open_targets import TargetSettings, read_head_table, read_rows, read_settings
from raydistill.data.sample import SampleSet, shard_name
from raydistill.data.targets import encode_targets, read_ids
from raydistill.errors import ConfigError, DataError
from raydistill.escaping import first_few, one_line, quoted, shortened
from raydistill.execution import Execution
from raydistill.identity import adapt_directory, teach_directory
from raydistill.models.heads import HEAD_FILE, LinearHead, encode_head
from raydistill.results import AdaptedTeacher, SoftTargets
from raydistill.storage.directory import StageDirectory
from raydistill.storage.filesystems import write_bytes
from raydistill.storage.state import result_of

_MOST_BYTES = 1 << 30  # of targets in memory at once
_OF_LOGITS = ("task", "kd", "dkd", "dist", "standardised_kd")


def refuse_misfit(config: RunConfig, classes: list[str]) -> None:
    """Raises ConfigError or DataError: the folder is not for these classes, images, views or losses."""
    assert config.teacher is not None
    folder = config.teacher.stored
    assert folder is not None
    settings, what = read_settings(folder), f"teacher.model={config.teacher.model}"
    if settings.classes != classes:
        pairs = zip([*settings.classes, None], [*classes, None], strict=False)
        number, (theirs, ours) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ConfigError(
            f"{what}: its {len(settings.classes)} classes are not the {len(classes)} of images.path: number {number} "
            f"is {_name(theirs)} there and {_name(ours)} here; name the same in the same order in images.classes"
        )
    of_views = dict.fromkeys(BEYOND_COLOUR, 0.0) if settings.version == 1 else {}
    different = [
        f"{section}.{key}={stated[key]}"
        for section, stated in (("images", settings.images), ("views", of_views | settings.views))
        for key in type(getattr(config, section)).model_fields
        if key in stated and getattr(getattr(config.resolved, section), key) != stated[key]
    ]
    if different:
        raise ConfigError(
            f"{what}: its views were made with other settings; set {shortened(one_line(' '.join(different)), 400)}"
        )
    lacking = [f"loss.{term}_weight=0" for term in config.loss.terms if term not in _OF_LOGITS]
    if settings.features is None and lacking:
        raise ConfigError(
            f"{what}: it holds logits and no features, which some losses compare; set {' '.join(lacking)}"
        )


def _name(name: str | None) -> str:
    return "none" if name is None else shortened(quoted(name))


def adapt_stored(execution: Execution) -> None:
    """The head for what the folder holds: its own for features, or the identity for logits."""
    config, samples = execution.config, execution.samples
    assert config.teacher is not None
    folder, directory = str(config.teacher.stored), adapt_directory(config, samples)

    def work(_: Any) -> None:
        refuse_misfit(config, list(samples.classes))
        settings, classes = read_settings(folder), len(samples.classes)
        head = LinearHead(np.eye(classes, dtype=np.float32), np.zeros(classes, np.float32))
        if settings.features is not None:
            head = LinearHead(*read_head_table(folder, settings))
        directory.begin()
        directory.write(HEAD_FILE, encode_head(head))
        done = asdict(AdaptedTeacher(directory.path, "", None, None, 1 / classes, None, 0))
        del done["features"]
        directory.finish(done)

    done = {**execution.result(directory, work), "features": ""}
    execution.outcome.adapted = result_of(done, directory.path, AdaptedTeacher)


def teach_stored(execution: Execution) -> None:
    config, samples, progress = execution.config, execution.samples, execution.progress
    assert config.teacher is not None
    folder, directory = str(config.teacher.stored), teach_directory(config, samples)

    def work(_: Any) -> None:
        refuse_misfit(config, list(samples.classes))
        settings = read_settings(folder)
        directory.begin()
        result = copy_targets(folder, settings, samples, directory)
        others = settings.num_images - result.num_images
        progress.line(
            f"teach     {result.num_views} answers to each of {result.num_images:,} images, from {folder} (licence: "
            f"{one_line(settings.licence or 'not stated')}); {max(others, 0):,} of its images are not in the train "
            "split"
        )
        directory.finish(asdict(result))

    execution.result(directory, work)


def copy_targets(folder: str, settings: TargetSettings, samples: SampleSet, directory: StageDirectory) -> SoftTargets:
    """Write the folder's rows as soft targets that line up with the sample shards. Raises DataError with their number
    if images have no record or two."""
    width = len(settings.classes) if settings.features is None else settings.features.width
    each = settings.num_views * (2 * width + 4 * settings.num_parameters)
    missing: list[str] = []
    for group in _groups(samples.shards["train"], max(1, _MOST_BYTES // each)):
        ids = {shard: read_ids(samples, "train", shard) for shard in group}
        names = [name for of_shard in ids.values() for name in of_shard]
        features_KRD, parameters_KRP, counts_KR = _gather(folder, settings, names, width)
        missing += [name for name, found in zip(names, counts_KR.min(axis=0, initial=1), strict=True) if not found]
        first = 0
        for shard, of_shard in ids.items():
            rows = slice(first, first := first + len(of_shard))
            if not missing:
                data = encode_targets(of_shard, features_KRD[:, rows], parameters_KRP=parameters_KRP[:, rows])
                write_bytes(f"{directory.path}/{shard_name('train', shard)}.safetensors", data)
    if missing:
        raise DataError(
            f"{quoted(folder)}: {len(missing):,} of {samples.num_rows('train'):,} train images have no record of all "
            f"{settings.num_views} views there (sample ids {first_few(missing)}); take the images, splits and seed "
            "that it was made with, or leave these images out"
        )
    return SoftTargets(directory.path, samples.num_rows("train"), settings.num_views, width)


def _groups(rows: tuple[int, ...], most: int) -> list[list[int]]:
    """Shards, as many together as have this many rows."""
    groups, held = [[0]] if rows else [], rows[0] if rows else 0
    for shard in range(1, len(rows)):
        held += rows[shard]
        if held > most:
            groups.append([])
            held = rows[shard]
        groups[-1].append(shard)
    return groups


def _gather(
    folder: str, settings: TargetSettings, names: list[str], width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(K, R, D) float16, (K, R, P) and how many rows there are of each view (K, R), for the images of these ids."""
    place, shape = {name: row for row, name in enumerate(names)}, (settings.num_views, len(names))
    features_KRD, counts_KR = np.zeros((*shape, width), np.float16), np.zeros(shape, np.int64)
    parameters_KRP = np.zeros((*shape, settings.num_parameters), np.float32)
    for file in settings.files:
        rows = read_rows(folder, settings, file)
        at_V = np.array([place.get(name, -1) for name in rows.sample_ids], np.int64)
        known_V = at_V >= 0
        where = rows.views_V[known_V], at_V[known_V]
        features_KRD[where], parameters_KRP[where] = rows.teacher_values(settings)[known_V], rows.parameters_VP[known_V]
        np.add.at(counts_KR, where, 1)
        if (counts_KR > 1).any():
            view, row = np.argwhere(counts_KR > 1)[0]
            raise DataError(f"{quoted(folder)}: view {view} of sample {names[row]} has two rows")
    return features_KRD, parameters_KRP, counts_KR

"""teach: run every view through the teacher and write its features, one file for each sample shard.

Shapes: N images, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise, starmap
from typing import Any

import numpy as np

from raydistill.cluster.plan import Plan
from raydistill.config import RunConfig
from raydistill.data.compact import PROJECTION_FILE, Projection, fit_projection, read_projection, same
from raydistill.data.reuse import find_known
from raydistill.data.sample import SampleSet
from raydistill.data.targets import read_all_targets, read_joined, split_features
from raydistill.engine.teacher_pool import refuse_large_targets
from raydistill.execution import Execution
from raydistill.generation.features import teach_files
from raydistill.identity import member_directories, taught_before, teach_directory, teach_generated_directory
from raydistill.models.heads import load_head, projection_loss
from raydistill.results import SoftTargets
from raydistill.runtime.progress import Progress
from raydistill.stages.feature_pass import (
    FeaturePass,
    join_features,
    precision_of,
    shard_file,
    target_file,
    write_features,
)
from raydistill.stages.stored_teacher import teach_stored
from raydistill.storage.directory import StageDirectory

# The views that a projection is fitted to, at least, and the folder for their features until all is written.
_SAMPLE_VIEWS, _SAMPLE = 16384, "sample"
_ENOUGH_EQUAL = 0.98  # of the answers of a head to compact targets


def stream_soft_targets(
    config: RunConfig, samples: SampleSet, head: str, directory: StageDirectory, plan: Plan, progress: Progress,
    columns: slice | None = None,
) -> SoftTargets:  # fmt: skip
    """Run every stored view of the train split through the teacher pool. It skips shards that exist, and copies the
    views of images that it knows from a smaller or larger set.

    `head` is the directory of `adapt`, of which a member of a committee has some `columns`. Raises ConfigError: the
    disk may be too small.
    """
    assert config.views.per_image != "fresh", "fresh views are not stored"
    left = directory.begin()
    views, before = config.views.per_image, taught_before(directory)
    wanted = FeaturePass(config, samples, ("train",), views, directory.path, head=head, columns=columns)
    sample = f"{directory.place}/{_SAMPLE}"
    if config.views.store == "compact":
        projection = read_projection(directory.path)
        if projection is None:
            projection, left = _projection(wanted, directory, before, plan, progress), frozenset()
        stored = {path: read_projection(path) for path in before}
        before = {p: files for p, files in before.items() if stored[p] is None or same(stored[p], projection)}
        names = directory.fs.names(sample) if directory.fs.exists(sample) else []
        before[_SAMPLE] = [f"{directory.path}/{_SAMPLE}/{name}" for name in names]
        wanted = replace(wanted, projection=projection)
    files = [file for of_one in before.values() for file in of_one]
    missing = [n for k, n in enumerate(samples.shards["train"]) if target_file("train", k) not in left]
    refuse_large_targets(config, sum(missing), head, wanted.projection)
    done = write_features(replace(wanted, known=find_known(files) if files else None), "teach", plan, progress, left)
    directory.fs.remove(sample)
    result = SoftTargets(directory.path, samples.num_rows("train"), views, *done[:4])
    directory.finish(asdict(result))
    return result


def join_soft_targets(
    config: RunConfig, samples: SampleSet, head: str, parts: Sequence[StageDirectory], directory: StageDirectory,
    plan: Plan,
) -> SoftTargets:  # fmt: skip
    """The soft targets of a committee: the features of its members, whose directories are `parts`, side by side.

    `head` is the directory of `adapt`. Raises ConfigError: the disk may be too small.
    """
    assert config.views.per_image != "fresh", "fresh views are not stored"
    left, views, rows = directory.begin(), config.views.per_image, samples.shards["train"]
    paths, projection = [part.path for part in parts], read_projection(directory.path)
    if config.views.store == "compact" and projection is None:
        files = ([shard_file(path, "train", k) for path in paths] for k in _some_shards(rows, views))
        features = (read_joined(of_one)[1] for of_one in files)
        projection, left = fit_projection(features, load_head(head).weight_CD), frozenset()
        directory.write(PROJECTION_FILE, projection.encode())
    missing = [count for k, count in enumerate(rows) if target_file("train", k) not in left]
    refuse_large_targets(config, sum(missing), head, projection)
    wanted = FeaturePass(config, samples, ("train",), views, directory.path, projection=projection)
    width = join_features(wanted, paths, plan, left)
    result = SoftTargets(directory.path, samples.num_rows("train"), views, width, precision_of(parts))
    directory.finish(asdict(result))
    return result


def _projection(
    wanted: FeaturePass, directory: StageDirectory, before: dict[str, list[str]], plan: Plan, progress: Progress
) -> Projection:
    """That of a directory whose rows are then copied, if it was fitted to enough views; else one that is fitted to the
    head and some shards. These shards stay beside the soft targets until all are written, so no view is seen
    twice."""
    assert wanted.head is not None
    for name in directory.fs.names(directory.place):  # of a projection that is gone
        if name.startswith("train-"):
            directory.fs.remove(f"{directory.place}/{name}")
    rows, views = wanted.samples.shards["train"], wanted.num_views
    least = min(_SAMPLE_VIEWS, sum(rows) * views) / 2
    taken = (one for one in map(read_projection, before) if one is not None and one.num_views >= least)
    projection = next(taken, None)
    if projection is None:
        chosen = _some_shards(rows, views)
        refuse_large_targets(wanted.config, sum(rows[k] for k in chosen), wanted.head)
        files = [file for path, of_one in before.items() if read_projection(path) is None for file in of_one]
        known = find_known(files) if files else None
        sample = replace(wanted, path=f"{wanted.path}/{_SAMPLE}", known=known, shards=chosen)
        write_features(sample, "sample", plan, progress)
        features = (read_all_targets(shard_file(sample.path, "train", k))[1] for k in chosen)
        projection = fit_projection(features, load_head(wanted.head).weight_CD)
    directory.write(PROJECTION_FILE, projection.encode())
    return projection


def _some_shards(rows: Sequence[int], views: int) -> tuple[int, ...]:
    """Shards with enough views to fit a projection to."""
    order = np.random.default_rng(0).permutation(len(rows))  # the first shards hold the labelled images
    enough = np.cumsum(np.array(rows)[order]) * views >= min(_SAMPLE_VIEWS, sum(rows) * views)
    return tuple(sorted(order[: int(enough.argmax()) + 1].tolist()))


def teach(execution: Execution) -> None:
    teacher = execution.config.teacher
    if teacher is not None and teacher.stored is not None:
        teach_stored(execution)
    else:
        _teach_by_network(execution)


def _teach_by_network(execution: Execution) -> None:
    config, samples, generated = execution.config, execution.samples, execution.outcome.generated
    directory = teach_directory(config, samples)
    _make(execution, samples, directory, member_directories(config, samples, teach_directory), stream_soft_targets)
    projection = read_projection(directory.path)
    if projection is not None:
        execution.progress.line(f"teach     {_loss_of(projection, execution)}")
    if generated is not None:
        apart = teach_generated_directory(config, samples)
        parts = member_directories(
            config, samples, lambda one, samples: teach_generated_directory(config, samples, one)
        )
        run = teach_files if config.streams_generated else stream_soft_targets
        _make(execution, generated.samples, apart, parts, run, projection)


def _make(
    execution: Execution,
    samples: SampleSet,
    directory: StageDirectory,
    parts: Sequence[tuple[RunConfig, StageDirectory]],
    run: Callable[..., SoftTargets],
    projection: Projection | None = None,
) -> None:
    """The soft targets in a directory; of a committee, first those of each member in its own of `parts`. Those of
    generated images are compact by the `projection` of the real ones."""
    head, adapted, progress = execution.head, execution.outcome.adapted, execution.progress
    assert adapted is not None, "adapt has run"
    if directory.done() is None:
        ends = np.cumsum([0, *(member.num_features for member in adapted.members)]).tolist()
        for (config, own), columns in zip(parts, starmap(slice, pairwise(ends)), strict=True):
            compared = {} if run is teach_files else {"columns": columns}
            of_member = partial(run, config, samples, head, own, progress=progress, **compared)
            execution.result(own, partial(_run, of_member, execution))

    def work(_: Any) -> None:
        if projection is not None:
            directory.begin()
            directory.write(PROJECTION_FILE, projection.encode())
        if parts:
            join_soft_targets(execution.config, samples, head, [own for _, own in parts], directory, execution.plan())
        else:
            run(execution.config, samples, head, directory, execution.plan(), progress)

    execution.result(directory, work)


def _run(of_member: Callable[..., SoftTargets], execution: Execution, _: Any) -> SoftTargets:
    return of_member(plan=execution.plan())


def _loss_of(projection: Projection, execution: Execution) -> str:
    """What compact targets change in the head's answers, measured on images of val or, without any, of train."""
    samples, adapted = execution.samples, execution.outcome.adapted
    assert adapted is not None, "adapt has run"
    split = "val" if samples.num_labelled["val"] else "train"
    features_ND, _ = split_features(samples, adapted.features, split)
    equal, difference = projection_loss(load_head(adapted.path), projection, features_ND)
    kept, width = projection.components_JD.shape
    words = (
        f"compact: {kept + 2:,} bytes a view instead of {2 * width:,}; {equal} of {len(features_ND)} answers on "
        f"{split} equal, largest difference of a probability {difference:.2g}"
    )
    if equal < _ENOUGH_EQUAL * len(features_ND):
        words += (
            f"; they were made for another head: for this one, delete {execution.outcome.directories['teach']} and run "
            "the command again, which costs a teacher pass, or set views.store=full"
        )
    return words

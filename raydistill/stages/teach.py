"""teach: run every view through the teacher and write its features, one file for each sample shard.

Shapes: N images, D features.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np

from raydistill.cluster.plan import Plan
from raydistill.config import RunConfig
from raydistill.data.compact import PROJECTION_FILE, Projection, fit_projection, read_projection, same
from raydistill.data.reuse import find_known
from raydistill.data.sample import SampleSet
from raydistill.data.targets import read_all_targets, split_features
from raydistill.engine.teacher_pool import refuse_large_targets
from raydistill.execution import Execution
from raydistill.generation.features import teach_files
from raydistill.identity import taught_before, teach_directory, teach_generated_directory
from raydistill.models.heads import load_head, projection_loss
from raydistill.results import SoftTargets
from raydistill.runtime.progress import Progress
from raydistill.stages.feature_pass import FeaturePass, shard_file, target_file, write_features
from raydistill.stages.stored_teacher import teach_stored
from raydistill.storage.directory import StageDirectory

# The views that a projection is fitted to, at least, and the folder for their features until all is written.
_SAMPLE_VIEWS, _SAMPLE = 16384, "sample"
_ENOUGH_EQUAL = 0.98  # of the answers of a head to compact targets


def stream_soft_targets(
    config: RunConfig, samples: SampleSet, head: str, directory: StageDirectory, plan: Plan, progress: Progress
) -> SoftTargets:
    """Run every stored view of the train split through the teacher pool. It skips shards that exist, and copies the
    views of images that it knows from a smaller or larger set.

    `head` is the directory of `adapt`. Raises ConfigError: the disk may be too small.
    """
    assert config.views.per_image != "fresh", "fresh views are not stored"
    left = directory.begin()
    views, before = config.views.per_image, taught_before(directory)
    wanted = FeaturePass(config, samples, ("train",), views, directory.path, head=head)
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
    result = SoftTargets(directory.path, samples.num_rows("train"), views, *done)
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
        order = np.random.default_rng(0).permutation(len(rows))  # the first shards hold the labelled images
        enough = np.cumsum(np.array(rows)[order]) * views >= min(_SAMPLE_VIEWS, sum(rows) * views)
        chosen = tuple(sorted(order[: int(enough.argmax()) + 1].tolist()))
        refuse_large_targets(wanted.config, sum(rows[k] for k in chosen), wanted.head)
        files = [file for path, of_one in before.items() if read_projection(path) is None for file in of_one]
        known = find_known(files) if files else None
        sample = replace(wanted, path=f"{wanted.path}/{_SAMPLE}", known=known, shards=chosen)
        write_features(sample, "sample", plan, progress)
        features = (read_all_targets(shard_file(sample.path, "train", k))[1] for k in chosen)
        projection = fit_projection(features, load_head(wanted.head).weight_CD)
    directory.write(PROJECTION_FILE, projection.encode())
    return projection


def teach(execution: Execution) -> None:
    teacher = execution.config.teacher
    if teacher is not None and teacher.stored is not None:
        teach_stored(execution)
    else:
        _teach_by_network(execution)


def _teach_by_network(execution: Execution) -> None:
    config, samples, generated = execution.config, execution.samples, execution.outcome.generated
    head, plan, progress = execution.head, execution.plan, execution.progress
    directory = teach_directory(config, samples)
    execution.result(directory, lambda _: stream_soft_targets(config, samples, head, directory, plan(), progress))
    projection = read_projection(directory.path)
    if projection is not None:
        progress.line(f"teach     {_loss_of(projection, execution)}")
    if generated is not None:
        apart, shown = teach_generated_directory(config, samples), generated.samples
        run = teach_files if config.streams_generated else stream_soft_targets

        def work(_: Any) -> None:
            if projection is not None:
                apart.begin()
                apart.write(PROJECTION_FILE, projection.encode())
            run(config, shown, head, apart, plan(), progress)

        execution.result(apart, work)


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

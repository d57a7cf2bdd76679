"""The teacher's features of generated images, computed while the pipeline makes others: of whole images for the filter,
and of stored views, so that `teach` does not wait for the last image.

Shapes: K views, R rows of a shard, N images of a file, D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy

from raydistill.cluster.plan import LEAST_SHARE, Plan
from raydistill.cluster.restarts import new_tries, trying
from raydistill.config import RunConfig, Views, members
from raydistill.data.compact import read_projection
from raydistill.data.sample import SampleSet, sample_id, shard_name
from raydistill.data.targets import encode_targets, read_all_targets, read_ids
from raydistill.data.views import WHOLE_IMAGE, stored_views
from raydistill.engine.precision import described
from raydistill.engine.teacher_pool import TeacherActor, refuse_large_targets, refuse_not_finite, teacher_pool
from raydistill.generation.made import FILES_OF_A_TASK, made_images, working_image
from raydistill.identity import backbone_name, teacher_pin, views_name
from raydistill.results import SoftTargets
from raydistill.runtime.progress import Progress
from raydistill.storage.directory import StageDirectory, workspace_root
from raydistill.storage.filesystems import exists, write_bytes
from raydistill.storage.tables import read_table, rows_of


def show(made: ray.data.Dataset, config: RunConfig, plan: Plan) -> ray.data.Dataset:
    """Send each file of images from the generators to a teacher actor, or to one of each member of a committee."""
    for member in members(config):
        made = made.map_batches(
            FileTeacher,
            fn_constructor_kwargs=_of_teacher(member) | {"tries": new_tries()},
            batch_size=1,
            batch_format="numpy",
            compute=ActorPoolStrategy(size=1),
            num_cpus=LEAST_SHARE,
            num_gpus=min(plan.generator_gpus, plan.teacher_gpus) or None,
        )
    return made


def _of_teacher(config: RunConfig) -> dict[str, Any]:
    pin = teacher_pin(workspace_root(config), config)
    return {"config": config, "name": backbone_name(config), "pin": pin}


class FileTeacher(TeacherActor):
    """Writes the teacher's features of the images in one file beside it: of each whole image and, if `sees_views` and
    generated images are streamed, of each stored view. A repeated call skips written files."""

    def __init__(self, config: RunConfig, name: str, pin: str, sees_views: bool = True, tries: Any = None) -> None:
        """`name` stands for the teacher in file names; `tries` is None outside Ray."""
        assert config.teacher is not None
        super().__init__(config.teacher, threads=1, pin=pin, tries=tries)
        self._images, self._seed, self._name = config.images, config.seed, name
        self._views = config.views if sees_views and config.streams_generated else None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        file = str(batch["file"][0])
        made = made_images(file)
        ids = [sample_id(image) for image in made]
        whole = np.tile(WHOLE_IMAGE, (1, len(ids), 1))
        self._write(whole_features(file, self._name), made, ids, whole)
        if self._views is not None:
            place = view_features(file, self._name, self._views, self._seed)
            self._write(place, made, ids, stored_views(self._views, self._seed, ids))
        return batch

    def _write(self, place: str, made: list[bytes], ids: list[str], parameters_KNP: np.ndarray) -> None:
        if exists(place):
            return
        features_KND = np.empty((len(parameters_KNP), 0, 1), np.float16)
        with trying(self._tries, f"{place} ({len(made)} generated images)"):
            if made:
                images_NHHC = np.stack([np.asarray(working_image(image, self._images)) for image in made])
                features_KND = self.features(images_NHHC, parameters_KNP)
                refuse_not_finite(features_KND, ids)
            write_bytes(place, encode_targets(ids, features_KND))


def teach_files(
    config: RunConfig, generated: SampleSet, head: str, directory: StageDirectory, plan: Plan, progress: Progress
) -> SoftTargets:
    """`teach` for streamed generated images: compute the missing views of the files, then gather the soft targets of
    each shard from its images' files.

    Every pass takes whole files, so the features of a file are always equal to the bit. `head` is the directory of
    `adapt`. Raises ConfigError: the disk may be too small.
    """
    directory.begin()
    schema = pa.schema([(name, pa.string()) for name in ("id", "file", "verdict")])
    ledger = rows_of(read_table(f"{generated.path}/ledger.parquet", schema))
    # The workspace may have moved.
    root = f"{workspace_root(config)}/generated"
    file_of = {r["id"]: "/".join([root, *r["file"].split("/")[-2:]]) for r in ledger if r["verdict"] == "kept"}
    name, images = backbone_name(config), Counter(file_of.values())
    place = {file: view_features(file, name, config.views, config.seed) for file in images}
    missing = sorted(file for file in images if not exists(place[file]))
    done = len(file_of) - sum(images[file] for file in missing)
    refuse_large_targets(config, 2 * len(file_of) - done, head)
    with progress.task("teach", len(file_of), "images", done=done) as advance:
        if done:
            advance(0, f"{done} done during generate")
        for file in _teach_missing(config, missing, plan):
            advance(images[file])
    width, projection = 0, read_projection(directory.path)
    for shard in range(len(generated.shards["train"])):
        target = f"{directory.path}/{shard_name('train', shard)}.safetensors"
        ids = read_ids(generated, "train", shard)
        features_KD: dict[str, np.ndarray] = {}
        for file in sorted({place[file_of[i]] for i in ids}):
            own, features_KND = read_all_targets(file)
            features_KD.update(zip(own, features_KND.swapaxes(0, 1), strict=True))
        features_KRD = np.stack([features_KD[i] for i in ids], axis=1)
        if projection is not None:
            features_KRD = projection.project(features_KRD)
        write_bytes(target, encode_targets(ids, features_KRD, projection))
        width = features_KRD.shape[2]
    assert config.views.per_image != "fresh", "fresh views are not stored"
    assert config.teacher is not None
    precision, _ = described(config.teacher.precision, teacher_pin(workspace_root(config), config))
    result = SoftTargets(directory.path, len(file_of), config.views.per_image, width, precision)
    directory.finish(asdict(result))
    return result


def teach_whole(config: RunConfig, files: list[str], plan: Plan) -> None:
    """Compute the features of the whole images in files that lack them: in the pool, or of few files in this process,
    which does not wait for actors."""
    if len(files) > FILES_OF_A_TASK:
        for _ in _teach_missing(config, files, plan, sees_views=False):
            pass
    elif files:
        threads = torch.get_num_threads()
        teacher = FileTeacher(**_of_teacher(config), sees_views=False)
        for file in files:
            teacher({"file": np.array([file])})
        torch.set_num_threads(threads)  # TeacherActor set one thread


def _teach_missing(config: RunConfig, files: list[str], plan: Plan, sees_views: bool = True) -> Iterator[str]:
    if files:
        dataset = ray.data.from_items([{"file": file} for file in files], override_num_blocks=len(files))
        seen = dataset.map_batches(
            FileTeacher,
            fn_constructor_kwargs=_of_teacher(config) | {"sees_views": sees_views, "tries": new_tries()},
            batch_size=1,
            batch_format="numpy",
            **teacher_pool(plan, len(files)),
        )
        for row in seen.iter_rows():
            yield str(row["file"])


def whole_features(file: str, teacher: str) -> str:
    """The file of features of the whole images in `file`."""
    return f"{file.removesuffix('.parquet')}-{teacher}.safetensors"


def view_features(file: str, teacher: str, views: Views, seed: int) -> str:
    """The file of features of their stored views."""
    return f"{file.removesuffix('.parquet')}-{teacher}-{views_name(views, seed)}.safetensors"

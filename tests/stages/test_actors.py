"""Actor calls that Ray makes again, as it does when an actor is lost between its file's rename and its answer, or each
time that it is made."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from raydistill.cluster import restarts
from raydistill.cluster.plan import live_plan
from raydistill.cluster.restarts import Restart, Tries, new_tries, trying
from raydistill.config import load_config
from raydistill.data.decode import encode
from raydistill.data.sample import SampleSet, sample_id, samples_from_json
from raydistill.data.views import WHOLE_IMAGE
from raydistill.errors import ConfigError
from raydistill.generation.features import FileTeacher
from raydistill.generation.pipelines import inspect_pipeline
from raydistill.generation.recipes import GeneratorActor
from raydistill.stages import feature_pass
from raydistill.stages.feature_pass import FeaturePass, ShardTeacher, write_features
from tests.small_run import painted

Call = tuple[Callable[[dict], dict], dict]


def shard_teacher(words: list[str], folder: Path, _: Path) -> Call:
    images = np.stack([np.asarray(painted(i % 3, np.random.default_rng(i), 32)) for i in range(4)])
    ids = " ".join(sample_id(image.tobytes()) for image in images)
    parameters = np.tile(WHOLE_IMAGE, (1, 2, 4, 1))
    batch = {"shard": np.array(["train-00000"]), "sample_ids": np.array([ids]), "images": images[None]}
    batch |= {"new": np.arange(4)[None], "known": np.empty((1, 0, 4, 0), np.float16)}
    return ShardTeacher(load_config(words).teacher, 1, "", str(folder)), {**batch, "parameters": parameters}


def file_teacher(words: list[str], folder: Path, _: Path) -> Call:
    config = load_config(words)
    image = encode(painted(0, np.random.default_rng(0), 32))
    pq.write_table(pa.table({"image": pa.array([image], pa.binary())}), folder / "made.parquet")
    return FileTeacher(config, "teacher", ""), {"file": np.array([f"{folder}/made.parquet"])}


def generator(words: list[str], folder: Path, pipeline: Path) -> Call:
    settings = load_config([*words, f"generate.pipeline={pipeline}"]).generate
    samples = SampleSet(str(folder), ("red",), 32, {}, {}, 0, {}, "")
    request = {"index": 0, "attempt": 0, "seed": 1, "prompt": "", "source": None}
    unit = {"file": f"{folder}/made.parquet", "requests": [[request]], "class_id": 0, "negative_prompt": None,
            "steps": 2, "guidance": 1.0}  # fmt: skip
    return GeneratorActor(settings, inspect_pipeline(settings), samples, f"{folder}/precision/pin.json"), {
        "unit": np.array([json.dumps(unit)])
    }


@pytest.mark.parametrize("make", [shard_teacher, file_teacher, generator])
def test_a_repeated_call_answers_the_same_and_pays_for_nothing(make, words, class_pipeline, tmp_path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    actor, batch = make(words, folder, class_pipeline)
    first = actor(batch)
    files = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.iterdir()}
    assert files
    second = actor(batch)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.iterdir()} == files
    answers = [{k: v.tolist() for k, v in one.items() if k != "seconds"} for one in (first, second)]
    assert answers[0] == answers[1]


def cut(unet: Path) -> None:
    (weights,) = unet.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-10])


def grow(unet: Path) -> None:
    """A million layers, which would take minutes and gigabytes before anybody compares them with the weights."""
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps(config | {"layers_per_block": 1_000_000}))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("change", "reason"), [(cut, "cannot be loaded"), (grow, "cannot be loaded .*many more weights than")]
)
def test_a_pipeline_that_does_not_load_is_named_by_a_call(words, class_pipeline, tmp_path, change, reason) -> None:
    """Of what a constructor raises Ray prints pages before the command's own sentence."""
    folder = tmp_path / "pipeline"
    shutil.copytree(class_pipeline, folder)
    change(folder / "unet")
    actor, batch = generator(words, tmp_path, folder)
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"generate.pipeline={folder}: {reason}"):
            actor(batch)
    assert torch.get_default_dtype() == torch.float32, "bf16 was tried too, by a library that makes it the default"


@pytest.mark.parametrize("odd", [{"sample_size": "x"}, {"sample_size": [8]}, {"sample_size": 3}])
def test_a_pipeline_that_makes_no_image_is_named(words, class_pipeline, tmp_path, odd) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(class_pipeline, folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | odd))
    actor, batch = generator(words, tmp_path, folder)
    with pytest.raises(ConfigError, match=f"generate.pipeline={folder}: makes no image"):
        actor(batch)


class Context:
    """Ray's, in an actor that Ray has started again."""

    def get_actor_id(self) -> str:
        return "a"

    was_current_actor_reconstructed = True


def test_the_first_call_after_a_restart_counts_as_begun_before(monkeypatch) -> None:
    assert Restart().note(16)["images_again"].tolist() == [0]  # no actor at all
    monkeypatch.setattr(restarts.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(restarts.ray, "get_runtime_context", Context)
    restart = Restart()
    first, second = restart.note(16), restart.note(8)
    assert (first["images_again"].tolist(), second["images_again"].tolist()) == ([16], [0])
    assert first["seconds_again"][0] > second["seconds_again"][0] == 0


def test_what_was_begun_on_a_node_that_is_gone_does_not_count(monkeypatch) -> None:
    alive = {"a": True, "b": True}
    monkeypatch.setattr(
        restarts.ray, "nodes", lambda: [{"NodeID": node, "Alive": there} for node, there in alive.items()]
    )
    tries = Tries()
    assert [tries.begin("shard", node) for node in "aab"] == [1, 2, 3]
    alive["a"] = False
    assert tries.begin("shard", "b") == 2
    assert tries.begin("other", "b") == 1
    tries.end("shard")
    assert tries.begin("shard", "b") == 1


def dies_of(work: str, deaths: int, folder: Path) -> type:
    """An actor whose process ends in the middle of that piece of work, the first so many times."""

    class Mortal:
        def __init__(self, tries) -> None:
            self._tries = tries
            self._die("the start")

        def _die(self, now: str) -> None:
            with trying(self._tries, now):
                died = len(list(folder.iterdir()))
                if now == work and died < deaths:
                    (folder / str(died)).touch()
                    os._exit(1)

        def __call__(self, row: dict) -> dict:
            self._die(row["item"])
            return row

    return Mortal


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("work", "deaths"), [("b", 2), ("b", 99), pytest.param("the start", 99, marks=pytest.mark.slow)]
)
def test_what_kills_its_actor_each_time_ends_the_stage(work, deaths, ray_session, tmp_path) -> None:
    rows = ray.data.from_items(["a", "b", "c"], override_num_blocks=3)
    done = rows.map(
        dies_of(work, deaths, tmp_path), fn_constructor_kwargs={"tries": new_tries()}, num_cpus=0.5,
        compute=ray.data.ActorPoolStrategy(size=1),
    )  # fmt: skip
    if deaths == 2:
        assert [row["item"] for row in done.iter_rows()] == ["a", "b", "c"]
    else:
        with pytest.raises(Exception, match=f"{work}: tried 4 times, and its process died each time"):
            list(done.iter_rows())
    assert len(list(tmp_path.iterdir())) == min(deaths, 4)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("deaths", [2, 99])
def test_a_shard_that_kills_the_teacher_is_named(deaths, taught, words, progress, monkeypatch, tmp_path) -> None:
    class Mortal:
        def __init__(self, *arguments, **named):
            from raydistill.stages.feature_pass import ShardTeacher  # an actor's own, which is not patched

            self._teacher = ShardTeacher(*arguments, **named)
            self._features, self._teacher.features = self._teacher.features, self.features

        def __call__(self, batch):
            self._shard = str(batch["shard"][0])
            return self._teacher(batch)

        def features(self, *arguments):
            if self._shard == "train-00001" and len(list(notes.iterdir())) < deaths:
                (notes / str(len(list(notes.iterdir())))).touch()
                os._exit(1)
            return self._features(*arguments)

    monkeypatch.setattr(feature_pass, "ShardTeacher", Mortal)
    monkeypatch.setattr(feature_pass, "_FEW_VIEWS", 0)  # a pool for so few too
    config, notes = load_config(words), tmp_path / "notes"
    notes.mkdir()
    samples = next((tmp_path / "workspace").glob("prepare-*/DONE"))
    samples = samples_from_json(json.loads(samples.read_text()) | {"path": str(samples.parent)})
    path = str(tmp_path / "again")

    def write() -> None:
        write_features(FeaturePass(config, samples, ("train",), 2, path), "teach", live_plan(config), progress)

    if deaths == 2:
        write()
        assert len(list((tmp_path / "again").iterdir())) == len(samples.shards["train"])
    else:
        with pytest.raises(Exception, match=r"shard train-00001 \(16 images, \w+ the first\): tried 4 times"):
            write()
    assert len(list(notes.iterdir())) == min(deaths, 4)

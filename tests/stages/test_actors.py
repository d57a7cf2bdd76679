"""Actor calls that Ray makes again, as it does when an actor is lost between its file's rename and its answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydistill.config import load_config
from raydistill.data.decode import encode, pixels
from raydistill.data.sample import SampleSet, sample_id
from raydistill.data.views import WHOLE_IMAGE
from raydistill.infra import restarts
from raydistill.infra.restarts import Restart
from raydistill.models.pipelines import inspect_pipeline
from raydistill.stages.making import GeneratorActor
from raydistill.stages.showing import FileTeacher
from raydistill.stages.teach import ShardTeacher
from tests.stages.conftest import painted

Call = tuple[Callable[[dict], dict], dict]


def shard_teacher(words: list[str], folder: Path, _: Path) -> Call:
    files = [encode(painted(i % 3, np.random.default_rng(i), 32)) for i in range(4)]
    images, ids = np.stack([pixels(file) for file in files]), " ".join(sample_id(file) for file in files)
    parameters = np.tile(WHOLE_IMAGE, (1, 2, 4, 1))
    batch = {"shard": np.array(["train-00000"]), "sample_ids": np.array([ids]), "images": images[None]}
    return ShardTeacher(load_config(words).teacher, 1, str(folder)), {**batch, "parameters": parameters}


def file_teacher(words: list[str], folder: Path, _: Path) -> Call:
    config = load_config(words)
    image = encode(painted(0, np.random.default_rng(0), 32))
    pq.write_table(pa.table({"image": pa.array([image], pa.binary())}), folder / "made.parquet")
    return FileTeacher(config.teacher, config.images, None, config.seed, "teacher"), {
        "file": np.array([f"{folder}/made.parquet"])
    }


def generator(words: list[str], folder: Path, pipeline: Path) -> Call:
    settings = load_config([*words, f"generate.pipeline={pipeline}"]).generate
    samples = SampleSet(str(folder), ("red",), 32, {}, {}, 0, {}, "")
    request = {"index": 0, "attempt": 0, "seed": 1, "prompt": "", "source": None}
    unit = {"file": f"{folder}/made.parquet", "requests": [[request]], "class_id": 0, "negative_prompt": None,
            "steps": 2, "guidance": 1.0}  # fmt: skip
    return GeneratorActor(settings, inspect_pipeline(settings), samples), {"unit": np.array([json.dumps(unit)])}


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
    assert {k: v.tolist() for k, v in second.items()} == {k: v.tolist() for k, v in first.items()}


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

"""Soft targets that are written for others, and a folder of them in the place of a teacher."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file

from raydistill.config import RunConfig, load_config
from raydistill.data.sample import SampleSet
from raydistill.data.targets import read_ids, read_targets
from raydistill.data.views import stored_views
from raydistill.errors import ConfigError, DataError
from raydistill.models.heads import load_head
from raydistill.preflight import refuse_early
from raydistill.results import Outcome
from raydistill.run import run_stages
from raydistill.runtime.progress import Progress
from raydistill.stages.open_folder import refuse_out, write_folder

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session", "taught")]
PAGE = Path(__file__).parents[2] / "docs" / "soft_targets.md"


def ran(words: list[str], *more: str, until: str = "teach") -> tuple[RunConfig, Outcome, str]:
    """A run, and what it said."""
    config, said = load_config([*words, *more]), io.StringIO()
    refuse_early(config)
    return config, run_stages(config, Progress(Console(file=said, width=300)), until), said.getvalue()


def shared(words: list[str], folder: Path, *more: str, with_features: bool = True) -> tuple[RunConfig, Outcome]:
    config, outcome, _ = ran(words, *more)
    write_folder(config, outcome, str(folder), "CC0", with_features, Progress(Console(quiet=True)))
    return config, outcome


def by(folder: Path, words: list[str]) -> list[str]:
    """The same job without a network: its file says no more of the teacher than the folder."""
    job = json.loads(Path(words[0]).read_text())
    job["teacher"] = {"model": f"targets:{folder}"}
    file = Path(words[0]).with_name("by_folder.yaml")
    file.write_text(json.dumps(job))
    return [str(file), *words[1:]]


def all_ids(samples: SampleSet) -> list[str]:
    return [name for shard in range(len(samples.shards["train"])) for name in read_ids(samples, "train", shard)]


def test_the_pages_reader_reads_what_the_command_wrote(words: list[str], tmp_path: Path) -> None:
    """By plain pyarrow and numpy. No teacher runs for it."""
    command = [sys.executable, "-m", "raydistill", "teach", *words, "--out", "my_targets", "--licence", "CC BY 4.0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^teach +done before", done.stdout, re.M)
    block = re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert "raydistill" not in block[1]
    command = [sys.executable, "-c", block[1]]
    read = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True)
    config, outcome, _ = ran(words)
    head, samples = load_head(outcome.adapted.path), outcome.samples
    expected = []
    for shard in range(len(samples.shards["train"])):
        ids = read_ids(samples, "train", shard)
        logits = head.logits(read_targets(outcome.directories["teach"], "train", shard, ids)).astype(np.float16)
        for row, name in enumerate(ids):
            expected += [f"{name} {view} {samples.classes[logits[view, row].argmax()]}" for view in range(2)]
    assert read.stdout.splitlines() == expected
    about = json.loads((tmp_path / "my_targets" / "soft_targets.json").read_text())
    assert (about["licence"], about["classes"]) == ("CC BY 4.0", list(samples.classes))
    assert about["num_images"] == samples.num_rows("train")
    assert about["views"]["seed"] == config.seed
    table = pq.read_table(tmp_path / "my_targets" / about["files"][0]["name"])
    first = table["sample_id"].to_pylist()[0]
    np.testing.assert_array_equal(
        np.stack(table["parameters"].to_numpy())[:2], stored_views(config.views, config.seed, [first])[:, 0]
    )


@pytest.mark.parametrize("strength", ["light", "strong"])
def test_a_student_of_a_folder_is_the_one_of_the_network_bit_for_bit(
    words: list[str], tmp_path: Path, strength: str
) -> None:
    words = [*words, f"views.strength={strength}"]
    _, network, _ = ran(words, until="evaluate")
    shared(words, tmp_path / "folder")
    _, stored, said = ran(by(tmp_path / "folder", words), until="evaluate")
    num_train = network.samples.num_rows("train")
    assert f"2 answers to each of {num_train} images, from {tmp_path}/folder (licence: CC0)" in said
    assert network.directories["teach"] != stored.directories["teach"]
    one, other = (load_file(f"{outcome.student.path}/student.safetensors") for outcome in (network, stored))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert stored.report.student["val"]["accuracy"] == network.report.student["val"]["accuracy"]
    assert stored.report.teacher is None
    assert re.search(r"^teach +done before", ran(by(tmp_path / "folder", words))[2], re.M)


def test_compact_soft_targets_and_logits_alone_are_shared_too(words: list[str], tmp_path: Path) -> None:
    compact = [*words, "views.store=compact"]
    _, made = shared(compact, tmp_path / "compact")
    _, found, _ = ran(by(tmp_path / "compact", words))
    assert json.loads((tmp_path / "compact" / "soft_targets.json").read_text())["features"]["type"] == "int8"
    for shard in range(len(made.samples.shards["train"])):
        ids = read_ids(made.samples, "train", shard)
        ours, theirs = (read_targets(o.directories["teach"], "train", shard, ids) for o in (made, found))
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-6)
    shared(words, tmp_path / "logits", with_features=False)
    assert sorted(os.listdir(tmp_path / "logits")) == ["soft_targets.json", *sorted(
        f"train-{k:05d}.parquet" for k in range(len(made.samples.shards["train"]))
    )]  # fmt: skip
    by_logits = by(tmp_path / "logits", words)
    with pytest.raises(ConfigError, match=r"set loss\.alignment_weight=0 loss\.uniformity_weight=0"):
        ran(by_logits)
    _, student, _ = ran(by_logits, "loss.alignment_weight=0", "loss.uniformity_weight=0", until="distill")
    assert student.student.steps


def test_images_without_a_record_are_counted_and_named(words: list[str], tmp_path: Path, image_folder: Path) -> None:
    _, before = shared(words, tmp_path / "folder")
    larger, rng = tmp_path / "larger", np.random.default_rng(5)
    shutil.copytree(image_folder, larger)
    for number in range(2):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(larger / "unlabelled" / f"new{number}.png")
    with pytest.raises(DataError) as refused:
        ran(by(tmp_path / "folder", words), f"images.path={larger}")
    total = before.samples.num_rows("train") + 2
    assert f"2 of {total} train images have no record of all 2 views" in str(refused.value)
    named = set(re.findall(r"[0-9a-f]{32}", str(refused.value)))
    assert len(named) == 2
    assert named.isdisjoint(all_ids(before.samples))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["views.per_image=3"], r"set views\.per_image=2"),
        (["views.min_scale=0.5", "images.size=48"], r"set images\.size=32 views\.min_scale=0\.08"),
        (["views.strength=medium", "views.strong_share=1"], r"set views\.brightness=0\.0 .*views\.hue=0\.0"),
        (["images.fit=pad"], r"set images\.fit=crop"),
        (["teacher.head=native"], r"teacher\.head needs a network"),
        (["views.per_image=fresh"], r"views\.per_image=fresh needs a network"),
        (["views.store=compact"], r"views\.store=compact needs a network"),
        (["generate.pipeline=owner/name"], "there are none to generated images"),
        (["teacher.model=targets:nowhere"], "no such file; name a folder"),
    ],
)
def test_a_job_that_the_folder_does_not_fit_is_told_what_to_set(
    words: list[str], tmp_path: Path, more: list[str], reason: str
) -> None:
    shared(words, tmp_path / "folder")
    with contextlib.chdir(tmp_path), pytest.raises((ConfigError, DataError), match=reason):
        ran(by(tmp_path / "folder", words), *more)


def test_other_classes_are_named(words: list[str], tmp_path: Path, image_folder: Path) -> None:
    shared(words, tmp_path / "folder")
    other = tmp_path / "other"
    shutil.copytree(image_folder, other)
    first = sorted(path.name for path in other.iterdir() if path.name != "unlabelled")[0]
    (other / first).rename(other / "zebra")
    with pytest.raises(ConfigError, match=r"its 3 classes are not the 3 of images\.path: number 0 is"):
        ran(by(tmp_path / "folder", words), f"images.path={other}")


def test_what_cannot_be_written_is_refused_before_the_teacher_runs(words: list[str], tmp_path: Path) -> None:
    shared(words, tmp_path / "folder")
    with pytest.raises(ConfigError, match="it holds soft targets already"):
        refuse_out(load_config(words), str(tmp_path / "folder"))
    with pytest.raises(ConfigError, match="is such a folder already"):
        refuse_out(load_config(by(tmp_path / "folder", words)), str(tmp_path / "more"))
    with pytest.raises(ConfigError, match="this job stores none"):
        refuse_out(load_config([*words, "views.per_image=fresh"]), str(tmp_path / "more"))

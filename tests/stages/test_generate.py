"""generate, whole, with a fast real pipeline: the same images however often, in whatever batches, by however many
actors and after whatever kill; and what is done with them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from raydistill.config import load_config
from raydistill.data.decode import decode
from raydistill.data.sample import decode_shard, sample_id
from raydistill.data.targets import read_targets
from raydistill.errors import ConfigError, StageError
from raydistill.stages.generate import forecast, label_weights
from raydistill.stages.run import run_stages
from raydistill.stages.summary import closing_table

# No node of the tests' cluster has the label, and any will do.
ANYWHERE = ["cluster.generator_labels={pool: spot}", "cluster.generator_fallback={}"]
NO_TEACHER = ["teacher=null", "loss.kd_weight=0", "loss.alignment_weight=0", "loss.uniformity_weight=0"]


@pytest.fixture
def generating(words, class_pipeline) -> list[str]:
    return [*words, f"generate.pipeline={class_pipeline}", "generate.steps=2", "generate.per_class=6",
            "generate.batch_size=4"]  # fmt: skip


def raw_images(workspace: Path) -> dict[tuple[str, int, int], bytes]:
    """Everything that was made, by class, index and attempt."""
    found: dict[tuple[str, int, int], bytes] = {}
    for file in workspace.glob("generated/*/*.parquet"):
        name = json.loads((file.parent / "identity.json").read_text())["class"]
        for row in pq.read_table(file).to_pylist():
            key = (name, row["index"], row["attempt"])
            assert found.setdefault(key, row["image"]) == row["image"]
    return found


def set_hash(outcome) -> str:
    """Of the chosen images in their order, and of the ledger."""
    folder = Path(outcome.generated.samples.path)
    digest = hashlib.sha256()
    for shard in sorted(folder.glob("train-*.parquet")):
        digest.update(shard.read_bytes())
    ledger = pq.read_table(folder / "ledger.parquet").drop_columns(["file", "seconds"])
    digest.update(json.dumps(ledger.to_pylist()).encode())
    return digest.hexdigest()


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session")
class TestWithRay:
    def test_generated_images_are_taught_and_trained_on_and_never_scored(self, generating, progress) -> None:
        generating = [*generating, "images.shard_size=32"]
        plain = run_stages(load_config([*generating, "generate=null"]), progress)
        outcome = run_stages(load_config([*generating, "generate.filter.weigh=true"]), progress)
        assert outcome.directories["teach"] == plain.directories["teach"]  # no real image was taught again
        generated = outcome.generated
        assert generated.kept == {"blue": 6, "green": 6, "red": 6}
        samples = generated.samples
        (table,) = (decode_shard(p.read_bytes()) for p in sorted(Path(samples.path).glob("*-00000.parquet")))
        rows = table.to_pylist()
        raw = {sample_id(image): (key, image) for key, image in raw_images(Path(samples.path).parent).items()}
        for row in rows:
            key, image = raw[row["sample_id"]]
            assert samples.classes[row["label"]] == key[0]
            assert (row["source"], row["split"]) == ("generated", "train")
            np.testing.assert_array_equal(
                np.asarray(decode(row["image"], 32, "crop", 10**6)), np.asarray(decode(image, 32, "crop", 10**6))
            )
        targets = read_targets(outcome.directories["teach_generated"], "train", 0, [row["sample_id"] for row in rows])
        assert targets.shape[:2] == (2, 18)
        weights = label_weights(load_config([*generating, "generate.filter.weigh=true"]), generated)
        assert set(weights) == {row["sample_id"] for row in rows}
        assert all(0 < weight < 1 for weight in weights.values())
        assert outcome.report.student["val"]["images"] == plain.report.student["val"]["images"]
        assert outcome.student.steps == plain.student.steps  # the same budget
        assert outcome.without_generated == plain.report
        shown = Console(width=200, record=True, file=io.StringIO())
        shown.print(closing_table(load_config(generating), outcome))
        now, then = (r.student["test"]["accuracy"] for r in (outcome.report, plain.report))
        assert f"test by generated images  {100 * (now - then):+.1f} points" in shown.export_text()
        assert outcome.directories["distill"] != plain.directories["distill"]
        for name in ("sheet-000.png", "ledger.parquet", "generate.json"):
            assert (Path(samples.path) / name).stat().st_size > 0
        again = run_stages(load_config([*generating, "generate.filter.weigh=true"]), progress)
        assert set(again.seconds.values()) == {0.0}
        made = {p: p.stat().st_mtime_ns for p in Path(samples.path).parent.glob("generated/*/*.parquet")}
        unjudged = run_stages(load_config(generating), progress, "generate")
        assert unjudged.generated.kept == generated.kept
        assert {p: p.stat().st_mtime_ns for p in Path(samples.path).parent.glob("generated/*/*.parquet")} == made

    def test_batches_actors_order_and_more_images_change_no_image(self, generating, progress, tmp_path) -> None:
        workspace = tmp_path / "workspace"

        def run(*more: str):
            return run_stages(load_config([*generating, *NO_TEACHER, *more]), progress, "generate")

        hashes, images = set(), []
        for more in (
            ("generate.batch_size=1", "cluster.generator_actors=[1,1]"),
            ("generate.batch_size=4", "cluster.generator_actors=[2,2]", *ANYWHERE),
        ):
            hashes.add(set_hash(run(*more)))
            images.append(raw_images(workspace))
            for folder in [workspace / "generated", *workspace.glob("generate-*")]:
                shutil.rmtree(folder)
        run("generate.per_class=2", "generate.batch_size=2")
        before = {p: p.stat().st_mtime_ns for p in workspace.glob("generated/*/*.parquet")}
        hashes.add(set_hash(run("generate.batch_size=3")))
        assert {p: p.stat().st_mtime_ns for p in before} == before
        images.append(raw_images(workspace))
        assert len(hashes) == 1
        assert images[0] == images[1] == images[2]
        assert len(images[0]) == 18

    @pytest.mark.slow
    def test_all_rejected_ends_the_run_and_keeps_what_was_made(self, generating, progress, tmp_path) -> None:
        config = load_config([*generating, "generate.filter.contrast=200", "generate.attempts=2"])
        with pytest.raises(StageError, match=r"not one image of 'blue', 'green', 'red' was kept \(36 near-constant\)"):
            run_stages(config, progress, "generate")
        workspace = tmp_path / "workspace"
        assert len(raw_images(workspace)) == 36
        assert not list(workspace.glob("generate-*/DONE"))
        (folder,) = workspace.glob("generate-*")
        assert set(pq.read_table(folder / "ledger.parquet")["verdict"].to_pylist()) == {"near-constant"}
        assert len(list(folder.glob("sheet-*.png"))) == 3

    @pytest.mark.slow
    def test_where_no_image_is_wanted_the_student_is_that_of_the_real_ones(self, generating, progress) -> None:
        more = ["generate.ratio=0", "generate.per_class=null"]
        without = run_stages(load_config([*generating, *more, "generate=null"]), progress)
        outcome = run_stages(load_config([*generating, *more]), progress)
        assert sum(outcome.generated.kept.values()) == 0
        assert outcome.report.student == without.report.student

    @pytest.mark.slow
    def test_a_generated_copy_of_a_test_image_is_rejected(self, generating, progress, tmp_path) -> None:
        """The test split holds what the pipeline makes: leakage."""
        first = run_stages(load_config([*generating, *NO_TEACHER]), progress, "generate")
        images = tmp_path / "leaky"
        for (name, index, _), image in raw_images(tmp_path / "workspace").items():
            split = "test" if index < 2 else "val" if index < 3 else "train"
            (images / split / name).mkdir(parents=True, exist_ok=True)
            (images / split / name / f"{index}.png").write_bytes(image)
        more = [f"images.path={images}", "images.size=16", "generate.attempts=1"]
        leaky = run_stages(load_config([*generating, *NO_TEACHER, *more]), progress, "generate")
        assert sum(first.generated.kept.values()) == 18
        assert leaky.generated.rejected == {"duplicate of a val or test image": 9}
        assert leaky.generated.missing == {"blue": 3, "green": 3, "red": 3}

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["generate.pipeline=/nowhere"], "no such folder"),
            (["generate.class_ids={red: 0}", "images.path=OTHER"], "does not know the classes"),
            (["generate.scheduler=Nope"], "no scheduler of this name"),
            (["generate.filter.class_confidence={cyan: 0.5}", "WITH_TEACHER"], "no class 'cyan'"),
            (["cluster.generator_labels={pool: spot}"], "would be waited for without end"),
            (["generate.size=2048", "generate.per_class=100000000"], "are free in"),
        ],
    )
    def test_what_cannot_work_is_refused_before_an_image_is_made(
        self, generating, progress, tmp_path, class_folders, more, message
    ) -> None:
        folders = {f"{split}/{name}": 3 for split in ("train", "val") for name in ("cat", "red")}
        other = f"images.path={class_folders(folders)}"
        without = [] if "WITH_TEACHER" in more else NO_TEACHER
        more = [word for word in more if word != "WITH_TEACHER"]
        words = [*generating, *without, *(other if word == "images.path=OTHER" else word for word in more)]
        with pytest.raises(ConfigError, match=message):
            run_stages(load_config(words), progress, "generate")
        assert not list(tmp_path.glob("workspace/generated/*/*.parquet"))

    @pytest.mark.slow
    def test_a_killed_generator_actor_changes_nothing(self, generating, progress, tmp_path) -> None:
        words = [*generating, *NO_TEACHER, "generate.per_class=24", "generate.batch_size=2", "generate.steps=8"]
        unbroken = run_stages(load_config([*words, f"workspace={tmp_path}/unbroken"]), progress, "generate")
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run_stages, load_config(words), progress, "generate")
            deadline = time.monotonic() + 120
            while not list(tmp_path.glob("workspace/generated/*/*.parquet")) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not running.done(), "nothing was left to kill"
            victims = [
                p for p in psutil.process_iter(["cmdline"]) if "GeneratorActor" in " ".join(p.info["cmdline"] or [])
            ]
            victims[0].kill()
            broken = running.result(timeout=180)
        assert set_hash(broken) == set_hash(unbroken)

    def test_the_forecast_names_prompts_counts_and_costs(self, generating, progress, text_pipeline) -> None:
        config = load_config(generating)
        with pytest.raises(ConfigError, match="raydistill prepare"):
            list(forecast(config))
        run_stages(config, progress, "prepare")
        lines = "\n".join(forecast(config))
        assert "red: 6 images, 0 of them made before, 2 steps each" in lines
        assert "18 images, 36 steps" in lines
        prompted = [*generating, f"generate.pipeline={text_pipeline(True)}", "generate.templates=['a {class}']"]
        assert "100%  a red" in "\n".join(forecast(load_config(prompted)))


def command(words: list[str], *more: str) -> subprocess.Popen:
    arguments = [sys.executable, "-c", "from raydistill.cli import main; main()", "generate", *words, *more]
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_killed_drivers_at_random_times_make_the_same_set(generating, progress, tmp_path) -> None:
    """kill -9 of the driver and all it started, up to twenty times, until nothing is left to make."""
    words = [*generating, *NO_TEACHER, "generate.per_class=40", "generate.batch_size=2", "generate.steps=10"]
    unbroken = command(words, f"workspace={tmp_path}/unbroken")
    assert unbroken.wait(300) == 0, unbroken.stdout.read()
    broken, chance, killed = tmp_path / "broken", random.Random(0), 0
    for _ in range(20):
        process = command(words, f"workspace={broken}")
        time.sleep(chance.uniform(4, 16))
        if process.poll() is not None:  # all that was left is made
            assert process.returncode == 0, process.stdout.read()
            break
        killed += 1
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for partial in broken.glob("generated/*/*.parquet"):
            pq.read_table(partial)  # whole under its final name
    last = command(words, f"workspace={broken}")
    assert last.wait(300) == 0, last.stdout.read()
    assert killed >= 3
    assert raw_images(broken) == raw_images(tmp_path / "unbroken")
    shards = [
        [p.read_bytes() for p in sorted(folder.glob("generate-*/train-*.parquet"))]
        for folder in (broken, tmp_path / "unbroken")
    ]
    assert shards[0] == shards[1] != []

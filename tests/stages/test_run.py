"""The whole flow with Ray, on a small folder of real image files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import transformers
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file, save_file

from raydistill.cluster.plan import plan_resources
from raydistill.config import Student, load_config
from raydistill.data.compact import PROJECTION_FILE, read_projection, same
from raydistill.data.sample import decode_shard, sample_id, samples_from_json, working_images
from raydistill.data.targets import read_columns, read_targets
from raydistill.data.views import render, view_parameters
from raydistill.engine.batches import DistillJob
from raydistill.engine.fresh_stream import FreshStream
from raydistill.engine.records import read_epochs
from raydistill.errors import CheckpointError, ConfigError, DataError
from raydistill.graph import find_work
from raydistill.identity import taught_before, teach_directory, tuned
from raydistill.inference.predict import find_units, predict_locally
from raydistill.models.student import read_student
from raydistill.models.teacher import load_teacher
from raydistill.preflight import check_run
from raydistill.run import run_stages
from raydistill.runtime.progress import Progress
from raydistill.stages import feature_pass, prepare
from raydistill.storage.directory import read_bill
from tests.models.conftest import classifier
from tests.processes import ray_processes, run_and_kill, wait_for
from tests.small_run import CLASSES, painted, save_student

KINDS = {".parquet", ".safetensors"}

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]


def rows(directory: str, split: str) -> list[dict]:
    shards = sorted(Path(directory).glob(f"{split}-*.parquet"))
    return [row for shard in shards for row in decode_shard(shard.read_bytes()).to_pylist()]


def markers(workspace: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in workspace.glob("*/*") if p.is_file()}


def metrics_of(workspace: Path) -> list[tuple[str, ...]]:
    with sqlite3.connect(workspace / "mlflow.db") as database:
        return database.execute("select run_uuid, key, step, value from metrics order by 1, 2, 3").fetchall()


def test_a_run_and_the_same_again(words, progress, tmp_path, image_folder) -> None:
    config = load_config([*words, "tracking.enabled=true"])
    outcome = run_stages(config, progress)
    workspace = tmp_path / "workspace"
    assert {p.parent.name.rpartition("-")[0] for p in workspace.glob("*/DONE")} == {
        "prepare", "features", "adapt", "teach", "distill", "evaluate",
    }  # fmt: skip
    samples = outcome.samples
    refused = {Path(r["path"]).name: r["reason"] for r in json.loads((Path(samples.path) / "refused.json").read_text())}
    assert set(refused) == {"cut.png", "copy.png"} or set(refused) == {"cut.png", "0.png"}
    assert "truncated" in refused["cut.png"]
    everything = [row for split in ("train", "val", "test") for row in rows(samples.path, split)]
    assert len(everything) == len({row["sample_id"] for row in everything}) == 3 * 24 + 12
    files = {sample_id(p.read_bytes()): p for p in image_folder.rglob("*.png") if p.name != "cut.png"}
    for row in everything:  # no sample lost its own label
        folder = files[row["sample_id"]].parent.name
        assert (None if row["label"] is None else samples.classes[row["label"]]) == (
            None if folder == "unlabelled" else folder
        )
    # What `evaluate` says of the teacher is what `adapt` measured.
    assert outcome.report.teacher["val"]["accuracy"] == pytest.approx(outcome.adapted.val_accuracy)
    assert outcome.report.student["val"]["accuracy"] == pytest.approx(outcome.student.val_accuracy)
    with sqlite3.connect(workspace / "mlflow.db") as database:
        runs = database.execute("select run_uuid, status from runs").fetchall()
        children = database.execute("select count(*) from tags where key = 'mlflow.parentRunId'").fetchone()[0]
        epochs = database.execute("select count(distinct step) from metrics where key = 'kd'").fetchone()[0]
        refused_files = database.execute("select value from metrics where key = 'num_refused'").fetchall()
    assert refused_files == [(2.0,)]
    assert {status for _, status in runs} == {"FINISHED"}
    assert (len(runs), children, epochs) == (8, 7, 3)

    before, stored = markers(workspace), metrics_of(workspace)
    again = run_stages(config, progress)
    assert metrics_of(workspace) == stored
    assert again.report == outcome.report
    assert set(again.seconds.values()) == {0.0}
    changed = {p for p, when in markers(workspace).items() if before.get(p) != when and not p.endswith("mlflow.db")}
    assert changed == set()
    latest = workspace / "latest"
    assert {link.name: str(link.resolve()) for link in latest.iterdir() if link.is_symlink()} == {
        **outcome.directories, "decoded": str(next(workspace.glob("decoded-*")))
    }  # fmt: skip


@pytest.mark.usefixtures("taught")
def test_soft_targets_are_the_teacher_of_that_very_view(words, progress) -> None:
    config = load_config(words)
    outcome = run_stages(config, progress, until="teach")
    backbone, _, _ = load_teacher(config.teacher)
    table = decode_shard((Path(outcome.samples.path) / "train-00001.parquet").read_bytes())
    ids = table["sample_id"].to_pylist()
    stored = read_targets(outcome.directories["teach"], "train", 1, ids)
    for view in range(2):
        for row in (0, 5):
            image = torch.from_numpy(working_images(table, config.images.size)[row : row + 1].copy())
            parameters = torch.from_numpy(view_parameters(config.views, config.seed, [ids[row]], [view]))
            alone = backbone(render(image, parameters, backbone.preprocessing)).numpy()[0]
            np.testing.assert_allclose(stored[view, row].astype(np.float32), alone, atol=2e-3, rtol=2e-3)


@pytest.mark.usefixtures("taught")
def test_fresh_views_stream_in_the_loop_order_with_their_own_features(words, progress) -> None:
    config = load_config([*words, "views.per_image=fresh", "distill.epochs=6"])
    outcome = run_stages(config, progress, until="adapt")
    job = DistillJob(config, outcome.samples, outcome.directories["adapt"], outcome.adapted.path, None)
    stream = FreshStream(job, plan_resources(config, 2, 0, 2))().materialize()
    assert stream.num_blocks() == 4  # 30 steps in units of 8: it flows in pieces, not as one
    backbone, _, _ = load_teacher(config.teacher)
    seen = []
    for rows_ in stream.iter_batches(batch_size=job.batch_size, batch_format="numpy"):
        seen += rows_["sample_id"].tolist()
        views = render(
            torch.from_numpy(rows_["image"].copy()),
            torch.from_numpy(rows_["parameters"].copy()),
            backbone.preprocessing,
        )
        np.testing.assert_allclose(rows_["features"].astype(np.float32), backbone(views).numpy(), atol=2e-3, rtol=2e-3)
    assert len(seen) == job.total_steps * job.batch_size
    order = job.order(0)
    expected = []
    names = [
        decode_shard((Path(outcome.samples.path) / f"train-{k:05d}.parquet").read_bytes())["sample_id"].to_pylist()
        for k in range(len(outcome.samples.shards["train"]))
    ]
    for _ in range(job.total_steps):
        visits = next(order)
        expected += [names[k][r] for k, r in zip(visits.shard, visits.row, strict=True)]
    assert seen == expected


def epoch_losses(words: list[str], progress, *more: str) -> list[dict[str, float]]:
    outcome = run_stages(load_config([*words, *more]), progress, until="distill")
    return [json.loads(e.read_text()) for e in sorted(Path(outcome.student.path).glob("epochs/*.json"))]


@pytest.mark.usefixtures("taught")
def test_two_train_workers_take_the_steps_of_one_process(words, progress, tmp_path) -> None:
    """Where no term looks beyond a worker's share (no batch norm, no uniformity), sharing a batch changes nothing,
    though one has an image more; each puts the whole batch into CRD's memory in the order of one process. The student
    holds a weight that nothing reads, DINOv2's token for masked pictures."""
    classifier("Dinov2").save_pretrained(tmp_path / "dinov2")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dinov2")
    more = [f"student.model={tmp_path / 'dinov2'}", "student.init=pretrained", "student.size=32"]
    more += ["loss.uniformity_weight=0", "distill.labelled_share=1", "loss.projection_head=two_layer"]
    more += ["distill.batch_size=25", "loss.crd_weight=1", "loss.crd_negatives=24", "loss.crd_memory=40"]
    alone, two = (epoch_losses(words, progress, *more, f"distill.num_workers={n}") for n in (0, 2))
    for name in ("loss", "task", "kd", "alignment", "crd"):
        assert [e[name] for e in two] == pytest.approx([e[name] for e in alone], abs=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("taught")
def test_fresh_views_train_alike_in_this_process_and_on_a_worker(words, progress) -> None:
    alone, one = (epoch_losses(words, progress, "views.per_image=fresh", f"distill.num_workers={n}") for n in (0, 1))
    assert [e["loss"] for e in one] == pytest.approx([e["loss"] for e in alone], abs=1e-4)
    assert [e["step"] for e in one] == [4, 8, 12]


@pytest.mark.usefixtures("taught")
@pytest.mark.slow
def test_two_train_workers_share_fresh_views(words, progress) -> None:
    two = epoch_losses(words, progress, "views.per_image=fresh", "distill.num_workers=2")
    assert [e["step"] for e in two] == [4, 8, 12]
    assert two[-1]["loss"] < two[0]["loss"]


FINE_TUNE = ["teacher.head=fine_tune", "teacher.fine_tune_epochs=2"]


def content(folder: str) -> str:
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()


@pytest.mark.usefixtures("taught")
def test_a_fine_tuned_teacher_is_made_once_and_then_stands_still(words, progress, tmp_path, teacher_weights) -> None:
    config = load_config([*words, *FINE_TUNE])
    samples = run_stages(config, progress, until="prepare").samples
    assert tuned(config, samples) is None
    folder = run_stages(config, progress, until="adapt").directories["fine_tune"]
    made, done = content(folder), json.loads(Path(folder, "DONE").read_text())
    assert Path(folder).name.startswith("distill-")
    assert len(list(Path(folder).glob("epochs/*.json"))) == 2
    network, classes = read_student(folder)
    assert classes == samples.classes
    start, state = load_file(teacher_weights), network.network.state_dict()
    assert all(not np.array_equal(state[k], start[k]) for k in start if k.endswith(("running_mean", "conv1.weight")))

    outcome = run_stages(config, progress)
    assert outcome.directories["fine_tune"] == folder
    assert content(folder) == made  # batch norm included: nothing that distill does reaches the teacher
    assert outcome.adapted.val_accuracy == pytest.approx(done["val_accuracy"])
    assert outcome.report.teacher["val"]["accuracy"] == pytest.approx(done["val_accuracy"])
    later = tuned(config, samples)
    assert (later.teacher.model, later.teacher.head) == (folder, "native")

    before = markers(tmp_path / "workspace")
    again = run_stages(config, progress)
    assert set(again.seconds.values()) == {0.0}
    assert again.report == outcome.report
    changed = {p for p, when in markers(tmp_path / "workspace").items() if before.get(p) != when}
    assert {Path(p).name for p in changed} <= {"mlflow.db"}


@pytest.mark.slow
def test_fine_tuning_knows_classes_that_differ_in_case_and_workspaces_that_are_urls(
    words, progress, tmp_path, image_folder
) -> None:
    table, names = tmp_path / "set.csv", {"red": "Cat", "green": "cat"}
    lines = [f"{image_folder}/{c}/{i}.png,{name}\n" for c, name in names.items() for i in range(1, 20)]
    table.write_text("path,label\n" + "".join(lines))
    config = table_job(words, table, *FINE_TUNE, f"workspace=file://{tmp_path}/url")
    outcome = run_stages(config, progress, until="adapt")
    folder = outcome.directories["fine_tune"]
    assert folder.startswith("file://")
    done = json.loads(Path(folder.removeprefix("file://"), "DONE").read_text())
    assert outcome.adapted.val_accuracy == pytest.approx(done["val_accuracy"])
    assert set(run_stages(config, progress, until="adapt").seconds.values()) == {0.0}


def test_a_teacher_that_cannot_be_fine_tuned_is_refused_before_anything_is_written(words, progress, tmp_path) -> None:
    alone = load_config([*words, *FINE_TUNE, "teacher.fine_tune_batch_size=1", "student.model=timm:test_vit",
                         "student.size=32", "loss.projection_head=two_layer"])  # fmt: skip
    student = save_student(tmp_path / "student", Student(model="timm:test_resnet", size=32), ["a", "b", "c"])
    a_student = load_config([*words, *FINE_TUNE, f"teacher.model={student}", "teacher.weights=null"])
    with pytest.raises(ConfigError, match=r"teacher\.fine_tune_batch_size=1 .*test_resnet has batch norm"):
        run_stages(alone, progress)
    with pytest.raises(ConfigError, match=rf"teacher\.head=fine_tune.*{student}"):
        run_stages(a_student, progress)
    assert not list((tmp_path / "workspace").glob("*-*/*"))


@pytest.mark.usefixtures("taught")
@pytest.mark.slow
def test_the_student_of_one_run_teaches_in_the_next(words, progress, tmp_path) -> None:
    first = run_stages(load_config(words), progress, until="distill")
    more = ["teacher.weights=null", "teacher.size=null", "teacher.head=native"]
    config = load_config([*words, *more, f"teacher.model={first.student.path}"])
    outcome = run_stages(config, progress)
    assert outcome.adapted.val_accuracy == pytest.approx(first.student.val_accuracy)
    assert outcome.report.teacher["val"]["accuracy"] == pytest.approx(first.student.val_accuracy)
    assert outcome.student.path != first.student.path
    # It is known by what it is, not by where it lies.
    elsewhere = shutil.copytree(first.student.path, tmp_path / "elsewhere")
    for leftover in ("epochs", "identity.json", "DONE"):
        path = elsewhere / leftover
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run_stages(load_config([*words, *more, f"teacher.model={elsewhere}"]), progress)
    assert set(again.seconds.values()) == {0.0}
    assert again.report == outcome.report


def table_job(words: list[str], path: Path, *more: str):
    return load_config([*words, f"images.path={path}", *more])


@pytest.mark.slow
@pytest.mark.usefixtures("taught")
def test_csv_and_parquet_give_the_samples_of_the_folder(words, progress, image_folder, tmp_path) -> None:
    files = sorted(p for p in image_folder.rglob("*.png") if p.name not in ("cut.png", "copy.png"))
    label = [None if p.parent.name == "unlabelled" else p.parent.name for p in files]
    table = tmp_path / "set.csv"
    table.write_text("path,label\n" + "".join(f"{p},{name or ''}\n" for p, name in zip(files, label, strict=True)))
    parquet = tmp_path / "set.parquet"
    pq.write_table(pa.table({"image": [p.read_bytes() for p in files], "label": label}), parquet, row_group_size=10)
    hashes = set()
    for path in (image_folder, table, parquet):
        samples = run_stages(table_job(words, path), progress, until="prepare").samples
        hashes.add((tuple(samples.ids.items()), tuple(samples.labels.items()), samples.classes))
    assert len(hashes) == 1


def test_a_class_that_only_bad_files_had_stops_prepare(words, progress, tmp_path, image_folder) -> None:
    table = tmp_path / "set.csv"
    good = "".join(f"{image_folder}/{c}/{i}.png,{c}\n" for c in ("red", "green") for i in range(20))
    table.write_text(f"path,label\n{good}{image_folder}/red/cut.png,lonely\n")
    with pytest.raises(DataError, match="lonely"):
        run_stages(table_job(words, table), progress, until="prepare")


def test_too_many_bad_files_stop_prepare(words, progress, tmp_path, image_folder) -> None:
    table = tmp_path / "set.csv"
    good = "".join(f"{image_folder}/{c}/{i}.png,{c}\n" for c in ("red", "green") for i in range(5))
    table.write_text(f"path,label\n{good}{image_folder}/nowhere.png,red\n")
    with pytest.raises(DataError, match=r"1 of 11 .*max_bad_share=0.05.*nowhere.png"):
        run_stages(table_job(words, table, "tracking.enabled=true"), progress, until="prepare")
    assert {status for _, status in states(tmp_path)} == {"FAILED"}
    assert run_stages(table_job(words, table, "images.max_bad_share=0.1"), progress, until="prepare").samples


def test_prepare_stops_as_soon_as_too_many_files_are_bad(words, progress, tmp_path) -> None:
    """One bad file of the first 32, and more than 200 to come, which nobody waits for."""
    for i in range(256):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"")
    table = tmp_path / "set.csv"
    table.write_text("path,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(256)))
    with pytest.raises(DataError, match=r"1 of 256 .*max_bad_share=0.0, after (32|64|96|128|160) images: .*/3.png"):
        run_stages(table_job(words, table, "images.max_bad_share=0"), progress, until="prepare")


def test_fewer_train_images_than_workers_are_refused(words, tmp_path, image_folder) -> None:
    table = tmp_path / "set.csv"
    table.write_text("path,label\n" + "".join(f"{image_folder}/{c}/1.png,{c}\n" for c in ("red", "green")))
    config = table_job(words, table, "distill.num_workers=3")
    with pytest.raises(DataError, match="2 train images for the 3 workers of"):
        check_run(config, find_work(config, "distill"))


@pytest.mark.usefixtures("taught")
def test_new_labels_cost_no_teacher_pass(words, progress, tmp_path) -> None:
    """They change the order of the train images, so `teach` copies every row to where it stands now."""
    first = run_stages(load_config(words), progress, until="teach")
    said = io.StringIO()
    told = Progress(Console(file=said, width=200))
    fewer = run_stages(load_config([*words, "images.num_labelled=30"]), told, until="teach")
    num_train = fewer.samples.num_rows("train")
    assert num_train == first.samples.num_rows("train")
    assert f"teach     copied the views of {num_train} images" in said.getvalue()
    assert "test_features" not in fewer.seconds
    assert fewer.adapted.num_train == 30
    assert fewer.samples.shards["train"] == (16, 14, *[16] * ((num_train - 30) // 16), (num_train - 30) % 16)
    for shard in range(len(fewer.samples.shards["train"])):
        labels = read_columns(fewer.samples, "train", shard, "label")["label"]
        assert labels.null_count == (0 if shard < 2 else len(labels))


@pytest.mark.slow
@pytest.mark.usefixtures("taught")
def test_a_smaller_pool_keeps_its_labels_and_grows_by_adding(words, progress) -> None:
    def train(*more: str) -> dict[str, int | None]:
        config = load_config([*words, "images.num_labelled=30", *more])
        samples = run_stages(config, progress, until="prepare").samples
        return {row["sample_id"]: row["label"] for row in rows(samples.path, "train")}

    whole = train()
    pools = [train(f"images.num_unlabelled={count}") for count in (0, 10)]
    labelled = {i: label for i, label in whole.items() if label is not None}
    assert len(labelled) == 30
    assert len(whole) > 40
    assert pools[0] == labelled
    assert len(pools[1]) == 40
    assert pools[0].items() < pools[1].items() < whole.items()


@pytest.mark.usefixtures("taught")
def test_half_done_teach_makes_only_what_is_missing(words, progress) -> None:
    config = load_config(words)
    outcome = run_stages(config, progress, until="teach")
    directory = Path(outcome.directories["teach"])
    made = sorted(directory.glob("*.safetensors"))
    expected = load_file(made[1])
    when = made[0].stat().st_mtime_ns
    made[1].unlink()
    (directory / "DONE").unlink()
    run_stages(config, progress, until="teach")
    assert made[0].stat().st_mtime_ns == when
    again = load_file(made[1])
    np.testing.assert_array_equal(again["features"], expected["features"])


@pytest.mark.usefixtures("taught")
def test_a_teacher_that_overflows_teaches_in_fp32_and_says_so(words, tmp_path, teacher_weights, caplog) -> None:
    """The same function as the teacher of the other tests, with inner numbers that fp16 does not hold."""
    expected = run_stages(load_config(words), Progress(Console(quiet=True)), until="teach")
    weights = load_file(teacher_weights)
    for name, power in (("weight", 1), ("running_mean", 1), ("running_var", 2)):
        weights[f"conv1.{0 if name == 'weight' else 1}.{name}"] *= np.float32(1e6) ** power
    save_file(weights, tmp_path / "strong.safetensors")
    more, said = [f"teacher.weights={tmp_path}/strong.safetensors", "teacher.precision=fp16"], io.StringIO()
    outcome = run_stages(load_config([*words, *more]), Progress(Console(file=said, width=200)), until="teach")
    assert "teach     fp16; 16 of 16 answers equal, largest difference of a logit 0\n" in said.getvalue()
    views = 2 * outcome.samples.num_rows("train")
    assert f"teach: {views} views were computed again in fp32" in caplog.text
    before, after = expected.directories["teach"], outcome.directories["teach"]
    done = json.loads(Path(after, "DONE").read_text())
    assert (done["precision"], done["equal_in_fp32"], done["largest_difference"]) == ("fp16", 1.0, 0.0)
    for file in Path(before).glob("*.safetensors"):
        one, other = (load_file(folder / file.name)["features"] for folder in (Path(before), Path(after)))
        np.testing.assert_allclose(one, other, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("taught")
def test_a_folder_that_grew_costs_the_teacher_its_new_images(words, tmp_path, image_folder) -> None:
    """The stored features of the smaller set are changed by hand, so that copies of them are known from new ones."""
    said = io.StringIO()
    progress = Progress(Console(file=said, width=200))
    before = run_stages(load_config(words), progress, until="teach")
    for file in Path(before.directories["teach"]).glob("*.safetensors"):
        stored = load_file(file)
        save_file({**stored, "features": np.full_like(stored["features"], 7)}, file)
    larger = tmp_path / "larger"
    shutil.copytree(image_folder, larger)
    rng = np.random.default_rng(5)
    for i in range(3):
        painted(1, rng, 40).save(larger / "unlabelled" / f"new{i}.png")
    config = load_config([*words, f"images.path={larger}"])
    after = run_stages(config, progress, until="teach")
    num_before, num_after = before.samples.num_rows("train"), after.samples.num_rows("train")
    assert num_after == num_before + 3
    assert f"teach     copied the views of {num_before} images" in said.getvalue()
    known = {row["sample_id"] for row in rows(before.samples.path, "train")}
    backbone, _, _ = load_teacher(config.teacher)
    for number in range(len(after.samples.shards["train"])):
        table = decode_shard((Path(after.samples.path) / f"train-{number:05d}.parquet").read_bytes())
        ids = table["sample_id"].to_pylist()
        stored = read_targets(after.directories["teach"], "train", number, ids)
        for row, (name, image) in enumerate(zip(ids, working_images(table, config.images.size), strict=True)):
            for view in range(2):
                expected = np.full(stored.shape[2], 7.0)
                if name not in known:
                    picture = torch.from_numpy(image.copy())[None]
                    parameters = torch.from_numpy(view_parameters(config.views, config.seed, [name], [view]))
                    expected = backbone(render(picture, parameters, backbone.preprocessing)).numpy()[0]
                np.testing.assert_allclose(stored[view, row].astype(np.float32), expected, atol=2e-3, rtol=2e-3)
    assert taught_before(teach_directory(config, before.samples))
    other_views = load_config([*words, "views.min_scale=0.9"])
    assert not taught_before(teach_directory(other_views, before.samples))


@pytest.mark.usefixtures("taught")
def test_tasks_and_pools_write_what_this_process_writes_of_few_images(words, tmp_path, progress, monkeypatch) -> None:
    for module, limit in ((prepare, "_FEW_IMAGES"), (prepare, "_PART_BYTES"), (feature_pass, "_FEW_VIEWS")):
        monkeypatch.setattr(module, limit, 1)
    run_stages(load_config([*words, f"workspace={tmp_path / 'pools'}"]), progress, until="teach")
    here, pools = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.glob("*-*/*") if path.suffix in KINDS}
        for root in (tmp_path / "workspace", tmp_path / "pools")
    )
    assert {name.partition("-")[0] for name in here} >= {"decoded", "prepare", "features", "teach"}
    assert here == pools


@pytest.mark.usefixtures("taught")
def test_compact_soft_targets_cost_no_teacher_pass_and_train_with_every_loss(words, tmp_path, image_folder) -> None:
    """Of a finished full directory. The stored features of that are changed by hand, so that copies of them are known
    from new ones. A set that grew, new labels and a new head cost no pass of known images either."""
    full = run_stages(load_config(words), Progress(Console(quiet=True)), until="teach")
    for file in Path(full.directories["teach"]).glob("*.safetensors"):
        stored = load_file(file)
        save_file({**stored, "features": stored["features"] + np.float16(1)}, file)

    def compact(*more: str, until: str = "teach"):
        said = io.StringIO()
        config = load_config([*words, "views.store=compact", *more])
        outcome = run_stages(config, Progress(Console(file=said, width=300)), until=until)
        return outcome, said.getvalue()

    every = {
        f"{term}_weight": 1 for term in ("info_nce", "crd", "srrl", "dist", "feature", "rkd_distance", "rkd_angle")
    }
    first, said = compact(f"loss={json.dumps(every)}", until="distill")
    num_train = first.samples.num_rows("train")
    assert f"sample    copied the views of {num_train} images" in said
    assert f"teach     copied the views of {num_train} images" in said
    assert re.search(r"teach     compact: \d+ bytes a view instead of \d+; \d+ of \d+ answers on val equal", said)
    directory = first.directories["teach"]
    assert not Path(directory, "sample").exists()
    projection, small, large = read_projection(directory), 0, 0
    for number in range(len(first.samples.shards["train"])):
        ids = [row["sample_id"] for row in rows(first.samples.path, "train")]
        ids = ids[sum(first.samples.shards["train"][:number]) :][: first.samples.shards["train"][number]]
        whole = read_targets(full.directories["teach"], "train", number, ids)
        stored = read_targets(directory, "train", number, ids).astype(np.float32)
        expected = projection.project(whole).astype(np.float32)
        np.testing.assert_allclose(stored, expected, atol=0.03 * float(np.abs(expected).max()))
        small += Path(directory, f"train-{number:05d}.safetensors").stat().st_size
        large += Path(full.directories["teach"], f"train-{number:05d}.safetensors").stat().st_size
    assert small < large
    assert np.isfinite([epoch["loss"] for epoch in read_epochs(first.student.path)]).all()
    larger = tmp_path / "larger"
    shutil.copytree(image_folder, larger)
    painted(1, np.random.default_rng(5), 40).save(larger / "unlabelled" / "new.png")
    shutil.rmtree(full.directories["teach"])
    grown, said = compact(f"images.path={larger}")
    assert "\nsample " not in said
    assert f"teach     copied the views of {num_train} images" in said
    assert same(read_projection(grown.directories["teach"]), projection)
    again, said = compact("teacher.class_balanced=true")
    assert again.directories["teach"] == directory
    assert "teach     compact:" in said
    Path(directory, PROJECTION_FILE).unlink()
    with pytest.raises(CheckpointError, match="is missing; delete the folder"):
        compact("teacher.class_balanced=true", until="distill")
    fewer, said = compact("images.num_labelled=30")
    assert f"teach     copied the views of {num_train} images" in said
    assert same(read_projection(fewer.directories["teach"]), projection)


def test_a_teacher_that_sees_nothing_stops_before_it_teaches(words, progress, tmp_path, teacher_weights) -> None:
    blind = tmp_path / "blind.safetensors"
    save_file({name: np.zeros_like(value) for name, value in load_file(teacher_weights).items()}, blind)
    with pytest.raises(ConfigError, match=r"val accuracy of 0.333, not clearly above the 0.333"):
        run_stages(load_config([*words, f"teacher.weights={blind}", "teacher.allow_near_chance=false"]), progress)
    assert not list((tmp_path / "workspace").glob("teach-*"))
    accepted = [*words, f"teacher.weights={blind}"]
    run_stages(load_config([*accepted, "teacher.allow_near_chance=true"]), progress, until="adapt")
    with pytest.raises(ConfigError, match="not clearly above"):  # what was accepted once is not accepted for ever
        run_stages(load_config([*accepted, "teacher.allow_near_chance=false"]), progress, until="adapt")


@pytest.mark.usefixtures("taught")
def test_classes_that_the_teacher_does_not_know_end_the_run_before_it_teaches(words, progress, tmp_path) -> None:
    save_student(tmp_path / "teacher", Student(model="timm:test_resnet", size=32), ("red", "green", "azure"))
    before = markers(tmp_path / "workspace")
    more = ["teacher.weights=null", "teacher.size=null", "teacher.head=native", f"teacher.model={tmp_path}/teacher"]
    message = r"of 3 classes, these have no single output among the teacher's 3 \(others: 'azure'\): 'blue'"
    with pytest.raises(ConfigError, match=message):
        run_stages(load_config([*words, *more]), progress)
    new = {Path(path).parent.name.partition("-")[0] for path in markers(tmp_path / "workspace").keys() - before.keys()}
    assert new <= {"features"}, "what was written is the teacher's own, and not what it would teach"


@pytest.mark.slow
def test_val_accuracy_is_that_of_the_class_names_where_val_lacks_a_class(progress, tmp_path) -> None:
    rng = np.random.default_rng(3)
    for split, names in {"train": ("red", "green", "blue"), "val": ("blue", "green")}.items():  # the first one lacks
        for name in names:
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(16):
                painted(CLASSES.index(name), rng, 40).save(folder / f"{i}.png")
    words = [
        f"workspace={tmp_path}/workspace", f"images.path={tmp_path}/images", "images.size=32", "student.size=24",
        "student.model=timm:test_resnet", "teacher=null", "loss.kd_weight=0", "loss.alignment_weight=0",
        "loss.uniformity_weight=0", "distill.epochs=20", "export.formats=[onnx]",
        "distill.num_workers=0", "tracking.enabled=false",
    ]  # fmt: skip
    with pytest.raises(DataError, match="no val image of 'red'"):
        run_stages(load_config(words), progress)
    outcome = run_stages(load_config([*words, "images.allow_missing_val=true"]), progress, until="export")
    files = [str(file) for file in (tmp_path / "images" / "val").rglob("*.png")]
    answers = predict_locally(outcome.exported.path, "onnx", find_units(files))
    named = [outcome.samples.classes[a.probabilities_C.argmax()] == Path(a.name).parent.name for a in answers]
    assert len(named) == 32
    assert np.mean(named) > 0.6, "numbered by the split's own classes they would be wrong, one and all"
    assert np.mean(named) == pytest.approx(outcome.report.student["val"]["accuracy"])
    assert np.mean(named) == pytest.approx(outcome.student.val_accuracy)


@pytest.mark.usefixtures("taught")
def test_teachers_are_gone_when_teach_has_ended(words, progress, monkeypatch) -> None:
    monkeypatch.setattr(feature_pass, "_FEW_VIEWS", 0)  # a pool for so few too
    run_stages(load_config([*words, "views.min_scale=0.7"]), progress, until="teach")
    wait_for(lambda: not ray_processes("ShardTeacher"), 60)  # Ray ends them in the background
    wait_for(lambda: ray.available_resources().get("CPU") == 2, 60)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"] == 2


def test_a_loss_that_teaches_no_classifier_is_refused(words, progress, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"alignment, uniformity.*classifier"):
        run_stages(load_config([*words, "loss.task_weight=0", "loss.kd_weight=0"]), progress)
    assert not list((tmp_path / "workspace").glob("*-*/*"))


@pytest.mark.slow
@pytest.mark.usefixtures("taught")
def test_a_relative_path_holds_on_a_train_worker(words, progress, tmp_path, teacher_weights, monkeypatch) -> None:
    """Ray Train would run its workers in a folder of its own, where `./weights` names nothing."""
    monkeypatch.chdir(teacher_weights.parent)
    start = ["student.init=pretrained", f"student.weights=./{teacher_weights.name}", "student.size=32"]
    alone = [f"loss.{name}_weight=0" for name in ("kd", "alignment", "uniformity")]
    config = load_config([*words, *start, *alone, "distill.num_workers=1", "distill.epochs=1"])
    assert run_stages(config, progress, until="distill").student.steps > 0


@pytest.mark.usefixtures("taught")
def test_a_workspace_may_be_moved(words, progress, tmp_path) -> None:
    run_stages(load_config(words), progress)
    (tmp_path / "workspace").rename(tmp_path / "elsewhere")
    again = run_stages(
        load_config([*words, f"workspace={tmp_path / 'elsewhere'}", "evaluate.calibration_bins=5"]), progress
    )
    assert {stage for stage, seconds in again.seconds.items() if seconds} == {"evaluate"}
    for path in (again.samples.path, again.adapted.path, again.adapted.features, again.student.path, again.report.path):
        assert path.startswith(str(tmp_path / "elsewhere"))


@pytest.mark.slow
def test_images_are_decoded_once_for_all_seeds(words, progress, tmp_path) -> None:
    first = run_stages(load_config(words), progress, until="prepare").samples
    (decoded,) = (tmp_path / "workspace").glob("decoded-*")
    files = sorted(decoded.glob("*.parquet"))
    made = {path: path.stat().st_mtime_ns for path in files}
    assert len(files) >= 3
    more = ["seed=1", "images.num_labelled=12", "images.shard_size=8"]
    second = run_stages(load_config([*words, *more]), progress, until="prepare").samples
    assert {path: path.stat().st_mtime_ns for path in files} == made
    fresh = run_stages(load_config([*words, *more, f"workspace={tmp_path}/fresh"]), progress, until="prepare").samples
    for split in ("train", "val", "test"):
        assert rows(second.path, split) == rows(fresh.path, split)
        assert rows(second.path, split) != rows(first.path, split)
    # A command that was killed goes on, and what could not be read then is read now.
    shutil.rmtree(first.path)
    files[0].unlink()
    table = pq.read_table(files[1])
    reasons = ["cannot be read: Input/output error", *table["reason"].to_pylist()[1:]]
    pq.write_table(table.set_column(3, "reason", [reasons]), files[1])
    made |= {path: path.stat().st_mtime_ns for path in files[1:2]}
    pq.write_table(pq.read_table(files[2])[1:], files[2])  # one image is not in it
    made |= {path: path.stat().st_mtime_ns for path in files[2:3]}
    again = run_stages(load_config(words), progress, until="prepare").samples
    assert again == first
    assert {path for path in files if path.stat().st_mtime_ns != made[path]} == set(files[:3])
    files[2].write_bytes(files[2].read_bytes()[:-9])
    shutil.rmtree(again.path)
    with pytest.raises(Exception, match=rf"{files[2].name} is damaged"):
        run_stages(load_config(words), progress, until="prepare")


@pytest.mark.usefixtures("taught")
def test_half_done_prepare_writes_only_the_shards_that_are_missing(words, progress) -> None:
    config = load_config(words)
    first = run_stages(config, progress, until="prepare").samples
    shards = sorted(Path(first.path).glob("*.parquet"))
    made = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in shards}
    assert len(made) >= 5

    def again(change) -> set[Path]:
        """The shards that are written, when a command was killed before its end."""
        Path(first.path, "DONE").unlink()
        change()
        before = {path: path.stat().st_mtime_ns for path in shards if path.exists()}
        assert run_stages(config, progress, until="prepare").samples == first
        assert {path: path.read_bytes() for path in shards} == {path: data for path, (_, data) in made.items()}
        return {path for path in shards if path.stat().st_mtime_ns != before.get(path)}

    assert again(lambda: [shards[1].unlink(), shards[-1].unlink()]) == {shards[1], shards[-1]}
    assert again(lambda: None) == set()
    # What could not be read then is read now, so the shards of then are in another order.
    assert again(Path(first.path, "order.json").unlink) == set(shards)


def cli(words: list[str], *more: str, **options):
    return subprocess.Popen(
        [sys.executable, "-c", "from raydistill.cli import main; main()", "run", *words, *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_teacher_actor_costs_its_open_shard(words, progress, tmp_path) -> None:
    words = [*words, "views.per_image=110", "distill.epochs=1"]
    unbroken = run_stages(load_config([*words, f"workspace={tmp_path}/unbroken"]), progress, until="teach")
    broken = tmp_path / "workspace"
    seen: dict[Path, int] = {}

    def one_is_written() -> bool:
        seen.update({p: p.stat().st_mtime_ns for p in broken.glob("teach-*/train-*.safetensors")})
        return bool(seen)

    outcome = run_and_kill(lambda: run_stages(load_config(words), progress, "distill"), "ShardTeacher", one_is_written)
    assert {p: p.stat().st_mtime_ns for p in seen} == seen
    bill = read_bill(outcome.directories["teach"])
    assert 0 < bill["images_again"] <= 16  # a shard
    assert 0 < bill["seconds_again"] < bill["seconds"]
    made = sorted(Path(outcome.directories["teach"]).glob("*.safetensors"))
    assert len(made) == len(outcome.samples.shards["train"]) > len(seen)
    for path in made:
        expected = load_file(Path(unbroken.directories["teach"]) / path.name)
        np.testing.assert_array_equal(load_file(path)["features"], expected["features"])


@pytest.mark.slow
def test_a_killed_train_worker_costs_its_open_epoch(words, progress, tmp_path) -> None:
    """With a student whose losses do not depend on how many workers share a batch, so the unbroken run needs none."""
    words = [*words, "distill.epochs=30", "student.model=timm:test_vit", "student.size=32"]
    words += ["loss.uniformity_weight=0", "loss.projection_head=two_layer", "distill.labelled_share=0.5"]
    losses = epoch_losses(words, progress, "distill.num_workers=0", f"workspace={tmp_path}/unbroken")
    words, broken = [*words, "distill.num_workers=2"], tmp_path / "workspace"
    run_and_kill(
        lambda: run_stages(load_config(words), progress, "distill"), "RayTrainWorker",
        lambda: list(broken.glob("distill-*/epochs/00003.*")),
    )  # fmt: skip
    again = epoch_losses(words, progress)  # done, so these are the records of the run above
    assert len(again) == 30
    assert [e["loss"] for e in again] == pytest.approx([e["loss"] for e in losses], abs=1e-3)


@pytest.mark.usefixtures("taught")
@pytest.mark.slow
def test_elastic_workers_take_the_same_steps(words, progress) -> None:
    more = ["student.model=timm:test_vit", "student.size=32", "loss.uniformity_weight=0", "distill.labelled_share=0.5"]
    more += ["loss.projection_head=two_layer"]
    alone = epoch_losses(words, progress, *more)
    elastic = epoch_losses(words, progress, *more, "distill.num_workers=[1,2]")
    assert [e["loss"] for e in elastic] == pytest.approx([e["loss"] for e in alone], abs=1e-3)


@pytest.mark.slow
def test_killed_driver_goes_on_to_the_same_numbers(words, tmp_path) -> None:
    """kill -9 in the middle of `teach` and of `distill`; the unbroken run has a workspace of its own."""
    more = ["distill.epochs=40", "distill.cache=stream", "views.per_image=3"]
    unbroken = cli(words, *more, f"workspace={tmp_path}/unbroken")
    assert unbroken.wait(180) == 0, unbroken.stdout.read()
    broken = tmp_path / "broken"

    def kill_when(condition) -> None:
        process = cli(words, *more, f"workspace={broken}", start_new_session=True)
        wait_for(lambda: condition() or process.poll() is not None)
        assert process.poll() is None, process.stdout.read()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    kill_when(lambda: len(list(broken.glob("teach-*/train-*.safetensors"))) >= 2)
    assert not list(broken.glob("teach-*/DONE"))
    taught = {p: p.stat().st_mtime_ns for p in broken.glob("teach-*/*.safetensors")}
    kill_when(lambda: len(list(broken.glob("distill-*/epochs/*.json"))) >= 5)
    assert not list(broken.glob("distill-*/DONE"))
    assert {p: p.stat().st_mtime_ns for p in taught} == taught
    epochs = {p: p.stat().st_mtime_ns for p in sorted(broken.glob("distill-*/epochs/*.json"))[:-2]}
    last = cli(words, *more, f"workspace={broken}")
    assert last.wait(180) == 0, last.stdout.read()
    assert {p: p.stat().st_mtime_ns for p in epochs} == epochs
    reports = [json.loads(next(Path(w).glob("evaluate-*/report.json")).read_text())
               for w in (broken, tmp_path / "unbroken")]  # fmt: skip
    for split in ("val", "test"):
        assert reports[0]["student"][split] == reports[1]["student"][split]
    finals = [json.loads(sorted(Path(w).glob("distill-*/epochs/*.json"))[-1].read_text())
              for w in (broken, tmp_path / "unbroken")]  # fmt: skip
    assert finals[0]["loss"] == pytest.approx(finals[1]["loss"], abs=1e-4)


def states(folder: Path) -> list[tuple[str, str]]:
    """The names of the runs of a folder's workspace and how they ended, the job's own as `job`."""
    with sqlite3.connect(folder / "workspace" / "mlflow.db") as database:
        rows = database.execute("select name, status from runs").fetchall()
    return [("job" if name.startswith("raydistill · ") else name, status) for name, status in rows]


@pytest.mark.usefixtures("taught")
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGKILL))],
)
def test_a_signal_ends_as_killed_in_mlflow(number, words, tmp_path) -> None:
    def trains() -> bool:
        with contextlib.suppress(sqlite3.OperationalError):  # MLflow makes its tables meanwhile
            return ("distill", "RUNNING") in states(tmp_path)
        return False

    process = cli(words, "distill.epochs=2000", "tracking.enabled=true")
    wait_for(lambda: trains() or process.poll() is not None)
    process.send_signal(number)
    code = process.wait(30)
    ends = dict(states(tmp_path))
    if number != signal.SIGKILL:
        assert code == 128 + number, process.stdout.read()
        assert ends["job"] == ends["distill"] == "KILLED"
        return
    assert ends["job"] == ends["distill"] == "RUNNING"
    again = cli(words, "distill.epochs=1", "tracking.enabled=true", "export.allow_useless=true")  # another student
    assert again.wait(120) == 0, again.stdout.read()
    after = states(tmp_path)
    for name in ("job", "distill"):
        assert sorted(status for other, status in after if other == name) == ["FINISHED", "KILLED"]
    assert ("evaluate", "FINISHED") in after


def test_done_markers_hold_the_results(words, progress) -> None:
    outcome = run_stages(load_config(words), progress, until="prepare")
    done = json.loads((Path(outcome.directories["prepare"]) / "DONE").read_text())
    assert "path" not in done  # the result lies where its marker does
    assert samples_from_json(done | {"path": outcome.directories["prepare"]}) == outcome.samples

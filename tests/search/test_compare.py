"""compare, whole, on small real runs; and what it refuses before it starts."""

from __future__ import annotations

import html
import shutil
import sqlite3
from pathlib import Path

import pyarrow as pa
import pytest

from raydistill.config import load_config
from raydistill.config.baselines import OVERLAYS
from raydistill.data.sample import decode_shard, encode_shard
from raydistill.errors import ConfigError, DataError
from raydistill.run import run_stages
from raydistill.search.compare import compare_arms
from raydistill.storage.jobs import read_jobs

ARMS = "compare.arms=[scratch,crd,align_uniform]"


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session", "taught")
def test_all_arms_over_all_seeds_and_the_same_again(words, progress, tmp_path) -> None:
    config = load_config(
        [*words, ARMS, "compare.seeds=2", "distill.val_every=1", "loss.crd_memory=64", "tracking.enabled=true"]
    )
    comparison, path = compare_arms(config, progress)
    workspace = tmp_path / "workspace"
    assert {row.arm for row in comparison.rows} == {"scratch", "crd", "align_uniform"}
    assert all(row.seeds == [0, 1] for row in comparison.rows)
    assert len({row.steps for row in comparison.rows}) == 1  # the same budget
    assert len(list(workspace.glob("teach-*/DONE"))) == 2  # one a seed, whatever the arm
    assert len(list(workspace.glob("distill-*/DONE"))) == 6
    by_arm = {row.arm: row for row in comparison.rows}
    assert by_arm["scratch"].teach_seconds == by_arm["scratch"].adapt_seconds == 0
    assert all(by_arm[name].teach_seconds > 0 and by_arm[name].adapt_seconds > 0 for name in ("crd", "align_uniform"))
    for name in ("compare.html", "compare.md", "compare.json"):
        assert (Path(path) / name).stat().st_size > 0
    (opened,) = [run.page for _, run in read_jobs(str(workspace)) if run.page]  # by `raydistill open`
    assert (workspace / opened).samefile(Path(path) / "compare.html")
    with sqlite3.connect(workspace / "mlflow.db") as database:
        statuses = [row[0] for row in database.execute("select status from runs")]
        children = database.execute("select count(*) from tags where key = 'mlflow.parentRunId'").fetchone()[0]
    assert (set(statuses), len(statuses), children) == ({"FINISHED"}, 7, 6)

    before = {p: p.stat().st_mtime_ns for p in workspace.glob("distill-*/*")}
    again, _ = compare_arms(config, progress)
    assert again == comparison
    assert {p: p.stat().st_mtime_ns for p in workspace.glob("distill-*/*")} == before


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session", "taught")
def test_the_learning_curve_has_fewer_labels_and_the_same_images(words, progress, tmp_path) -> None:
    config = load_config([*words, "compare.arms=[scratch,kd]", "compare.seeds=1", "compare.label_shares=[0.5,1]"])
    comparison, path = compare_arms(config, progress, learning_curve=True)
    counts = {(p["arm"], p["label_share"]): p["num_labelled"] for p in comparison.curve}
    assert set(counts) == {("scratch", 0.5), ("scratch", 1.0), ("kd", 0.5), ("kd", 1.0)}
    assert counts["kd", 0.5] == pytest.approx(counts["kd", 1.0] / 2, abs=1)
    assert comparison.curve_verdict
    assert comparison.curve_verdict in html.unescape((Path(path) / "compare.html").read_text())
    assert len(list((tmp_path / "workspace").glob("teach-*/DONE"))) == 1  # fewer labels cost no teacher pass


@pytest.mark.slow
@pytest.mark.cluster
def test_nothing_that_is_chosen_reads_the_test_split(words, progress, taught_workspace, tmp_path) -> None:
    """With every test label changed, the head and the student are the same, bit for bit."""
    heads, students = [], []
    for place, spoil in (("one", False), ("two", True)):
        for prepared in taught_workspace.glob("prepare-*"):
            shutil.copytree(prepared, tmp_path / place / prepared.name)
        config = load_config([*words, f"workspace={tmp_path / place}"])
        samples = run_stages(config, progress, until="prepare").samples
        for shard in Path(samples.path).glob("test-*.parquet"):
            table = decode_shard(shard.read_bytes())
            if spoil:
                wrong = pa.array((table["label"].to_numpy() + 1) % len(samples.classes), pa.int32())
                shard.write_bytes(encode_shard(table.set_column(table.column_names.index("label"), "label", wrong)))
        outcome = run_stages(config, progress, until="distill")
        heads.append((Path(outcome.adapted.path) / "head.safetensors").read_bytes())
        students.append((Path(outcome.student.path) / "student.safetensors").read_bytes())
    assert heads[0] == heads[1]
    assert students[0] == students[1]


@pytest.mark.parametrize("arm", ["linear_probe", "fine_tune", "distill_pretrained"])
def test_without_pre_trained_weights_nothing_is_begun(words, progress, tmp_path, arm) -> None:
    config = load_config([*words, f"compare.arms=[scratch,{arm}]", "compare.student_weights=/nowhere.safetensors"])
    with pytest.raises(ConfigError, match=r"student_weights|nowhere"):
        compare_arms(config, progress)
    assert not (tmp_path / "workspace").exists()


def test_an_arm_that_needs_a_teacher_is_refused_without_one(words, progress) -> None:
    weights = [f"loss.{name}_weight=0" for name in ("kd", "alignment", "uniformity")]
    with pytest.raises(ConfigError, match="kd"):
        compare_arms(load_config([*words, *weights, "teacher=null", "compare.arms=[scratch,kd]"]), progress)


@pytest.mark.parametrize("split", ["test", "val"])
def test_what_cannot_be_measured_is_refused_before_anything_is_trained(words, progress, tmp_path, split) -> None:
    config = load_config([*words, f"images.{split}_share=0", "compare.arms=[scratch,kd]"])
    with pytest.raises(DataError, match=rf"no {split} split.*images\.{split}_share"):
        compare_arms(config, progress)
    assert not (tmp_path / "workspace").exists()


def test_a_learning_curve_that_cannot_be_drawn_is_refused_before_anything_is_trained(words, progress, tmp_path) -> None:
    alone = [f"loss.{name}_weight=0" for name in ("kd", "alignment", "uniformity")]
    config = load_config([*words, *alone, "teacher=null", "compare.arms=[scratch]"])
    with pytest.raises(ConfigError, match="align_uniform cannot be trained"):
        compare_arms(config, progress, learning_curve=True)
    assert not (tmp_path / "workspace").exists()


def test_no_arm_keeps_a_term_of_the_job(words) -> None:
    from raydistill.search.compare import _trial

    config = load_config([*words, "loss.dkd_weight=3", "loss.srrl_weight=2", "student.init=random"])
    for arm in OVERLAYS:
        terms = _trial(config, arm, 0).config.loss.terms
        assert ("dkd" in terms) == (arm == "job")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session", "taught")
def test_a_job_that_generates_is_compared_with_and_without(words, progress, class_pipeline, tmp_path) -> None:
    more = [f"generate.pipeline={class_pipeline}", "generate.steps=2", "generate.per_class=4", "compare.seeds=1",
            "generate.task_weight=0", "generate.filter.weigh=true", "compare.arms=[scratch,kd]"]  # fmt: skip
    comparison, path = compare_arms(load_config([*words, *more]), progress)
    rows = {row.arm: row for row in comparison.rows}
    assert set(rows) == {"scratch", "kd", "scratch+generated", "kd+generated"}
    assert len({row.steps for row in comparison.rows}) == 1  # the same budget
    assert rows["kd"].generate_seconds == rows["scratch"].generate_seconds == 0
    assert min(rows[f"{arm}+generated"].generate_seconds for arm in ("scratch", "kd")) > 0
    assert comparison.best_baseline == "scratch"
    assert len(list((tmp_path / "workspace").glob("generated/*/identity.json"))) == 3  # made once for both
    assert "kd+generated" in (Path(path) / "compare.md").read_text()

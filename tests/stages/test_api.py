"""`import raydistill`: the same jobs, results and errors as the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import raydistill as rd
from raydistill.config import known_keys, load_config
from raydistill.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("api") / "workspace"


@pytest.fixture
def run(image_folder, teacher_weights, words, taught, workspace, tmp_path) -> rd.Run:
    """A small job, given as a user gives it. The stages before `distill` are done; so are all for the second test."""
    if not workspace.exists():
        (tmp_path / "workspace").rename(workspace)
    settings = json.loads((tmp_path / "job.yaml").read_text())
    return rd.distill(
        image_folder,
        teacher={"model": "timm:test_resnet", "weights": str(teacher_weights), "size": 32, "allow_near_chance": True},
        student="timm:test_resnet",
        workspace=str(workspace),
        progress=False,
        **{"student.size": 24, "images.size": 32, "images.shard_size": 16, "tracking.enabled": False},
        **{key: settings[key] for key in ("views", "loss", "distill", "export")},
    )


@pytest.mark.cluster
def test_a_run_gives_its_numbers_its_page_and_its_student(run, words, image_folder, taught) -> None:
    assert run.config.student.size == 24
    assert run.metrics["test_accuracy"] == run.outcome.report.student["test"]["accuracy"]
    assert {"val_ece", "teacher_test_top5", "agreement_val"} <= run.metrics.keys()
    assert Path(str(run.report)).name == "report.html"
    assert "&lt;html" in run.report._repr_html_()[:300]
    files = sorted((image_folder / "green").glob("*.png"))[:3]
    answers = run.predict(files)
    assert [answer.name for answer in answers] == list(map(str, files))
    for file, answer in zip(files, answers, strict=True):
        with Image.open(file) as picture:
            shown = run.predict([picture, np.asarray(picture)])
        assert [one.probabilities for one in shown] == [answer.probabilities] * 2
        logits_1C = run.student(run.student.preprocess(file)[None])
        assert torch.allclose(
            logits_1C.softmax(1)[0], torch.tensor([answer.probabilities[c] for c in run.student.classes])
        )
        assert answer.label == max(answer.probabilities, key=answer.probabilities.get)
    assert rd.load(run.path).predict(files[0])[0].probabilities == answers[0].probabilities
    mixed = run.predict(
        iter([files[0], np.zeros((8, 8, 5), np.uint8), files[1].read_bytes(), image_folder / "red" / "cut.png"])
    )
    assert [bool(one.error) for one in mixed] == [False, True, False, True]
    assert [mixed[0].probabilities, mixed[2].probabilities] == [one.probabilities for one in answers[:2]]
    student = run.student.train().double()
    again = student.predict(files)
    assert student.training, "it is left as it was"
    assert again == student.predict(files), "and nothing in it has changed"
    assert [one.label for one in again] == [one.label for one in answers]
    student.float().eval()


@pytest.mark.cluster
def test_two_threads_share_one_result(run, workspace, tmp_path) -> None:
    job = tmp_path / "same.yaml"
    job.write_text(json.dumps(run.config.model_dump(mode="json")))
    shutil.rmtree(run.outcome.directories["evaluate"])  # which the first of them does again, and the other finds
    with ThreadPoolExecutor(2) as pool:
        again = list(pool.map(lambda _: rd.distill(job, progress=False), range(2)))
    assert [one.outcome.student for one in again] == [run.outcome.student] * 2
    assert sorted(one.outcome.seconds["evaluate"] > 0 for one in again) == [False, True], "one has done it"


@pytest.mark.cluster
def test_a_script_needs_no_guard(run, image_folder, tmp_path) -> None:
    (tmp_path / "same.yaml").write_text(json.dumps(run.config.model_dump(mode="json")))
    script = tmp_path / "script.py"
    shutil.rmtree(run.outcome.directories["teach"])  # so that Ray and isolated processes start
    script.write_text(
        "import raydistill as rd\nrun = rd.distill('same.yaml')\n"
        f"assert run.predict({str(image_folder)!r})\nprint(run.metrics['val_accuracy'])\n"
    )
    ended = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(ended.stdout.splitlines()[-1]) == run.metrics["val_accuracy"]
    assert "distill   done before" in ended.stdout


def test_importing_it_loads_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import raydistill; print(*sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "raydistill" in found
    assert not {"torch", "ray", "numpy", "pydantic", "pyarrow", "timm"} & {name.partition(".")[0] for name in found}


def test_settings_are_those_of_the_command_line(class_folders) -> None:
    folder = class_folders({"cat": 2, "dog": 2})
    with pytest.raises(ConfigError, match=r"did you mean distill\.epochs"):
        rd.distill(folder, student="timm:resnet10t", **{"distill.epoch": 3})
    with pytest.raises(ConfigError, match=r"distill\.epochs=0"):
        rd.check(folder, distill={"epochs": 0})
    with pytest.raises(ConfigError, match=r"distill\.epochs: gives a section, where"):
        rd.check(folder, **{"distill": "long", "distill.epochs": 3})
    with pytest.raises(ConfigError, match="no such folder"):
        rd.distill(folder, teacher="resnet10t")
    with pytest.raises((ConfigError, DataError), match="nothing"):
        rd.check(folder / "nothing", progress=False)


def test_a_folder_of_any_name_and_a_teacher_by_its_name(class_folders) -> None:
    root = class_folders({"a/cat": 3, "a/dog": 3})
    folder = (root / "a").rename(root / "day=1")
    found = rd.check(folder, progress=False, teacher="timm:not_there", images={"size": 16})
    assert sum(sum(counts.values()) for counts in found.counts.values()) == 6


def test_check_tells_what_would_stop_a_run(class_folders) -> None:
    found = rd.check(class_folders({"cat": 30}), progress=False, **{"images.size": 16})
    assert any(finding.severity == "stop" for finding in found.findings)
    titles, rule, *rows = found._repr_markdown_().splitlines()
    assert rule == "| --- " * titles.count(" | ") + "| --- |"
    assert len(rows) == len(found.findings)
    assert all(row.count(" | ") == titles.count(" | ") for row in rows)


def test_a_folder_is_the_images_and_yaml_is_the_job(class_folders, tmp_path, monkeypatch) -> None:
    folder = class_folders({"cat": 1})
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "pictures.csv"
    table.write_text("path,label\n")
    (tmp_path / "job.yaml").write_text("images: {path: elsewhere}\nseed: 3\n")
    assert load_config([str(folder)]).images.path == str(folder)
    assert load_config(["images"]).images.path == "images"
    assert load_config(["pictures.csv"]).images.path == "pictures.csv"
    assert load_config(["s3://bucket/images"]).images.path == "s3://bucket/images"
    assert load_config(["example:elpv"]).images.path == "example:elpv"
    assert load_config([str(folder)], {"workspace": tmp_path / "runs"}).workspace == str(tmp_path / "runs")
    both = load_config(["job.yaml", "./images", "seed=4"])
    assert (both.images.path, both.seed) == ("./images", 4)
    with pytest.raises(ConfigError, match="folder of images"):
        load_config(["not-there"])


def test_keys_tell_default_values_and_meaning() -> None:
    leaves = {name for name in known_keys() if not any(other.startswith(f"{name}.") for other in known_keys())}
    found = {key.name: key for key in rd.keys("")}
    assert found.keys() == leaves
    assert all(key.meaning for key in found.values() if key.name != "name")
    assert "≥ 8 and ≤ 2,048" in str(found["images.size"])
    assert str(found["images.fit"]).startswith('images.fit = "crop" (crop | pad)')
    assert {key.name for key in rd.keys("TEMPERATURE")} >= {"loss.temperature"}


def test_a_student_in_the_home_folder_is_looked_for_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=f"{tmp_path}/student is not an exported student"):
        rd.load("~/student")

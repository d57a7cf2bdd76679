"""init: the job that it writes is valid in every situation, fits the images, and stands in nobody's way."""

from __future__ import annotations

import itertools
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from raydistill.cli.commands import app
from raydistill.config import load_config
from raydistill.doctor.first_job import Situation, choose, job_text, look, outlook
from raydistill.errors import ConfigError, DataError
from raydistill.yaml_files import parse

DEMO = Situation(
    classes=8, labelled=160, unlabelled=824, set_apart=0, fewest=20, most=20, has_val=False, short_side=500, few="",
    long_share=0, cores=2, gpu="", packages=frozenset(("efficientnet-lite0", "efficientnet-lite2")),
)  # fmt: skip


def folder_of(place: Path, **counts: int) -> Path:
    """Pictures of 60 x 40 in folders of these names."""
    numbers = np.random.default_rng(0)
    for name, count in counts.items():
        (place / name).mkdir(parents=True)
        for number in range(count):
            pixels = numbers.integers(0, 255, (40, 61, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / name / f"{number}.png")
    return place


def test_every_situation_gives_a_job_of_ten_lines() -> None:
    varied = {
        "labelled": (4, 160, 9_500, 2_000_000), "unlabelled": (0, 824, 1_000_000), "fewest": (1, 20, 900),
        "short_side": (8, 500, 9_000), "long_share": (0, 1), "cores": (1, 96), "gpu": ("", "NVIDIA H200"),
        "packages": (frozenset(), DEMO.packages),
    }  # fmt: skip
    for values in itertools.product(*varied.values()):
        of = replace(DEMO, **dict(zip(varied, values, strict=True)), most=max(20, values[2]))
        text = job_text("x", of, choose(of))
        config = load_config([], next(iter(parse(text, "job"))))
        assert config.student.size is not None
        assert config.student.size <= config.images.size
        lines = text.splitlines()
        assert sum(not line.startswith("#") for line in lines) <= 10
        assert all(len(line) <= 120 for line in lines if line.startswith("#"))


def test_what_is_said_follows_the_results() -> None:
    assert "here distilling pays" in outlook(DEMO)
    assert "lost 2 points" in outlook(replace(DEMO, unlabelled=0))
    assert "only the labels" in outlook(replace(DEMO, fewest=900))
    student = next(choice for choice in choose(DEMO) if choice.section == "student")
    assert student.settings["init"] == "pretrained"
    large = next(choice for choice in choose(replace(DEMO, unlabelled=10**6)) if choice.section == "views")
    assert large.settings == {"per_image": 1}


def test_a_look_counts_what_there_is(tmp_path: Path) -> None:
    of = look(str(folder_of(tmp_path, a=4, b=9, unlabelled=7)))
    assert (of.classes, of.labelled, of.unlabelled, of.fewest, of.most) == (2, 13, 7, 4, 9)
    assert (of.short_side, of.long_share, of.set_apart) == (40, 1, 0)
    assert "(val 2 and test 2)" in of.few  # a tenth of each class, and at least one image
    assert of.few[1:].replace(" ", "") in job_text("x", of, choose(of)).replace("\n#", "").replace(" ", "")
    sizes = [choose(replace(of, short_side=side))[0].settings["size"] for side in (28, 64, 65, 96, 500)]
    assert sizes == [32, 64, 64, 128, 128]  # no more than the pictures show
    folder_of(tmp_path / "split/train", a=2, b=2)
    folder_of(tmp_path / "split/test", a=3, b=3)
    assert (look(str(tmp_path / "split")).labelled, look(str(tmp_path / "split")).set_apart) == (4, 6)


@pytest.mark.parametrize("name", ["images", "day=1: #2", "\u202e'x\"", "null", "2024", "a b\n"])
def test_the_job_names_any_folder(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / name, a=3, b=3)
    result = CliRunner().invoke(app, ["init", str(folder), "--out", str(tmp_path / "job.yaml")])
    assert result.exit_code == 0, result.exception
    assert load_config([str(tmp_path / "job.yaml")]).images.path == str(folder)
    assert "\u202e" not in result.stdout


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("mine")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "nowhere")
    for name in ("job.yaml", "link.yaml", "no_such_folder/job.yaml"):
        out = str(tmp_path / name)
        result = CliRunner().invoke(app, ["init", str(folder_of(tmp_path / name[0], a=3, b=3)), "--out", out])
        assert isinstance(result.exception, ConfigError)
        assert out in str(result.exception)
    result = CliRunner().invoke(app, ["init", str(tmp_path / "misspelt"), "--out", str(tmp_path / "job.yaml")])
    assert "no such file or folder" in str(result.exception)  # the name of the job is the smaller mistake
    assert (tmp_path / "job.yaml").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_a_full_disk_leaves_no_half_of_a_job(tmp_path: Path) -> None:
    folder, before = folder_of(tmp_path / "images", a=3, b=3), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        result = CliRunner().invoke(app, ["init", str(folder), "--out", str(tmp_path / "job.yaml")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize(
    ("counts", "said"), [(None, "no such file or folder"), ({}, "no images"), ({"a": 3}, "two; add a second")]
)
def test_images_that_cannot_work_are_named(counts: dict[str, int] | None, said: str, tmp_path: Path) -> None:
    place = tmp_path / "images"
    if counts is not None:
        place.mkdir()
        folder_of(place, **counts)
    with pytest.raises(DataError, match=said):
        look(str(place))
    assert not (tmp_path / "job.yaml").exists()


def test_a_picture_in_the_place_of_the_images_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"0\.png: one picture; give the folder"):
        look(str(folder_of(tmp_path, a=1) / "a" / "0.png"))


def test_pictures_that_none_can_read_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_text("no picture")
    with pytest.raises(DataError, match="none of 2 pictures can be read"):
        look(str(tmp_path))

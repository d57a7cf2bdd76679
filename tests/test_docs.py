"""The tests that docs/cases.md names are there, and the commands of README and the site are ones that there are."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import boto3
import pytest
import typer

from raydistill.cli.commands import app
from raydistill.config import load_config
from raydistill.config.keys import flattened
from raydistill.yaml_files import read_mapping
from tests.servers import free_port, mlflow_server

ROOT = Path(__file__).parents[1]
CASES = (ROOT / "docs" / "cases.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"(tests/[\w/]+\.py)::(\w+)", CASES)))


@cache
def functions_of(file: str) -> frozenset[str]:
    """Of the module and of its classes."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_that_a_case_names_exists(file: str, name: str) -> None:
    assert name.startswith("test_")
    assert name in functions_of(file)


def test_the_names_were_found() -> None:
    assert len(NAMED) >= 20


def test_every_case_is_there() -> None:
    sections = re.findall(r"^### (C\d\d) ", CASES, flags=re.MULTILINE)
    assert sections == [f"C{number:02d}" for number in range(1, 29)]


# Commands and blocks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```|^((?: {4}\S.*\n)+)", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> Iterator[str]:
    for kind, fenced, indented in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind == language:
            yield fenced
        elif indented and language == "sh":
            yield re.sub("^ {4}", "", indented, flags=re.MULTILINE)


def commands(page: Path) -> Iterator[list[str]]:
    """Each command of raydistill, as its words."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("raydistill "):
                words = shlex.split(line, comments=True)
                ends = [number for number, word in enumerate(words) if word in (">", "|", "&&", ";")]
                yield words[1 : min(ends, default=len(words))]


@pytest.fixture
def my_folder(tmp_path: Path, image_folder: Path, teacher_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages take to be there: images, a job of the user's own, the best settings of a search."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(image_folder, tmp_path / "my_images")
    shutil.copytree(next(path for path in image_folder.iterdir() if path.is_dir()), tmp_path / "pictures")
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(next(image_folder.rglob("*.png")), tmp_path / name)
    shutil.copy(teacher_weights, tmp_path / "teacher.safetensors")
    for place, text in (("jobs/my_task.yaml", "images: {path: ./my_images}"), ("workspace/tune-…/best.yaml", "{}")):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_one_that_there_is(page: Path, my_folder: Path) -> None:
    for words in commands(page):
        command, rest, name = typer.main.get_command(app), words, "raydistill"
        context = command.make_context(name, words[:1], resilient_parsing=True)
        while isinstance(command, typer.core.TyperGroup):
            name, command, rest = command.resolve_command(context, rest)
            assert command is not None
        given = command.make_context(name, list(rest), parent=context).params
        if not given.get("file"):
            load_config([*(given.get("words") or []), "images.path=./my_images"])


def test_commands_were_found() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) >= 50


EXECUTED = ("../README", *(page.stem for page in PAGES[1:] if any(commands(page))))
FEW = {
    "compare": ("compare.seeds=1", "compare.student_weights=teacher.safetensors"),
    "tune": ("--trials", "2", "tune.confirm_seeds=1"),
}


@pytest.fixture
def elsewhere(
    page: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[dict[str, str], dict[str, object]]]:
    """The environment and settings by which a page's commands find a cluster, a bucket and a tracking server."""
    if page != "cluster":
        yield {}, {"distill.num_workers": 0}
        return
    request.getfixturevalue("bucket")  # before the head, whose jobs need its keys
    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket="bucket")
    head, port = request.getfixturevalue("head"), free_port()
    with mlflow_server(tmp_path, port):
        yield head, {"tracking.uri": f"http://127.0.0.1:{port}"}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("page", EXECUTED)
def test_the_blocks_do_what_they_say(page: str, my_folder: Path, class_pipeline: Path, elsewhere) -> None:
    """In smoke size: on a few tiny pictures, for an epoch."""
    environment, more_settings = elsewhere
    environment = {**os.environ, **environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(ROOT)

    def do(*words: str) -> None:
        done = subprocess.run(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}"

    place = ROOT / "docs" / f"{page}.md"
    settings = {
        "teacher.model": "timm:test_resnet", "teacher.weights": f"{my_folder}/teacher.safetensors", "name": "small",
        "student.model": "timm:test_resnet", "images.path": f"{my_folder}/my_images", "images.num_labelled": None,
    } | more_settings  # fmt: skip
    if page in ("generated", "recipes"):
        settings |= {"generate.pipeline": str(class_pipeline), "generate.steps": 2}
    if page == "results":
        settings |= {"compare.arms": "[scratch,align_uniform]"}
        shutil.copytree(class_pipeline, my_folder / "short-generator")
    small = [f"{key}={'null' if value is None else value}" for key, value in settings.items()]
    if page == "deploy":
        do("raydistill", "run", "smoke", *small)
    for words in commands(place):
        if (words[0] in ("submit", "job") and page != "cluster") or words[0] == "serve" or "--file" in words:
            continue
        takes_job = words[0] in ("run", "show", "check", "generate", "compare", "tune", "evaluate", "submit", "teach")
        do("raydistill", *words, *(["smoke", *small, *FEW.get(words[0], ())] if takes_job else []))
    if (block := "\n".join(blocks(place, "python"))) and page != "recipes":  # whose blocks fetch data
        smoke = read_mapping(str(ROOT / "jobs" / "overlays" / "smoke.yaml"), "")
        keywords = {**dict(flattened(smoke)), **settings}
        do(sys.executable, "-c", re.sub(r"teacher=.*\)", f"**{keywords!r})", block, count=1))

"""What is refused before anything is loaded, and that nothing is loaded for it."""

from __future__ import annotations

import socket

import pytest

from raydistill.config import load_config
from raydistill.errors import ConfigError
from raydistill.preflight import refuse_early
from tests.processes import python

OFF = ["teacher=null", *(f"loss.{name}_weight=0" for name in ("kd", "alignment", "uniformity"))]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher.model=vit_base_patch16_224"], "teacher.model=vit_base_.*did you mean timm:vit_base_.* or hf:"),
        (["student.model=./no/folder"], "student.model=./no/folder: no such folder; use timm:NAME, hf:NAME"),
        (["student.model=timm:resnet_18"], "=timm:resnet_18: timm has no model .* did you mean timm:resnet18"),
        (["teacher.model=timm:vit_bas_patch16_224.mae"], "timm:vit_bas.* did you mean timm:vit_base_patch16_224"),
        (["student.model=timm:resnet10t/../x"], "timm has no model of this name"),
        (["student.model=timm:"], "student.model=timm:: no such folder"),
        (["teacher.model=hf:a/b/c"], "teacher.model=hf:a/b/c: no such folder, not a name on the hub"),
        (["teacher.model=example:nothing"], "nothing"),
        (["teacher.weights=none.pth"], "teacher.weights=none.pth: no such file"),
        (["student.init=pretrained", "student.weights=none.safetensors"], "student.weights=none.safetensors: no such"),
        (["generate.pipeline=a/b", "generate.names=none.yaml"], "generate.names=none.yaml: no such file"),
        (["generate.pipeline=/no/pipeline"], "generate.pipeline=/no/pipeline: no such folder"),
    ],
)
def test_what_cannot_be_there_is_refused(words, message) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_early(load_config(["images.path=x", *words]))


@pytest.mark.parametrize(
    "words",
    [
        [],
        OFF,
        ["teacher.model=hf:google/vit-base", "cluster.address=auto"],
        [*OFF, "student.model=timm:resnet10t.c3_in1k"],
        ["teacher.model=s3://bucket/distill-1", "teacher.weights=s3://bucket/w.pth"],
        ["teacher.model=example:efficientnet-lite0"],
        ["teacher.model=."],
        ["teacher.model=timm:tv_resnet50"],  # a name of before
        ["teacher.model=timm:hf-hub:timm/no_such_thing", "student.model=timm:local-dir:x"],
    ],
)
def test_what_may_be_there_is_left_to_who_knows(words) -> None:
    assert refuse_early(load_config(["images.path=x", *words])) is None, "nothing is raised"


def test_a_cluster_that_nobody_answers_for_is_not_waited_for() -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        config = load_config(["images.path=x", f"cluster.address=127.0.0.1:{port}"])
        with pytest.raises(ConfigError, match=rf"address=127.0.0.1:{port}: no server answers \(Connection ref"):
            refuse_early(config)
        taken.listen()
        refuse_early(config)


def test_a_run_that_cannot_work_loads_neither_torch_nor_ray(tmp_path) -> None:
    (tmp_path / "torch.py").write_text("print('torch is loaded')")
    (tmp_path / "ray.py").write_text("print('ray is loaded')")
    words = [f"images.path={tmp_path}", "teacher.model=vit_tiny", f"workspace={tmp_path}/w"]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from raydistill.cli import main; main()"
    for command in ("run", "compare", "tune"):
        ended = python("-c", code, command, *words)
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
        assert "teacher.model=vit_tiny: no such folder" in ended.stderr
        assert ended.stdout.startswith(f"{command}: ")
        assert "is loaded" not in ended.stdout

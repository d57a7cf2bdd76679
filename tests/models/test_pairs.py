"""Any teacher with any student: small real architectures of both libraries, two steps of the loop, the default loss.

Each teacher's soft targets are its own features of the very views that the student sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from raydistill.config import Student, Teacher
from raydistill.data.sample import shard_name, working_images
from raydistill.data.targets import encode_targets, labels_of, read_samples
from raydistill.data.views import render, view_parameters
from raydistill.engine.batches import DistillJob
from raydistill.engine.distillation_model import DistillationModel
from raydistill.engine.loop import distill_loop
from raydistill.engine.workers import Worker
from raydistill.models.heads import LinearHead, encode_head
from raydistill.models.teacher import TeacherBackbone, load_teacher
from tests.models.conftest import classifier
from tests.small_run import CLASSES, NUM_VIEWS, TinySet, save_student

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 32
TIMM = ["test_vit", "test_resnet", "test_efficientnet", "test_convnext", "mobilenetv3_small_050"]
TRANSFORMERS = ["Swin", "ViT", "Dinov2"]
ARCHITECTURES = [*TIMM, *TRANSFORMERS]


@dataclass(frozen=True)
class Taught:
    """A teacher, what it was when it was loaded, and what it left for the student."""

    backbone: TeacherBackbone
    at_first: dict[str, torch.Tensor]
    head: LinearHead
    adapt: str
    teach: str


def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a transformers architecture, with its weights and its preprocessing."""
    root = tmp_path_factory.mktemp("hf")

    def save(kind: str) -> str:
        folder = root / kind
        if not folder.exists():
            classifier(kind).save_pretrained(folder)
            transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinySet:
    return TinySet(tmp_path_factory.mktemp("pairs") / "tiny", num_train=16, labelled=10)


@pytest.fixture(scope="module")
def taught(tiny: TinySet, folders: Callable[[str], str]) -> Callable[[str], Taught]:
    """What `adapt` and `teach` would leave of an architecture's teacher, made once for each."""
    made: dict[str, Taught] = {}

    def teach(name: str) -> Taught:
        if name not in made:
            made[name] = soft_targets(tiny, name, teacher_of(name, tiny.root, folders))
        return made[name]

    return teach


def teacher_of(name: str, root: Path, folders: Callable[[str], str]) -> TeacherBackbone:
    if name in TRANSFORMERS:
        return load_teacher(Teacher(model=folders(name)))[0]
    if name == "a student":
        config = Student(model="timm:test_resnet", size=SIZE)
        torch.manual_seed(0)
        return load_teacher(Teacher(model=str(save_student(root / name, config))))[0]
    torch.manual_seed(0)
    weights = root / f"{name}.safetensors"
    save_file(timm.create_model(name, num_classes=5).state_dict(), weights)
    return load_teacher(Teacher(model=f"timm:{name}", weights=str(weights), size=SIZE))[0]


def soft_targets(tiny: TinySet, name: str, backbone: TeacherBackbone) -> Taught:
    at_first = state(backbone)
    views, samples = tiny.job("views").config.views, tiny.samples
    adapt, teach = tiny.root / f"adapt {name}", tiny.root / f"teach {name}"
    for folder in (adapt, teach):
        folder.mkdir()
    every, truth = [], []
    for shard in range(len(samples.shards["train"])):
        table = read_samples(samples, "train", shard)
        ids = table["sample_id"].to_pylist()
        images = torch.from_numpy(working_images(table, samples.size).copy())
        features = []
        for view in range(NUM_VIEWS):
            parameters = torch.from_numpy(view_parameters(views, 0, ids, [view] * len(ids)))
            features.append(backbone(render(images, parameters, backbone.preprocessing)).numpy())
        (teach / f"{shard_name('train', shard)}.safetensors").write_bytes(encode_targets(ids, np.stack(features)))
        every.append(features[0])
        truth.append(labels_of(table))
    centres = np.stack([np.concatenate(every)[np.concatenate(truth) == k].mean(0) for k in range(len(CLASSES))])
    head = LinearHead(centres - centres.mean(0), np.zeros(len(CLASSES), np.float32))
    (adapt / "head.safetensors").write_bytes(encode_head(head))
    return Taught(backbone, at_first, head, str(adapt), str(teach))


def two_steps(tiny: TinySet, teacher: Taught, student: str, name: str) -> dict[str, float]:
    job = tiny.job(name, student={"model": student, "size": SIZE}, distill={"epochs": 1})
    job = replace(job, head=teacher.adapt, targets=teacher.teach)
    assert job.total_steps == 2
    return distill_loop(job, Worker(0, 1, "cpu", 1, lambda step: False))


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[tuple[DistillationModel, dict[str, torch.Tensor]]]:
    """Every model that the loop makes, and what it was before its first step."""
    made = []

    class Kept(DistillationModel):
        def __init__(self, job: DistillJob) -> None:
            super().__init__(job)
            made.append((self, state(self)))

    monkeypatch.setattr("raydistill.engine.loop.DistillationModel", Kept)
    return made


@pytest.mark.parametrize("student", ARCHITECTURES)
@pytest.mark.parametrize("teacher", [*ARCHITECTURES, "a student"])
def test_any_teacher_teaches_any_student(tiny, taught, folders, models, teacher, student) -> None:
    source = taught(teacher)
    model = folders(student) if student in TRANSFORMERS else f"timm:{student}"
    record = two_steps(tiny, source, model, f"{teacher} to {student}")
    assert all(math.isfinite(record[name]) for name in ("loss", "task", "kd", "alignment", "uniformity"))
    assert record["step"] == 2
    ((trained, before),) = models
    after = state(trained)
    for part in ("student.", "student_projection.", "teacher_projection."):
        moved = [k for k in before if k.startswith(part) and not torch.equal(before[k], after[k])]
        assert len(moved) > len([k for k in before if k.startswith(part)]) / 2, part
    np.testing.assert_array_equal(trained.head_weight.numpy(), source.head.weight_CD)
    np.testing.assert_array_equal(trained.head_bias.numpy(), source.head.bias_C)
    assert not any(trained.head_weight is value for value in trained.parameters())
    assert_same(source.at_first, state(source.backbone))
    assert not any(parameter.requires_grad for parameter in source.backbone.parameters())

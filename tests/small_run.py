"""Small real inputs for stages: a sample set and soft targets written as `prepare`, `adapt` and `teach` write them."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from rich.console import Console

from raydistill.config import RunConfig, load_config
from raydistill.config import Student as StudentConfig
from raydistill.data.sample import SampleSet, encode_shard, sample_id, shard_name
from raydistill.data.targets import encode_targets
from raydistill.engine import speed
from raydistill.engine.batches import DistillJob
from raydistill.models.heads import LinearHead, encode_head
from raydistill.models.student import Student, build_student, write_student
from raydistill.pages.report import write_report
from raydistill.results import Exported, Outcome
from raydistill.run import run_stages
from raydistill.runtime.progress import Progress
from raydistill.stages.export import export_student
from raydistill.storage.directory import StageDirectory

CLASSES = ("red", "green", "blue")
NUM_FEATURES, NUM_VIEWS, SIZE = 6, 2, 24


def painted(label: int, rng: np.random.Generator, size: int = SIZE) -> Image.Image:
    """A noisy picture whose mean colour is its class."""
    colour = np.full(3, 60.0)
    colour[label] = 180.0
    return Image.fromarray(np.clip(rng.normal(colour, 50, (size, size, 3)), 0, 255).astype(np.uint8))


def save_student(
    folder: Path, config: StudentConfig, classes: Sequence[str] = CLASSES, student: Student | None = None
) -> Path:
    """What `distill` leaves of a student, or else of a new one."""
    folder.mkdir(parents=True, exist_ok=True)
    student = build_student(config, len(classes)) if student is None else student
    for name, data in write_student(student, config, classes, {"size": SIZE, "fit": "crop"}).items():
        (folder / name).write_bytes(data)
    return folder


def write_shard(
    folder: Path, name: str, images: Sequence[bytes], labels: Sequence[int | None], of: Sequence[bytes] | None = None
) -> list[str]:
    """A shard of working images as `prepare` writes it, and their ids, which are those of the files they are `of`."""
    ids = [sample_id(file) for file in (images if of is None else of)]
    columns = {"sample_id": ids, "image": images, "label": pa.array(labels, pa.int32())}
    columns |= {"source": ["real"] * len(ids), "split": [name.partition("-")[0]] * len(ids)}
    (folder / f"{name}.parquet").write_bytes(encode_shard(pa.table(columns)))
    return ids


class TinySet:
    """Writes a sample set with soft targets that know the class, and makes jobs on it."""

    def __init__(
        self, root: Path, num_train: int, labelled: int | None = None, shard_size: int = 16, size: int = SIZE
    ) -> None:
        self.root, rng = root, np.random.default_rng(0)
        labelled = num_train if labelled is None else labelled
        (root / "samples").mkdir(parents=True)
        (root / "teach").mkdir()
        shards: dict[str, tuple[int, ...]] = {}
        centres = rng.normal(0, 1, (len(CLASSES), NUM_FEATURES))
        for split, count in {"train": num_train, "val": 12, "test": 0}.items():
            sizes = []
            border = labelled if split == "train" else count  # no shard goes beyond it
            starts = [*range(0, border, shard_size), *range(border, count, shard_size), count]
            for k, (first, last) in enumerate(itertools.pairwise(starts)):
                truth = [i % len(CLASSES) for i in range(first, last)]
                images = [painted(t, rng, size).tobytes() for t in truth]
                shown = [t if first < border else None for t in truth]
                ids = write_shard(root / "samples", shard_name(split, k), images, shown)
                features = centres[truth] + rng.normal(0, 0.1, (NUM_VIEWS, len(ids), NUM_FEATURES))
                if split == "train":
                    (root / "teach" / f"{shard_name(split, k)}.safetensors").write_bytes(encode_targets(ids, features))
                sizes.append(len(ids))
            shards[split] = tuple(sizes)
        (root / "adapt").mkdir()
        self.head = LinearHead(3 * centres.astype(np.float32), np.zeros(len(CLASSES), np.float32))
        (root / "adapt" / "head.safetensors").write_bytes(encode_head(self.head))
        self.samples = SampleSet(
            str(root / "samples"), CLASSES, size, shards, {"train": labelled, "val": 12, "test": 0}, 0, {}, {}
        )

    def job(self, name: str, teacher: bool = True, **sections: dict[str, object]) -> DistillJob:
        tree = {
            "images": {"path": "unused", "size": SIZE},
            "student": {"model": "timm:test_resnet", "size": SIZE},
            "views": {"per_image": NUM_VIEWS, "min_scale": 0.5},
            "loss": {"projection_dim": 8},
            "distill": {"epochs": 4, "batch_size": 8, "num_workers": 0, "checkpoint_seconds": 0, "precision": "fp32"},
        }
        if not teacher:
            tree |= {"teacher": None}
            tree["loss"] = {"kd_weight": 0, "alignment_weight": 0, "uniformity_weight": 0}
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        config = RunConfig.model_validate(tree)
        path = self.root / name
        path.mkdir(exist_ok=True)
        head, targets = (str(self.root / "adapt"), str(self.root / "teach")) if teacher else (None, None)
        return DistillJob(config, self.samples, str(path), head, targets)


@pytest.fixture
def tiny_set(tmp_path: Path) -> TinySet:
    return TinySet(tmp_path / "tiny", num_train=40, labelled=12)


@pytest.fixture
def exported(tiny_set: TinySet, tmp_path: Path, progress: Progress, monkeypatch) -> Callable[..., tuple[Exported, str]]:
    """Writes a student of random weights, or what `change` makes of it, exports it, and gives the result and the
    checkpoint's folder."""
    for name in ("_ALONE_SECONDS", "_BATCH_SECONDS"):
        monkeypatch.setattr(speed, name, 0.0)

    def write(
        model: str = "timm:test_resnet",
        size: int = SIZE,
        classes: tuple[str, ...] = CLASSES,
        change: Callable[[Student], object] = lambda student: None,
        **settings: object,
    ) -> tuple[Exported, str]:
        job = tiny_set.job("job", False, student={"model": model, "size": size}, export=settings)
        torch.manual_seed(0)
        student = build_student(job.config.student, len(CLASSES))
        torch.nn.init.normal_(student.classifier.weight)  # or all logits would be near zero
        change(student)
        checkpoint = save_student(tmp_path / "student", job.config.student, classes, student)
        directory = StageDirectory(str(tmp_path / "export"), "export", "{}")

        def card(about: dict, exported: Exported) -> str:
            return f"{about['model']}: {', '.join(sorted(exported.files))}"

        return export_student(job.config, tiny_set.samples, str(checkpoint), card, directory, progress), str(checkpoint)

    return write


@pytest.fixture
def make_set(tmp_path: Path):
    return lambda name, **sizes: TinySet(tmp_path / name, **sizes)


def small_job(folder: Path, image_folder: Path, teacher_weights: Path) -> list[str]:
    """What a user would type for a small real run, in `folder`."""
    job = {
        "workspace": str(folder / "workspace"),
        "images": {"path": str(image_folder), "size": 32, "shard_size": 16},
        "teacher": {
            "model": "timm:test_resnet",
            "weights": str(teacher_weights),
            "size": 32,
            "allow_near_chance": True,
            "precision": "fp32",  # timing would decide, and runs are compared bit by bit
        },
        "student": {"model": "timm:test_resnet", "size": 24},
        "views": {"per_image": 2},
        "loss": {"projection_dim": 8},
        "distill": {"epochs": 3, "batch_size": 16, "num_workers": 0, "checkpoint_seconds": 0, "precision": "fp32"},
        "export": {"allow_useless": True},
        "tracking": {"enabled": False},  # making MLflow's database takes seconds
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))  # JSON is YAML
    return [str(path)]


@pytest.fixture
def words(image_folder: Path, teacher_weights: Path, tmp_path: Path) -> list[str]:
    return small_job(tmp_path, image_folder, teacher_weights)


@pytest.fixture(scope="module")
def finished(taught_workspace, image_folder, teacher_weights, tmp_path_factory) -> tuple[RunConfig, Outcome, Path]:
    """A run from first to last, what it came to, and its report."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(taught_workspace, folder / "workspace", symlinks=True)
    config = load_config([*small_job(folder, image_folder, teacher_weights), 'name=<i>größe</i> & "co"'])
    outcome = run_stages(config, Progress(Console(quiet=True)), "export")
    return config, outcome, Path(write_report(config, outcome, "raydistill run job.yaml name='<i>'"))


@pytest.fixture
def progress() -> Progress:
    return Progress(Console(quiet=True))


@pytest.fixture
def taught(taught_workspace: Path, tmp_path: Path) -> None:
    """The job of `words` finds a copy of it."""
    shutil.copytree(taught_workspace, tmp_path / "workspace", symlinks=True)

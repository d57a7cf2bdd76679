"""The parts that benchmarks/engine.py measures with: a meter that lets two paths take turns, a count of the operations
that wait for the device, and small made-up data on the disk in the form that the stages write.

Shapes: B images, K views, D features.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import timm
import torch
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from raydistill.config import Loss, RunConfig
from raydistill.data.sample import SampleSet, encode_shard, sample_id, shard_name, working_images
from raydistill.data.targets import encode_targets, read_samples
from raydistill.engine.batches import DistillJob
from raydistill.engine.workers import Worker
from raydistill.models.heads import HEAD_FILE, LinearHead, encode_head

CLASSES, VIEWS = 10, 4
SHARD_STEPS, EPOCH_STEPS = 4, 64  # steps that the images of a shard last, and steps of an epoch
TERMS = [key.removesuffix("_weight") for key in Loss.model_fields if key.endswith("_weight")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Sizes:
    """Networks of timm and sides in pixels: `side` is that of the working images, `matmul` that of the product that
    measures the peak."""

    teacher: str
    teacher_side: int
    student: str
    student_side: int
    side: int
    batch: int
    matmul: int
    unet_side: int
    unet_channels: tuple[int, int]
    unet_steps: int


SIZES = {
    "cuda": Sizes("vit_base_patch16_224", 224, "resnet50", 224, 224, 128, 8192, 64, (128, 256), 10),
    "cpu": Sizes("tf_efficientnet_lite2", 128, "resnet10t", 64, 128, 64, 2048, 32, (64, 128), 4),  # as in the demo
    "tiny": Sizes("test_resnet", 32, "test_resnet", 24, 32, 8, 256, 8, (8, 16), 2),
}


@dataclass(frozen=True)
class Row:
    """A kind of work: units a second of ours and of the bare loop. None where it was not measured."""

    name: str
    unit: str
    ours: float | None = None
    bare: float | None = None
    share_of_peak: float | None = None
    waits: float | None = None  # in a step
    difference: float | None = None  # between what the two compute
    over_cross_entropy: float | None = None  # of a student: over a bare step with cross-entropy alone
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.ours / self.bare if self.ours and self.bare else None


class Waits(TorchDispatchMode):
    """Counts the operations that wait for the device, and on CUDA what its driver says of them, whichever is more. On
    CPUs optimizers are left out: those that are not fused count their steps on the host."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._kind, self._seen, self._in_optimizer = device.type, 0, False
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix("aten::")
        source = args[1] if name == "copy_" else args[0] if args else None
        if self._is_there(source) and not self._in_optimizer:
            indices = args[1] if name.startswith("index") and name != "index_select" else []
            masks = [i for i in indices if i is not None and i.dtype == torch.bool]
            leaves = name in ("copy_", "_to_copy") and not self._is_there(result)
            self._seen += bool(masks) or leaves or name.startswith(self.NAMES)
        return result

    def _is_there(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.device.type == self._kind

    def _optimizes(self, now: bool) -> Callable[..., None]:
        return lambda *_: setattr(self, "_in_optimizer", now and self._kind == "cpu")

    def __enter__(self) -> Waits:
        self._stack = contextlib.ExitStack()
        for register, now in ((register_optimizer_step_pre_hook, True), (register_optimizer_step_post_hook, False)):
            self._stack.callback(register(self._optimizes(now)).remove)
        self._warned = self._stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        if self._kind == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
            self._stack.callback(torch.cuda.set_sync_debug_mode, "default")
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()
        self.count = max(self._seen, sum("called a synchronizing" in str(warning.message) for warning in self._warned))


class Meter:
    """Measures on a device: turns of `seconds` each, `repeats` of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self._seconds, self.repeats = torch.device(options.device), options.seconds, options.repeats
        self.threads = torch.get_num_threads()

    def now(self) -> float:
        """The time when all work so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def count(self, seconds: float) -> int:
        """How many calls of so many seconds make a turn."""
        return max(1, min(round(self._seconds / seconds), 1000))

    @contextlib.contextmanager
    def all_threads(self) -> Iterator[None]:
        """For a bare loop within the training loop, which may have set fewer for itself."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        yield
        torch.set_num_threads(before)

    def timed(self, path: Callable[[], object], count: int) -> float:
        """Seconds of one call."""
        started = self.now()
        for _ in range(count):
            path()
        return (self.now() - started) / count

    def rates(self, *paths: Callable[[], object]) -> list[float]:
        """Calls a second of each path; they take turns."""
        for path in paths:
            path()
        counts = [self.count(self.timed(path, 1)) for path in paths]
        turns = [[self.timed(*each) for each in zip(paths, counts, strict=True)] for _ in range(self.repeats)]
        return [1 / median(taken) for taken in zip(*turns, strict=True)]

    def waits(self, path: Callable[[], object]) -> int:
        with Waits(self.device) as waits:
            path()
        return waits.count

    def peak(self, side: int, precision: str) -> float:
        """FLOP/s of a matrix product, in the fastest turn."""
        a, b = (torch.randn(side, side, device=self.device).to(DTYPES[precision]) for _ in range(2))
        self.timed(lambda: a @ b, 2)
        count = self.count(self.timed(lambda: a @ b, 1))
        return 2 * side**3 / min(self.timed(lambda: a @ b, count) for _ in range(self.repeats))


def flops(path: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        path()
    return int(counter.get_total_flops())


def apart(ours: Any, bare: Any) -> float:
    """The largest difference between two arrays, over the largest value."""
    ours, bare = (torch.as_tensor(each).double().cpu() for each in (ours, bare))
    return float((ours - bare).abs().max() / bare.abs().max())


@dataclass(frozen=True)
class Data:
    """Samples, soft targets and a head in a folder, as `prepare`, `teach` and `adapt` leave them."""

    root: Path
    config: RunConfig
    samples: SampleSet

    @property
    def ids(self) -> list[str]:
        return list(read_samples(self.samples, "train", 0)["sample_id"].to_pylist())

    def images(self) -> np.ndarray:
        """(B, H, H, 3) uint8 of the first shard, as the stages read them."""
        return working_images(read_samples(self.samples, "train", 0), self.samples.size)

    def job(self, loss: str, num_shards: int) -> DistillJob:
        """A training with this term of the loss alone, or with the `default` loss. With one shard it has one epoch."""
        tree = self.config.model_dump()
        tree["loss"] |= {} if loss == "default" else {f"{term}_weight": float(term == loss) for term in TERMS}
        tree["distill"]["epochs"] = 1 if num_shards == 1 else 1000
        shards = {"train": self.samples.shards["train"][:num_shards], "val": ()}
        labelled = {"train": sum(shards["train"]), "val": 0}
        samples = dataclasses.replace(self.samples, shards=shards, num_labelled=labelled)
        (path := self.root / f"{loss}-{num_shards}").mkdir()
        return DistillJob(RunConfig.model_validate(tree), samples, str(path), str(self.root), str(self.root / "teach"))


def new_config(root: Path, sizes: Sizes, precision: str) -> RunConfig:
    """A job whose teacher has random weights, which lie in the folder `root`."""
    torch.manual_seed(0)
    weights = root / "teacher.safetensors"
    save_file(timm.create_model(sizes.teacher, num_classes=CLASSES).state_dict(), weights)
    distill = {"batch_size": sizes.batch, "schedule": "constant", "keep": "last", "precision": precision}
    tree: dict[str, Any] = {
        "images": {"path": "unused", "size": sizes.side},
        "teacher": {"model": f"timm:{sizes.teacher}", "weights": str(weights), "size": sizes.teacher_side}
        | {"batch_size": sizes.batch, "precision": precision},
        "student": {"model": f"timm:{sizes.student}", "size": sizes.student_side},
        "views": {"per_image": VIEWS, "min_scale": 0.35},
        "distill": distill | {"decay_norms": True, "cache": "memory", "checkpoint_seconds": 1e6},
    }
    return RunConfig.model_validate(tree)


def write_data(root: Path, config: RunConfig, sizes: Sizes, width: int) -> Data:
    """With random features of this width. All shards are links to one."""
    rng, count = np.random.default_rng(0), SHARD_STEPS * sizes.batch
    pictures = [_picture(rng, sizes.side) for _ in range(count)]
    ids = [sample_id(picture.tobytes()) for picture in pictures]
    columns: dict[str, Any] = {"sample_id": ids, "image": [picture.tobytes() for picture in pictures]}
    columns |= {"label": pa.array(rng.integers(0, CLASSES, count), pa.int32())}
    columns |= {"source": ["real"] * count, "split": ["train"] * count}
    shards = (count,) * (EPOCH_STEPS // SHARD_STEPS)
    features = encode_targets(ids, rng.normal(0, 0.5, (VIEWS, count, width)))
    for place, data in (("samples/{}.parquet", encode_shard(pa.table(columns))), ("teach/{}.safetensors", features)):
        first, *others = (root / place.format(shard_name("train", k)) for k in range(len(shards)))
        first.parent.mkdir()
        first.write_bytes(data)
        for other in others:
            os.link(first, other)
    weight = rng.normal(0, width**-0.5, (CLASSES, width)).astype(np.float32)
    (root / HEAD_FILE).write_bytes(encode_head(LinearHead(weight, np.zeros(CLASSES, np.float32))))
    samples = SampleSet(
        str(root / "samples"), tuple(map(str, range(CLASSES))), sizes.side, {"train": shards, "val": ()},
        {"train": sum(shards), "val": 0}, 0, {}, {},
    )  # fmt: skip
    return Data(root, config, samples)


def _picture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Soft shades and noise, as photographs have them, so that PNG takes as long as for these."""
    down, across = np.mgrid[:side, :side][..., None] / side
    shades = 0.5 + 0.4 * np.sin(down * rng.uniform(2, 40, 3) + across * rng.uniform(2, 40, 3))
    return np.asarray(((shades + rng.normal(0, 0.02, shades.shape)).clip(0, 1) * 255).astype(np.uint8))


def worker(meter: Meter) -> Worker:
    """This process."""
    return Worker(0, 1, str(meter.device), meter.threads, lambda step: False)


@dataclass(frozen=True)
class Bench:
    """What all rows need. `peaks`: FLOP/s by precision. `compiles`: measure bare loops of compiled networks, too."""

    meter: Meter
    sizes: Sizes
    data: Data
    teacher_precision: str
    precision: str  # of the student
    peaks: dict[str, float]
    compiles: bool

"""benchmarks/engine.py: ours and the bare loops compute the same, and programs can read what it writes. Tests marked
`gpu` need no fixtures and no Ray: `python -m pytest --noconftest -m gpu tests/benchmarks`."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks.engine import ALL, measure, parse_options
from benchmarks.engine_bench import SIZES, TERMS, Data, Waits, new_config, write_data
from benchmarks.engine_networks import run_between
from raydistill.data.train_split import Batch
from raydistill.data.views import stored_views
from raydistill.engine.batches import read_batches
from raydistill.engine.frozen_teacher import FrozenTeacher
from raydistill.engine.workers import Worker

ROOT = Path(__file__).parents[2]
TINY = ("--device", "cpu", "--tiny", "--precision")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
# Without the libraries that a GPU machine may lack, as a file, from another folder.
ALONE = """
import runpy, sys
sys.modules.update(dict.fromkeys(("ray", "diffusers", "optuna", "mlflow", "omegaconf")))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def assert_sound(figures: dict) -> None:
    for key in ("teach_ratio", "distill_ratio", "shard_read_speedup", "view_draw_speedup"):
        assert figures[key] > 0
    assert figures["syncs_per_step"] == 0
    rows = {row["name"]: row for row in figures["rows"]}
    for name, row in rows.items():
        # Drawing compares the means of random numbers.
        assert row["difference"] is None or row["difference"] < (0.1 if name == "drawing views" else 1e-3), row
    compared = {"teacher", "student, default", "drawing views", "rendering views", "reading shards"}
    assert {name for name in rows if rows[name]["difference"] is not None} >= compared
    assert all(rows[name]["share_of_peak"] > 0 for name in rows if name.startswith(("teacher", "student")))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("precision", "losses"), [("fp32", ["default", "crd"]), ("bf16", ["default"])])
def test_ours_and_the_bare_loops_compute_the_same(precision, losses) -> None:
    figures = measure(parse_options([*TINY, precision, "--losses", *losses]), Console(quiet=True))
    assert_sound(figures)
    assert figures["precision"] == {"teacher": precision, "student": precision}
    assert figures["rows"][-1]["difference"] < 0.01  # grey levels of generated images
    json.dumps(figures)


@pytest.mark.slow
def test_every_loss_is_measured_where_there_is_no_ray(tmp_path) -> None:
    words = [ROOT / "benchmarks" / "engine.py", *TINY, "fp32", "--json", "engine.json"]
    # Two threads, with which the loop computes in replicas; they wait without spinning.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "0"}
    subprocess.run([sys.executable, "-c", ALONE, *map(str, words)], cwd=tmp_path, env=environment, check=True)
    figures = json.loads((tmp_path / "engine.json").read_text())
    assert_sound(figures)
    assert {row["name"] for row in figures["rows"]} >= {f"student, {loss}" for loss in ALL}
    assert figures["rows"][-1]["note"] == "diffusers is not installed"


def test_waits_are_counted() -> None:
    numbers, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    with Waits(CPU) as waits:
        numbers.sum().item()
        numbers[mask]
        bool(numbers.isnan().any())
        mask.nonzero()
        numbers[:2].sum() + numbers[torch.tensor([0, 1])].sum()
    assert waits.count == 4


def tiny(root: Path) -> Data:
    config = new_config(root, SIZES["tiny"], "fp32")
    return write_data(root, config, SIZES["tiny"], width=8)


@pytest.mark.parametrize("loss", [pytest.param(loss, marks=on_a_gpu) for loss in ("default", *TERMS)])
def test_no_step_on_cuda_waits(tmp_path, loss) -> None:
    modes = list[int]()

    def between_steps() -> Iterator[None]:
        for mode in ("default",) * 10 + ("error",) * 10:  # a step that waits raises in the second ten
            torch.cuda.set_sync_debug_mode(mode)
            modes.append(torch.cuda.get_sync_debug_mode())
            yield

    try:
        run_between(tiny(tmp_path).job(loss, 16), Worker(0, 1, "cuda", 1, lambda step: False), between_steps())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert modes == [0] * 10 + [2] * 10


@pytest.mark.parametrize("device", [pytest.param(CUDA, marks=on_a_gpu)])
def test_a_split_on_cuda_gives_the_batches_of_memory_and_never_waits(tmp_path, device) -> None:
    job, batches = tiny(tmp_path).job("default", 16), dict[str, list[Batch]]()
    for cache in ("memory", "auto"):
        settings = job.config.distill.model_copy(update={"cache": cache})
        config = job.config.model_copy(update={"distill": settings})
        source = read_batches(replace(job, config=config), 0, Worker(0, 1, str(device), 1, lambda step: False))
        batches[cache] = [next(source)]  # loads the split
        try:
            torch.cuda.set_sync_debug_mode("error")
            batches[cache] += itertools.islice(source, 5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for memory, on_device in zip(batches["memory"], batches["auto"], strict=True):
        assert all(on.is_cuda for on in (on_device.images_VHHC, on_device.features_VD, on_device.rows_V))
        for first, second in zip(memory.arrays(), on_device.arrays(), strict=True):
            assert first is second or np.array_equal(first, torch.as_tensor(second).cpu().numpy())


@pytest.mark.parametrize("device", [pytest.param(CUDA, marks=on_a_gpu)])
def test_the_teacher_on_cuda_gives_the_features_of_the_cpu(tmp_path, device) -> None:
    data = tiny(tmp_path)
    views = stored_views(data.config.views, 0, data.ids)
    expected, found = (
        FrozenTeacher(data.config.teacher, where, 1, "").features(data.images(), views) for where in (CPU, device)
    )
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=0.02, atol=0.02)

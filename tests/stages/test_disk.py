"""Disks that are too small are refused before a byte of the images or soft targets is written (case C20)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from raydistill.cluster.plan import plan_resources
from raydistill.config import load_config
from raydistill.data.decode import decode
from raydistill.data.sources.listing import list_images
from raydistill.engine.loop import distill_loop
from raydistill.engine.teacher_pool import refuse_large_targets
from raydistill.engine.workers import Worker
from raydistill.errors import ConfigError
from raydistill.identity import prepare_directory
from raydistill.stages import prepare
from raydistill.stages.teach import stream_soft_targets
from raydistill.storage.directory import free_bytes, refuse_small_disk
from raydistill.storage.filesystems import open_filesystem


@pytest.fixture
def free(monkeypatch) -> Callable[[int], None]:
    """Makes the disk look as if it had so many bytes free."""

    def set_free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=count))

    return set_free


def needed(refused: pytest.ExceptionInfo) -> int:
    (message,) = refused.value.args
    assert "\n" not in message
    return int(re.search(r"may take ([\d,]+) bytes, and [\d,]+ are free in /", message)[1].replace(",", ""))


@pytest.fixture
def flat_images(tmp_path) -> tuple[Path, int]:
    """Thirty pictures that LZ4 makes much smaller than their pixels, and the bytes of them all at 64 pixels."""
    total = 0
    for k in range(30):
        path = tmp_path / "images" / ("red", "blue")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 60), (8 * k, 0, 90)).save(path)
        total += pa.compress(decode(path.read_bytes(), 64, "crop", 10**6).tobytes(), codec="lz4").size
    return tmp_path / "images", total


def test_prepare_is_refused_where_its_images_do_not_fit_twice(flat_images, tmp_path, progress, free) -> None:
    folder, total = flat_images
    config = load_config([f"images.path={folder}", "images.size=64", f"workspace={tmp_path}/workspace"])
    listing = list_images(config.images)
    free(1000)
    with pytest.raises(ConfigError, match=r"prepare: 30 images of 64 pixels.*lower images\.size") as refused:
        prepare.prepare_samples(
            config, listing, prepare_directory(config, listing), plan_resources(config, 2.0, 0.0, 2), progress
        )
    assert needed(refused) == pytest.approx(2 * total, abs=1)
    assert not list(tmp_path.glob("workspace/*/*.parquet"))


def test_images_count_at_their_size_on_disk_and_once_where_they_are_decoded(flat_images, tmp_path, free) -> None:
    folder, total = flat_images
    config = load_config([f"images.path={folder}", "images.size=64", f"workspace={tmp_path}/workspace"])
    listing = list_images(config.images)
    assert 2 * total < 30 * 64 * 64 * 3
    free(2 * total + 1)
    prepare._refuse_small_disk(config, listing.entries, 30)
    free(1000)
    with pytest.raises(ConfigError) as refused:
        prepare._refuse_small_disk(config, listing.entries, 0)
    assert needed(refused) == pytest.approx(total, abs=1)


def test_teach_is_refused_where_the_shards_that_are_missing_do_not_fit(tiny_set, tmp_path, progress, free) -> None:
    config = tiny_set.job("job").config.model_copy(update={"workspace": str(tmp_path)})
    head, folder = str(tiny_set.root / "adapt"), tmp_path / "targets"
    fs, place = open_filesystem(str(folder))
    directory = SimpleNamespace(path=place, place=place, name="targets", identity="{}", fs=fs)
    directory.begin = lambda: frozenset(fs.names(place))
    plan = plan_resources(config, 2.0, 0.0, 2)
    free(500)
    with pytest.raises(ConfigError, match=r"teach: 6 features of 2 views.*lower views\.per_image") as refused:
        stream_soft_targets(config, tiny_set.samples, head, directory, plan, progress)
    assert needed(refused) == 40 * (2 * 6 * 2 + 16)
    assert not folder.exists()
    folder.mkdir()
    (folder / "train-00000.safetensors").touch()
    with pytest.raises(ConfigError) as refused:
        stream_soft_targets(config, tiny_set.samples, head, directory, plan, progress)
    missing = sum(tiny_set.samples.shards["train"][1:])
    assert needed(refused) == missing * (2 * 6 * 2 + 16)
    free(missing * (2 * 6 * 2 + 16))
    refuse_large_targets(config, missing, head)


@pytest.mark.parametrize(("optimizer", "ema"), [("adamw", None), ("sgd", 0.9)])
def test_distill_is_refused_where_three_checkpoints_do_not_fit(tiny_set, free, optimizer, ema) -> None:
    job = tiny_set.job("job", distill={"optimizer": optimizer, "ema_decay": ema, "epochs": 3})
    worker = Worker(0, 1, "cpu", 1, lambda step: False)
    free(1000)
    with pytest.raises(ConfigError, match=r"distill: its checkpoints.*choose another workspace") as refused:
        distill_loop(job, worker)
    assert not Path(job.path, "checkpoints").exists()
    free(needed(refused))
    distill_loop(job, worker)
    newest = max(Path(job.path, "checkpoints").glob("step-*"))
    written = sum(file.stat().st_size for file in newest.iterdir())
    assert needed(refused) / 3 == pytest.approx(written, rel=0.1)  # names and shapes are beside the numbers


def test_of_an_object_store_nothing_is_known(tiny_set, free) -> None:
    free(0)
    config = tiny_set.job("job").config.model_copy(update={"workspace": "memory://somewhere"})
    assert free_bytes(config) == np.inf
    refuse_small_disk(config, "all of it", 1e30, "buy more")
    refuse_large_targets(config, 10**12, str(tiny_set.root / "adapt"))

"""Mutated files of exported folders, and of a workspace's state: read, or refused in one sentence, and soon."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raydistill.engine.records import read_progress, write_progress
from raydistill.errors import CheckpointError, ConfigError
from raydistill.inference.predict import Predictor
from raydistill.results import StudentCheckpoint
from raydistill.storage.directory import StageDirectory
from raydistill.storage.state import result_of
from tests.data.test_fuzz import mutated

MOST_SECONDS = 20.0  # on a machine that is busy with other things as well


def fuzz(files: list[Path], read: Callable[[], object], count: int, seed: int) -> tuple[int, int]:
    """How often what is in one of the files was read, and how often refused; the files are as before."""
    rng, originals = np.random.default_rng(seed), [file.read_bytes() for file in files]
    taken = refused = 0
    for _ in range(count):
        at = int(rng.integers(0, len(files)))
        data = mutated(originals[at], originals, rng)
        files[at].write_bytes(data)
        started = time.monotonic()
        try:
            read()
        except (ConfigError, CheckpointError) as error:
            refused += 1
            if "\n" in str(error) or error.exit_code != 2:
                raise AssertionError(f"{error} of {files[at].name} {data[:4096].hex()}") from error
        except BaseException as error:
            raise AssertionError(f"{error!r} of {files[at].name} {data[:4096].hex()}") from error
        else:
            taken += 1
        assert time.monotonic() - started < MOST_SECONDS, data[:4096].hex()
        files[at].write_bytes(originals[at])
    return taken, refused


def answers(folder: str, engine: Any) -> np.ndarray:
    predictor = Predictor(folder, engine)
    side = predictor.working_image(blank()).shape[0]
    return predictor.probabilities(np.zeros((1, side, side, 3), np.uint8))


def blank() -> bytes:
    Image.new("RGB", (40, 30)).save(sink := io.BytesIO(), "PNG")
    return sink.getvalue()


def state(folder: Path) -> tuple[list[Path], Callable[[], object]]:
    directory = StageDirectory(str(folder), "distill", "{}")
    directory.begin()
    directory.finish(asdict(StudentCheckpoint(str(folder), 0.5, 1000, 20, 4, 2, "epoch 2 of 4 ships: 0.500 on val")))
    directory.write_bill({"seconds": 3.5, "node_seconds": {"head": 3.5}, "versions": {"torch": "2"}})
    write_progress(str(folder), 20, 3)

    def read() -> object:
        done = StageDirectory(str(folder), "distill", "{}").done()
        return None if done is None else (result_of(done, str(folder), StudentCheckpoint), read_progress(str(folder)))

    return [folder / "DONE", folder / "progress.json"], read


def folder_of(exported: Any, engine: str) -> tuple[list[Path], Callable[[], object]]:
    result, _ = exported(formats=["onnx"])
    weights = ["model.onnx"] if engine == "onnx" else ["config.json", "model.safetensors"]
    return [Path(result.path, name) for name in ("raydistill.json", *weights)], lambda: answers(result.path, engine)


def files_of(kind: str, exported: Any, tmp_path: Path) -> tuple[list[Path], Callable[[], object]]:
    return state(tmp_path / "distill") if kind == "state" else folder_of(exported, kind)


@pytest.mark.parametrize("kind", ["state", "onnx", "torch"])
def test_mutated_files_are_read_or_refused(exported, tmp_path, kind):
    assert min(fuzz(*files_of(kind, exported, tmp_path), 60, seed=1)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["state", "onnx", "torch"])
def test_two_thousand_mutated_files(exported, tmp_path, kind):
    seed = int(time.time())
    print(f"seed {seed}")
    assert min(fuzz(*files_of(kind, exported, tmp_path), 2000, seed)) > 0

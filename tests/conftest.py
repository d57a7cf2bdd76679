"""Shared by all tiers: nothing here starts Ray."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# The machine decides how long an example takes; a slow one is no fault.
settings.register_profile("raydistill", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("raydistill")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small take ten times as long where torch's threads wait for each other on a busy machine."""
    import torch  # not every module of tests needs it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def class_folders(tmp_path: Path) -> Callable[[Mapping[str, int]], Path]:
    """Writes a tree of small, distinct pictures: `{"train/cat": 3}` makes three in that folder. Gives the root."""

    def write(counts: Mapping[str, int], name: str = "images") -> Path:
        root = tmp_path / name
        generator = np.random.default_rng(0)
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                picture = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(picture).save(root / folder / f"{index}.png")
        return root

    return write


@pytest.fixture
def photo() -> np.ndarray:
    """128 x 128 x 3 pixels with what photographs have: soft shades, a sharp edge, fine texture, sensor noise."""
    rows, columns = np.mgrid[0:128, 0:128] / 128
    shades = np.stack(
        [0.5 + 0.4 * np.sin(9 * columns + 3 * rows), 0.5 + 0.4 * np.cos(21 * rows * columns), columns * rows], axis=-1
    )
    shades[40:80, 30:90] = [0.9, 0.1, 0.2]
    shades[90:120, 10:60] *= 0.6 + 0.4 * (np.arange(50) % 4 < 2)[None, :, None]
    shades += np.random.default_rng(0).normal(0, 0.02, shades.shape)
    return (shades.clip(0, 1) * 255).round().astype(np.uint8)

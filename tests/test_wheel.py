"""The wheel alone, in an environment of its own, runs a job that comes with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_job_by_its_name_with_the_source_gone(tmp_path: Path) -> None:
    source, there, environment = tmp_path / "source", tmp_path / "elsewhere", tmp_path / "environment"
    there.mkdir()
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def do(*words: object) -> str:
        done = subprocess.run(
            list(map(str, words)), cwd=there, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    do("git", "clone", "--quiet", ROOT, source)
    do(sys.executable, "-m", "venv", environment)
    pip = (environment / "bin" / "python", "-m", "pip", "--quiet")
    do(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source)
    shutil.rmtree(source)
    (wheel,) = tmp_path.glob("*.whl")
    do(*pip, "install", f"{wheel}[demo]")
    said = do(environment / "bin" / "raydistill", "run", "fashion_mnist", "smoke")
    assert "test accuracy" in said
    assert list((there / "workspace").glob("export-*/model.onnx"))
    assert "temperature: 3" in do(environment / "bin" / "raydistill", "show", "demo", "loss.temperature=3")

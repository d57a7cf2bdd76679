"""The counters that Ray shows: there where Ray runs, and nothing elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from raydistill.runtime import metrics
from raydistill.storage.filesystems import read_bytes, write_bytes
from tests.processes import wait_for


def test_outside_ray_nothing_is_counted_and_ray_is_not_loaded(tmp_path: Path) -> None:
    words = "import sys; from raydistill.storage.filesystems import write_bytes; write_bytes(sys.argv[1], b'1'); "
    words += "assert not any(name.partition('.')[0] == 'ray' for name in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", words, str(tmp_path / "a")], check=False)
    assert ended.returncode == 0


def test_a_file_counts_for_the_stage_in_whose_directory_it_lies() -> None:
    places = ["runs/w/teach-0123456789ab/train-00000.safetensors", "/w/features-0123456789ab", "/w/jobs/a/b.json", "a"]
    assert [metrics.stage_of(place) for place in places] == ["teach", "features", "other", "other"]


@pytest.mark.slow  # Ray reports every ten seconds
@pytest.mark.cluster
def test_ray_shows_what_driver_and_tasks_count(ray_session: None, tmp_path: Path) -> None:
    import ray

    @ray.remote(num_cpus=1)
    def task(path: str) -> None:
        write_bytes(path, b"12345")
        metrics.count("raydistill_teacher_views", 7, "teach")

    file = str(tmp_path / "prepare-0123456789ab/a")
    ray.get(task.remote(file))
    read_bytes(file)
    port = ray.nodes()[0]["MetricsExportPort"]
    job = ray.get_runtime_context().get_job_id()

    def shown() -> dict[tuple[str, str], float]:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return {
            (match[1], stage[1]): float(line.rpartition(" ")[2])
            for line in lines
            if (match := re.match(r"ray_(raydistill_\w+?)(_total)?\{", line)) and f'job="{job}"' in line
            if (stage := re.search(r'stage="(\w+)"', line))
        }

    wanted = {
        ("raydistill_bytes_written", "prepare"): 5.0, ("raydistill_bytes_read", "prepare"): 5.0,
        ("raydistill_teacher_views", "teach"): 7.0,
    }  # fmt: skip
    wait_for(lambda: wanted.items() <= shown().items(), 60)
    assert shown().items() >= wanted.items(), "counters stay"

"""What an image costs as sets grow, on this machine: each stage's own command on images made on the fly.

    python -m benchmarks.scale --images 10000,100000,1000000 --json scale.json

The images have 32 pixels, the teacher and the student are tiny and the whole job takes one view and one epoch, so that
raydistill and Ray are measured and not the networks. Prints, for each size and stage, seconds and bytes an image, the
driver's and the largest worker's memory, and what training reads. `--json` writes, for the largest size: `cost_ratio`
(of seconds an image in the worst stage, against the smallest size), `driver_mb` (above that of a job of a hundred
images), `read_share` (bytes that all train workers read, in sets), and `forecast_error` where there are three sizes or
more: the share by which the job's seconds differ from `a + b * images`, as the sizes before it forecast. With `--nodes
1,2,4,8` the smallest size runs once more on as many Ray nodes of one CPU, all on this machine: that shows the cost of
scheduling, not a speed. An hour for a million images on 2 cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import timm
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

SIDE, CLASSES, ROWS_OF_GROUP, WORKERS = 32, 10, 500, 2
STAGES = ("prepare", "adapt", "teach", "distill", "evaluate")
REPORT_SECONDS = 1  # of Ray's counters
IDLE = 100  # images of the job that shows what a command takes by itself
MB = 1e6


def write_images(path: Path, count: int) -> None:
    """A parquet of distinct PNGs: noise, which no file makes smaller, about a colour that tells the class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 128, (CLASSES, 1, 1, 3), np.uint8)
    with pq.ParquetWriter(path, pa.schema([("image", pa.binary()), ("label", pa.string())])) as writer:
        for first in range(0, count, ROWS_OF_GROUP):
            numbers, images = np.arange(first, min(first + ROWS_OF_GROUP, count)), []
            pixels = colours[numbers % CLASSES] + rng.integers(0, 128, (len(numbers), SIDE, SIDE, 3), np.uint8)
            for one in pixels:
                Image.fromarray(one).save(sink := io.BytesIO(), "PNG", compress_level=1)
                images.append(sink.getvalue())
            labels = [f"class {n % CLASSES}" for n in numbers]
            writer.write_table(pa.table({"image": images, "label": labels}, schema=writer.schema))


def write_job(folder: Path, images: Path, weights: Path) -> Path:
    job = {
        "workspace": str(folder / "workspace"),
        "images": {"path": str(images), "size": SIDE, "val_share": 0.02, "test_share": 0.02, "num_labelled": 2000},
        "teacher": {"model": "timm:test_resnet", "weights": str(weights), "size": SIDE, "precision": "fp32",
                    "allow_near_chance": True},
        "student": {"model": "timm:test_resnet", "size": SIDE},
        "views": {"per_image": 1},
        "distill": {"epochs": 1, "batch_size": 256, "num_workers": WORKERS, "precision": "fp32"},
        "evaluate": {"time_teacher": False},
        "tracking": {"enabled": False},
    }  # fmt: skip
    (path := folder / "job.yaml").write_text(json.dumps(job))  # JSON is YAML
    return path


@dataclass
class Cost:
    """What one command took. `read`: bytes of shards and soft targets, by our own counters in Ray."""

    seconds: float = 0.0
    driver: float = 0.0
    worker: float = 0.0
    read: float = 0.0


def run(words: list[str]) -> Cost:
    print(" ".join(words), file=sys.stderr, flush=True)
    cost, ended, started = Cost(), threading.Event(), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "raydistill", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def watch() -> None:
        driver = psutil.Process(process.pid)
        while not ended.wait(0.25):
            with contextlib.suppress(psutil.Error):
                cost.driver = max(cost.driver, driver.memory_info().rss)
                for child in driver.children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        name = " ".join(child.cmdline())
                        if name.startswith("ray::"):
                            cost.worker = max(cost.worker, child.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    cost.seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"raydistill {' '.join(words)}: exit {process.returncode}\n{output[-4000:]}")
    return cost


def job_costs(folder: Path, count: int, weights: Path, *more: str) -> dict[str, Cost]:
    folder.mkdir(parents=True, exist_ok=True)
    if not (images := folder / "images.parquet").exists():
        write_images(images, count)
    job = write_job(folder, images, weights)
    costs = {}
    for stage in STAGES:
        if stage != "distill" or more:
            costs[stage] = run([stage, str(job), *more])
            continue
        with ray_nodes(1) as address:  # one that outlives the command, for its counters
            costs[stage] = run([stage, str(job), f"cluster.address={address}"])
            costs[stage].read = counted_bytes(address)
    return costs


def counted_bytes(address: str) -> float:
    """What the processes of this cluster have read of shards and soft targets, when it counts no more."""
    import ray

    with ray.init(address, log_to_driver=False):
        port = ray.nodes()[0]["MetricsExportPort"]
    before, found = -1.0, 0.0
    while found != before or not found:
        time.sleep(5 * REPORT_SECONDS)
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [line for line in lines if re.match(r'ray_raydistill_bytes_read\w*\{.*stage="(prepare|teach)"', line)]
        before, found = found, sum(float(line.rpartition(" ")[2]) for line in wanted)
    return found


def set_bytes(folder: Path) -> int:
    """Of all train shards and their soft targets."""
    return sum(f.stat().st_size for kind in ("prepare", "teach") for f in folder.glob(f"workspace/{kind}-*/train-*"))


@contextlib.contextmanager
def ray_nodes(count: int) -> Iterator[str]:
    """The address of a cluster of nodes of one CPU each, but for two on the first."""
    from ray.cluster_utils import Cluster

    settings = {"metrics_report_interval_ms": 1000 * REPORT_SECONDS}
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": settings}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(count - 1):
            cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()


def forecast(sizes: list[int], seconds: list[float]) -> float:
    """Seconds at the last size, from a line through all sizes before it, each counted relative to its seconds."""
    slope, start = np.polyfit(sizes[:-1], seconds[:-1], 1, w=1 / np.array(seconds[:-1]))
    return float(start + slope * sizes[-1])


def measure(root: Path, sizes: list[int], nodes: list[int]) -> dict[str, Any]:
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), weights := root / "teacher.safetensors")
    idle = job_costs(root / "idle", IDLE, weights, "images.num_labelled=null")
    console, costs, reads = Console(), dict[int, dict[str, Cost]](), dict[int, float]()
    table = Table("images", "stage", "seconds", "ms an image", "driver MB", "worker MB")
    for count in sizes:
        costs[count] = job_costs(folder := root / str(count), count, weights)
        reads[count] = costs[count]["distill"].read / set_bytes(folder)
        for stage, cost in costs[count].items():
            above = (cost.driver - idle[stage].driver) / MB
            table.add_row(f"{count:,}", stage, f"{cost.seconds:.1f}", f"{1000 * cost.seconds / count:.3f}",
                          f"{above:+.0f}", f"{cost.worker / MB:.0f}")  # fmt: skip
    console.print(table)
    last, first = costs[sizes[-1]], costs[sizes[0]]
    found: dict[str, Any] = {
        "cost_ratio": max((last[s].seconds / sizes[-1]) / (first[s].seconds / sizes[0]) for s in STAGES),
        "driver_mb": max(last[s].driver - idle[s].driver for s in STAGES) / MB,
        "read_share": reads[sizes[-1]],
    }
    if len(sizes) > 2:
        totals = [sum(cost.seconds for cost in costs[count].values()) for count in sizes]
        found["forecast_error"] = abs(forecast(sizes, totals) / totals[-1] - 1)
        # The same without what a command takes by itself, which is most of the smallest job.
        found["marginal_ratio"] = {
            stage: round(
                _slope(sizes[-2:], [costs[n][stage].seconds for n in sizes[-2:]])
                / _slope(sizes[:2], [costs[n][stage].seconds for n in sizes[:2]]), 2,
            ) for stage in STAGES
        }  # fmt: skip
    for count in nodes:
        with ray_nodes(count) as address:
            spread = job_costs(root / f"{count} nodes", sizes[0], weights, f"cluster.address={address}")
        found.setdefault("seconds_on_nodes", {})[count] = {s: round(cost.seconds, 1) for s, cost in spread.items()}
    console.print_json(json.dumps(found))
    return found


def _slope(sizes: list[int], seconds: list[float]) -> float:
    return (seconds[1] - seconds[0]) / (sizes[1] - sizes[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: sorted(int(part) for part in text.split(","))  # noqa: E731
    parser.add_argument("--images", type=numbers, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--nodes", type=numbers, default=[])
    parser.add_argument("--folder", help="keep the files here")
    parser.add_argument("--json")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        root = Path(given.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(parents=True, exist_ok=True)
        found = measure(root, given.images, given.nodes)
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Images a second of the stage `generate` over those of a bare diffusers loop, on this machine, in one run.

    python benchmarks/generate.py --json generate.json

Prints a table and, with --json, writes `generate_ratio`: against as many plain loops as the stage has actors, each with
one thread and one image at a time, which is how `generate` works on CPUs so that nothing but the request decides an
image. `generate_batched_ratio` tells what that costs: against one loop with all threads and batches of
`generate.batch_size`. The network has random weights; about 3 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from rich.console import Console
from rich.table import Table

from raydistill.cluster.plan import local_plan
from raydistill.cluster.session import ray_cluster
from raydistill.config import load_config
from raydistill.run import run_stages
from raydistill.runtime.progress import Progress

STDOUT = 1  # its file descriptor
THREADS = len(os.sched_getaffinity(0))
STEPS, BATCH, SECONDS = 10, 8, 20.0
CLASSES = ("blue", "green", "red")
BARE = """
import sys, time, torch
from diffusers import DDIMPipeline
folder, threads, batch, steps, seconds = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5])
torch.set_num_threads(threads)
pipeline = DDIMPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
unet, scheduler = pipeline.unet, pipeline.scheduler
started = count = 0
with torch.inference_mode():
    while not started or time.perf_counter() - started < seconds:
        scheduler.set_timesteps(steps)
        x = torch.randn(batch, 3, 32, 32)
        labels = torch.zeros(batch, dtype=torch.long)
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample
        if started:
            count += batch
        started = started or time.perf_counter()  # the first batch warms up
print(count / (time.perf_counter() - started))
"""


def save_pipeline(folder: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32, block_out_channels=(64, 128), layers_per_block=2, num_class_embeds=3,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)
    (folder / "classes.json").write_text(json.dumps({"classes": CLASSES, "null": None}))


def save_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for k in range(6):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / name / f"{k}.png")


def bare(folder: Path, processes: int, threads: int, batch: int) -> float:
    """Images a second of so many plain loops at once."""
    words = [sys.executable, "-c", BARE, str(folder), str(threads), str(batch), str(STEPS), str(SECONDS)]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(float(process.communicate()[0]) for process in running)


def stage(root: Path, pipeline: Path, count: int, actors: int) -> float:
    """Images a second from when every actor may have written its first file to the last."""
    words = [f"images.path={root}/images", "images.size=32", f"workspace={root}/w", "tracking.enabled=false"]
    words += ["teacher=null", "loss={kd_weight: 0, alignment_weight: 0, uniformity_weight: 0}"]
    words += [
        f"generate.pipeline={pipeline}",
        f"generate.steps={STEPS}",
        f"generate.batch_size={BATCH}",
        "generate.dtype=fp32",
    ]
    words += [f"generate.per_class={count}", "generate.filter.duplicate_distance=null"]
    config = load_config(words)
    with ray_cluster(config):
        run_stages(config, Progress(Console(quiet=True)), until="generate")
    files = sorted(p.stat().st_mtime for p in root.glob("w/generated/*/*.parquet"))
    return BATCH * (len(files) - actors) / (files[-1] - files[actors - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", nargs="?", const=STDOUT, metavar="FILE", help="write the figures; without FILE, to stdout"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        save_pipeline(root / "pipeline")
        save_images(root / "images")
        words = [f"images.path={root}/images", f"generate.pipeline={root}/pipeline"]
        actors = local_plan(load_config(words)).generator_actors[1]
        before = bare(root / "pipeline", actors, 1, 1)
        per_class = BATCH * max(actors, round(2 * SECONDS * before / BATCH / len(CLASSES)))
        started = time.perf_counter()
        ours = stage(root, root / "pipeline", per_class, actors)
        whole = time.perf_counter() - started
        after, batched = bare(root / "pipeline", actors, 1, 1), bare(root / "pipeline", 1, THREADS, BATCH)
    ratio = ours / np.mean([before, after])
    table = Table("", "images/s", "ratio", title=f"{actors} actors, {STEPS} steps, torch {torch.__version__}")
    table.add_row("generate", f"{ours:.1f}", "")
    table.add_row(f"bare loop: {actors} processes, 1 thread, 1 image", f"{before:.1f} and {after:.1f}", f"{ratio:.2f}")
    table.add_row(f"bare loop: 1 process, {THREADS} threads, {BATCH} images", f"{batched:.1f}", f"{ours / batched:.2f}")
    Console(stderr=options.json == STDOUT).print(
        table, f"{len(CLASSES) * per_class} images in {whole:.0f} s with Ray's start and the choosing"
    )
    if options.json:
        with open(options.json, "w") as sink:
            json.dump({"generate_ratio": ratio, "generate_batched_ratio": ours / batched}, sink, indent=2)


if __name__ == "__main__":
    main()

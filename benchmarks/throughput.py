"""What raydistill's stages reach of a bare PyTorch loop that does the same work, on this machine, in one run.

    python benchmarks/throughput.py --json throughput.json

Prints a table and, with --json, writes these keys: `teach_ratio`, `distill_memory_ratio`, `distill_stream_ratio`,
`online_ratio`, `seconds_to_first_step`, `seconds_to_first_step_in_process`, `peak_memory_growth`. Every ratio is ours
over the bare loop's, both with the same networks, batch, views and threads; the bare loop runs before and after ours,
since machines drift, and counts with its mean. About 10 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.optim import Optimizer

from raydistill.cluster.session import ray_cluster
from raydistill.config import RunConfig, load_config
from raydistill.data.sample import SampleSet, encode_shard, sample_id, shard_name, working_images
from raydistill.data.targets import read_samples
from raydistill.data.views import render, view_parameters
from raydistill.engine.batches import Batch, DistillJob, read_batches
from raydistill.engine.distillation_model import DistillationModel
from raydistill.engine.workers import Worker
from raydistill.losses.total import distillation_loss
from raydistill.models.teacher import load_teacher
from raydistill.results import Outcome
from raydistill.run import run_stages
from raydistill.runtime.progress import Progress

STDOUT = 1  # its file descriptor
JOB = Path(__file__).parents[1] / "jobs" / "demo.yaml"
THREADS = len(os.sched_getaffinity(0))
SECONDS = 10.0  # of each bare measurement


def job_config(workspace: Path, *more: str) -> RunConfig:
    words = [
        str(JOB),
        f"workspace={workspace}",
        "tracking.enabled=false",
        "views.per_image=4",
        "distill.val_every=1000",
        "teacher.precision=fp32",
        "distill.precision=fp32",
    ]
    return load_config([*words, *more])


def distill_job(config: RunConfig, outcome: Outcome, path: Path) -> DistillJob:
    assert outcome.samples is not None
    assert outcome.adapted is not None
    path.mkdir(parents=True, exist_ok=True)
    return DistillJob(config, outcome.samples, str(path), outcome.adapted.path, outcome.directories.get("teach"))


def bare_teacher(config: RunConfig, samples: SampleSet) -> float:
    """Views a second: render and infer over images that lie decoded in memory."""
    torch.set_num_threads(THREADS)
    backbone = load_teacher(config.teacher)[0].to(memory_format=torch.channels_last)
    table = read_samples(samples, "train", 0)
    ids = table["sample_id"].to_pylist()
    images = torch.from_numpy(working_images(table, samples.size).copy())
    size, count, started = config.teacher.batch_size, 0, 0.0
    for first in itertools.cycle(range(0, len(ids), size)):
        if count == size:  # the first batch warms up
            started = time.perf_counter()
        rows = slice(first, first + size)
        parameters = torch.from_numpy(view_parameters(config.views, 0, ids[rows], [0] * len(ids[rows])))
        backbone(render(images[rows], parameters, backbone.preprocessing)).half()
        count += len(ids[rows])
        if started and time.perf_counter() - started > SECONDS:
            return (count - size) / (time.perf_counter() - started)
    raise AssertionError


def bare_step(
    job: DistillJob, model: DistillationModel, optimizer: Optimizer, batch: Batch, backbone: Any = None
) -> None:
    """With the teacher's features of `backbone`, or those that the batch brings."""
    images, parameters = torch.from_numpy(batch.images_VHHC), torch.from_numpy(batch.parameters_VP)
    if backbone is None:
        features = torch.from_numpy(batch.features_VD).float()
    else:
        features = backbone(render(images, parameters, backbone.preprocessing)).clone()
    views = render(images, parameters, model.student.preprocessing)
    student, teacher = model(views.contiguous(memory_format=torch.channels_last), features)
    loss, _ = distillation_loss(job.config.loss, student, teacher, torch.from_numpy(batch.labels_V))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def bare_student(job: DistillJob, with_teacher: bool) -> float:
    """Images a second of the plainest training loop over batches that lie in memory; `with_teacher` runs the teacher on
    every batch first, in turn, as training without stored soft targets does."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = DistillationModel(job).to(memory_format=torch.channels_last)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), job.config.distill.learning_rate)
    worker = Worker(0, 1, "cpu", THREADS, lambda step: False)
    batches = list(itertools.islice(read_batches(job, 0, worker), 16))
    backbone = load_teacher(job.config.teacher)[0].to(memory_format=torch.channels_last) if with_teacher else None
    started = 0.0
    for step, batch in enumerate(itertools.cycle(batches)):
        if step == 2:  # two steps of warm-up
            started = time.perf_counter()
        bare_step(job, model, optimizer, batch, backbone)
        if started and time.perf_counter() - started > SECONDS:
            return (step - 1) * job.batch_size / (time.perf_counter() - started)
    raise AssertionError


def epochs_rate(directory: str, batch_size: int) -> float:
    """Images a second from the end of the first epoch to the end of the last, val and checkpoints included."""
    files = sorted(Path(directory).glob("epochs/*.json"))
    first, last = files[0], files[-1]
    steps = json.loads(last.read_text())["step"] - json.loads(first.read_text())["step"]
    return steps * batch_size / (last.stat().st_mtime - first.stat().st_mtime)


def first_step_seconds(words: list[str]) -> float:
    """From the command to the first batch of `distill`, the stages before it done."""
    started = time.time()
    command = [sys.executable, "-c", "from raydistill.cli import main; main()", "distill", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    workspace = next(w for w in words if w.startswith("workspace=")).partition("=")[2]
    newest = max(Path(workspace).glob("distill-*/first_batch.json"), key=lambda p: p.stat().st_mtime)
    return float(json.loads(newest.read_text())["time"]) - started


def streaming_peak(root: Path, copies: int) -> int:
    """Peak memory in bytes of a process that streams `copies` x 512 pictures through a whole pass."""
    directory, rng, sizes = root / f"x{copies}", np.random.default_rng(0), []
    directory.mkdir()
    for k in range(2 * copies):
        noise = rng.integers(0, 255, (256, 16, 16, 3), np.uint8)
        images = [Image.fromarray(n).resize((128, 128)).tobytes() for n in noise]
        table = pa.table(
            {
                "sample_id": [sample_id(i) for i in images],
                "image": images,
                "label": pa.array([0] * 256, pa.int32()),
                "source": ["real"] * 256,
                "split": ["train"] * 256,
            }
        )
        (directory / f"{shard_name('train', k)}.parquet").write_bytes(encode_shard(table))
        sizes.append(256)
    splits = f'{{"train": {tuple(sizes)!r}}}, {{"train": {sum(sizes)}}}'
    code = f"""
from raydistill.config import RunConfig
from raydistill.data.sample import SampleSet
from raydistill.engine.workers import Worker
from raydistill.engine.batches import DistillJob, read_batches
samples = SampleSet({str(directory)!r}, ("a", "b"), 128, {splits}, 0, {{}}, "")
config = RunConfig.model_validate({{"images": {{"path": "-"}}, "teacher": None, "distill": {{"cache": "stream"}},
    "loss": {{"kd_weight": 0, "alignment_weight": 0, "uniformity_weight": 0}}}})
job = DistillJob(config, samples, {str(directory)!r}, None, None)
batches = read_batches(job, 0, Worker(0, 1, "cpu", 1, lambda step: False))
for _ in range({sum(sizes)} // 64):
    next(batches)
# Not getrusage, whose peak a process inherits from the one that started it.
print(1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]))
"""
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", nargs="?", const=STDOUT, metavar="FILE", help="write the figures; without FILE, to stdout"
    )
    parser.add_argument("--only", nargs="*", default=["teach", "distill", "online", "start", "memory"])
    return parser.parse_args()


def rates_table(rates: list[tuple[str, str, str, str]]) -> Table:
    title = f"{THREADS} threads, torch {torch.__version__}"
    table = Table("", "raydistill", "bare loop (1x for memory)", "ratio", title=title)
    for row in rates:
        table.add_row(*row)
    return table


def main() -> None:
    options = parse_options()
    # As the command does, for processes that load torch later; the bare loop in here does not read it.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    console, figures, rates = Console(stderr=options.json == STDOUT), {}, []
    quiet = Progress(Console(quiet=True))

    def compare(key: str, ours: float, bare: list[float]) -> None:
        figures[key] = ours / np.mean(bare)
        rates.append((key, f"{ours:,.0f}/s", " and ".join(f"{b:,.0f}/s" for b in bare), f"{figures[key]:.2f}"))
        console.print(f"{key}: {figures[key]:.2f}")

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        config = job_config(root / "w")
        prepared = run_stages(config, quiet, until="prepare")
        assert prepared.samples is not None
        bare = [bare_teacher(config, prepared.samples)] if "teach" in options.only else []
        with ray_cluster(config):
            outcome = run_stages(config, quiet, until="teach")
        if bare:
            bare.append(bare_teacher(config, prepared.samples))
            shards = sorted(Path(outcome.directories["teach"]).glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
            rows = [prepared.samples.shards["train"][int(p.stem.partition("-")[2])] for p in shards]
            elapsed = shards[-1].stat().st_mtime - shards[0].stat().st_mtime
            compare("teach_ratio", sum(rows[1:]) * config.views.per_image / elapsed, bare)
        if "distill" in options.only:
            for cache in ("memory", "stream"):  # the same student, so each trains where the other has not been
                config = job_config(root / "w", f"distill.cache={cache}", "distill.epochs=14", "distill.num_workers=1")
                job = distill_job(config, outcome, root / f"bare-{cache}")
                before = bare_student(job, with_teacher=False)
                for old in (root / "w").glob("distill-*"):
                    old.rename(root / f"{cache}-{old.name}")
                student = run_stages(config, quiet, until="distill").student
                assert student is not None
                ours = epochs_rate(student.path, student.batch_size)
                compare(f"distill_{cache}_ratio", ours, [before, bare_student(job, with_teacher=False)])
        if "online" in options.only:
            config = job_config(root / "w", "views.per_image=fresh", "distill.epochs=8", "distill.num_workers=1")
            job = distill_job(job_config(root / "w"), outcome, root / "bare-online")
            before = bare_student(job, with_teacher=True)
            student = run_stages(config, quiet, until="distill").student
            assert student is not None
            ours = epochs_rate(student.path, student.batch_size)
            compare("online_ratio", ours, [before, bare_student(job, with_teacher=True)])
        if "start" in options.only:
            words = [str(JOB), f"workspace={root}/w", "views.per_image=4", "distill.epochs=1", "distill.val_every=1000"]
            for key, workers in (("seconds_to_first_step", 1), ("seconds_to_first_step_in_process", 0)):
                figures[key] = first_step_seconds([*words, f"distill.num_workers={workers}"])
                rates.append((key, f"{figures[key]:.1f} s", "", ""))
        if "memory" in options.only:
            one, ten = (streaming_peak(root, copies) for copies in (1, 10))
            figures["peak_memory_growth"] = ten / one
            rates.append(("peak_memory_growth", f"{ten / 1e6:,.0f} MB", f"{one / 1e6:,.0f} MB", f"{ten / one:.2f}"))
    console.print(rates_table(rates))
    if options.json:
        with open(options.json, "w") as sink:
            json.dump(figures, sink, indent=2)


if __name__ == "__main__":
    main()

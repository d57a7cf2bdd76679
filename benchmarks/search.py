"""What a trial of `tune` costs beyond the training that it is, on this machine, in one run.

    python -m benchmarks.search --json search.json

Prints and, with --json, writes `trial_overhead_seconds` (the median over trials of the seconds from the end of one
trial to the end of the next, less those of a bare PyTorch loop that does the same work: builds the network, takes as
many steps over batches that lie in memory, measures val and saves; it runs before, between and after the trials, which
come in rounds, and its median counts), `first_trial_seconds` (which starts the process that the trials of a round
share) and `teacher_passes` (files of soft targets that the search wrote). About 8 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import optuna
import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.throughput import THREADS, bare_step, distill_job, job_config
from raydistill.cluster.session import ray_cluster
from raydistill.config import overlay
from raydistill.engine.batches import DistillJob, read_batches
from raydistill.engine.distillation_model import DistillationModel
from raydistill.engine.workers import Worker
from raydistill.models.student import split_logits
from raydistill.run import run_stages
from raydistill.runtime.progress import Progress
from raydistill.search.tune import tune_job

STDOUT = 1  # its file descriptor
ROUNDS, TRIALS = 3, 5  # of a round's trials the first starts a process and does not count
SPACE = Path(__file__).parents[1] / "tune_spaces" / "loss.yaml"


def bare_seconds(job: DistillJob) -> float:
    """Of the plainest training that comes to a val accuracy and a file of weights."""
    torch.set_num_threads(THREADS)
    batches = list(islice(read_batches(job, 0, Worker(0, 1, "cpu", THREADS, lambda step: False)), job.total_steps))
    started = time.perf_counter()
    torch.manual_seed(0)
    model = DistillationModel(job).to(memory_format=torch.channels_last)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), job.config.distill.learning_rate)
    for batch in batches:
        bare_step(job, model, optimizer, batch)
    split_logits(model.student, job.samples, "val", torch.device("cpu"), job.config.evaluate.batch_size)
    weights = {name: value.contiguous() for name, value in model.student.network.state_dict().items()}
    save_file(weights, f"{job.path}/student.safetensors")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", nargs="?", const=STDOUT, metavar="FILE", help="write the figures; without FILE, to stdout"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command line does
    console = Console(highlight=False, stderr=arguments.json == STDOUT)
    with tempfile.TemporaryDirectory() as folder:
        more = ["distill.epochs=4", f"tune.space={SPACE}", "tune.sampler=random", "tune.pruner=none"]
        config = job_config(Path(folder), *more, "tune.confirm_seeds=0")
        with ray_cluster(config):
            outcome = run_stages(config, Progress(console), "teach")
        job = distill_job(config, outcome, Path(folder) / "bare")
        taught = {p: p.stat().st_mtime_ns for p in Path(folder).glob("teach-*/*")}
        bare = [bare_seconds(job)]
        for number in range(1, ROUNDS + 1):
            search = tune_job(overlay(config, {"tune": {"trials": number * TRIALS}}), Progress(console))
            bare.append(bare_seconds(job))
        passes = sum(taught.get(p) != p.stat().st_mtime_ns for p in Path(folder).glob("teach-*/*"))
        study = optuna.load_study(study_name=Path(search.path).name, storage=f"sqlite:///{search.path}/study.db")
    starts = [trial.datetime_start.timestamp() for trial in study.trials]
    ends = [trial.datetime_complete.timestamp() for trial in study.trials]
    first = [ends[k] - starts[k] for k in range(0, len(ends), TRIALS)]
    seconds = [ends[k] - ends[k - 1] for k in range(1, len(ends)) if k % TRIALS]
    figures = {
        "trial_overhead_seconds": float(np.median(seconds) - np.median(bare)),
        "trial_seconds": float(np.median(seconds)),
        "bare_seconds": float(np.median(bare)),
        "first_trial_seconds": float(np.median(first)),
        "teacher_passes": passes,
    }
    console.print(f"bare, by turns with {ROUNDS} rounds of trials: {', '.join(f'{b:.1f} s' for b in bare)}")
    for name, value in figures.items():
        console.print(f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}")
    if arguments.json:
        with open(arguments.json, "w") as sink:
            json.dump(figures, sink, indent=2)


if __name__ == "__main__":
    main()

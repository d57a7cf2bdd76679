"""What a trial of `tune` costs beyond the training that it is, on this machine, in one run.

    python -m benchmarks.search --json search.json

Prints and, with --json, writes `trial_overhead_seconds` (the median over trials of the seconds from the end of one
trial to the end of the next, less those of a bare PyTorch loop for as many steps; the bare loop runs before and after
and counts with its mean), `first_trial_seconds` (which starts the process that all trials share) and `teacher_passes`
(files of soft targets that the search wrote). About 5 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import optuna
from rich.console import Console

from benchmarks.throughput import bare_student, distill_job, job_config
from raydistill.infra.cluster import ray_cluster
from raydistill.infra.progress import Progress
from raydistill.search.tune import tune_job
from raydistill.stages.run import run_stages

TRIALS = 10
SPACE = Path(__file__).parents[1] / "tune_spaces" / "loss.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command line does
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        more = ["distill.epochs=4", f"tune.space={SPACE}", f"tune.trials={TRIALS}", "tune.sampler=random"]
        config = job_config(Path(folder), *more, "tune.pruner=none", "tune.confirm_seeds=0")
        with ray_cluster(config):
            outcome = run_stages(config, Progress(console), "teach")
        job = distill_job(config, outcome, Path(folder) / "bare")
        before = bare_student(job, with_teacher=False)
        taught = {p: p.stat().st_mtime_ns for p in Path(folder).glob("teach-*/*")}
        search = tune_job(config, Progress(console))
        passes = sum(taught.get(p) != p.stat().st_mtime_ns for p in Path(folder).glob("teach-*/*"))
        after = bare_student(job, with_teacher=False)
        study = optuna.load_study(study_name=Path(search.path).name, storage=f"sqlite:///{search.path}/study.db")
        ends = [trial.datetime_complete.timestamp() for trial in study.trials]
        first = ends[0] - study.trials[0].datetime_start.timestamp()
    bare = job.total_steps * job.batch_size / np.mean([before, after])
    figures = {
        "trial_overhead_seconds": float(np.median(np.diff(ends)) - bare),
        "trial_seconds": float(np.median(np.diff(ends))),
        "bare_seconds": float(bare),
        "first_trial_seconds": first,
        "teacher_passes": passes,
    }
    for name, value in figures.items():
        console.print(f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

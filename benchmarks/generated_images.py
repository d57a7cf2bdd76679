"""What generated images are worth beside as many real unlabelled ones, where labels are few and there is no pool.

    python benchmarks/train_generator.py --out ./fashion-generator
    python -m benchmarks.generated_images --pipeline ./fashion-generator --workspace ./generated-images

Every arm is an ordinary run of jobs/generated_fashion_mnist.yaml, each with as many steps of as many images, so that
what is done is skipped, and an interrupted run goes on. Two processes with different `--labels` or `--seeds` may run
at once; the same command over all of them then writes the tables. About 70 minutes on 2 cores, most of it training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from raydistill.cluster.session import ray_cluster
from raydistill.config import RunConfig, load_config
from raydistill.pages.summary import recall_deltas
from raydistill.results import Report
from raydistill.run import run_stages
from raydistill.runtime.progress import Progress
from raydistill.search.significance import accuracy_interval, align, difference, read_answers

JOBS = Path(__file__).parents[1] / "jobs"
STEPS, RATIOS = 300, (1, 2, 4)
JUDGED = {
    "4x generated, soft targets alone": ["generate.task_weight=0"],
    "4x generated, only where the teacher agrees": ["generate.filter.agreement=true"],
    "4x generated, half of each batch": ["generate.share=0.5"],
}
BASE = "nothing"


def arms(labels: int) -> dict[str, list[str]]:
    """What each arm says beside the job, by its name. Where labels are fewest, more is asked."""
    found = {
        "no teacher": [str(JOBS / "overlays" / "scratch.yaml"), "generate=null"],
        BASE: ["generate=null"],
        **{f"{r}x generated": [f"generate.ratio={r}"] for r in RATIOS},
        **{f"{r}x real, unlabelled": ["generate=null", f"images.num_unlabelled={r * labels}"] for r in RATIOS},
    }
    if labels == 100:
        found |= {name: ["generate.ratio=4", *words] for name, words in JUDGED.items()}
        found["no teacher, 4x generated"] = [str(JOBS / "overlays" / "scratch.yaml"), "generate.ratio=4"]
    return found


def arm_config(options: argparse.Namespace, labels: int, seed: int, words: list[str]) -> RunConfig:
    """As many steps for all: an epoch is as long as there are real images."""
    job = [str(JOBS / "generated_fashion_mnist.yaml"), f"workspace={options.workspace}", "tracking.enabled=false"]
    first = [f"images.num_labelled={labels}", f"seed={seed}", f"generate.pipeline={options.pipeline}"]
    config = load_config([*job, *first, *words])
    images = labels + (config.images.num_unlabelled or 0)
    epochs = round(STEPS / max(images // config.distill.batch_size, 1))
    distill = config.distill.model_copy(update={"epochs": epochs, "val_every": epochs})
    return config.model_copy(update={"distill": distill})


def run_arms(options: argparse.Namespace, labels: int, progress: Progress) -> dict[str, list[Report]]:
    """The reports of each arm by seed. Images are made once, for the arm that wants most."""
    found: dict[str, list[Report]] = {name: [] for name in arms(labels)}
    for seed in options.seeds:
        for name, words in sorted(arms(labels).items(), key=lambda arm: "4x" not in arm[0]):
            progress.line(f"{labels} labels, seed {seed}: {name}")
            report = run_stages(arm_config(options, labels, seed, words), progress).report
            assert report is not None
            found[name].append(report)
    return {name: found[name] for name in arms(labels)}


def table(reports: dict[str, list[Report]]) -> Iterator[str]:
    """Lines of Markdown: test accuracy of each arm and its gain over labelled images alone, paired by seed and image;
    images and seeds count in what is uncertain. The p-values are of one arm each, not corrected for their number."""
    yield "| beside the labelled images | test | 95% interval | gain in points | p |"
    yield "|---|---|---|---|---|"
    answers = [[read_answers(report.path, "test") for report in of_arm] for of_arm in reports.values()]
    right = dict(zip(reports, align(answers), strict=True))
    for name, of_arm in reports.items():
        test = np.mean([report.student["test"]["accuracy"] for report in of_arm])
        low, high = accuracy_interval(right[name])
        cells = ["", ""]
        if name != BASE:
            gain = difference(right[name], right[BASE])
            bounds, p = gain.interval(), gain.p_value()
            cells = [
                f"{100 * gain.mean:+.1f} ({100 * bounds[0]:+.1f} to {100 * bounds[1]:+.1f})",
                "" if p is None else f"{p:.3f}",
            ]
        yield f"| {name} | {test:.3f} | ({low:.3f} to {high:.3f}) | {cells[0]} | {cells[1]} |"


def deltas(reports: dict[str, list[Report]], name: str) -> str:
    """Mean change of each class's recall by what an arm adds, in points."""
    changes: dict[str, list[float]] = {}
    for one, other in zip(reports[name], reports[BASE], strict=True):
        for label, of_class in recall_deltas(one.student["test"], other.student["test"]).items():
            changes.setdefault(label, []).append(of_class["points"])
    return ", ".join(f"{label} {np.mean(points):+.0f}" for label, points in changes.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="what benchmarks/train_generator.py saved")
    parser.add_argument("--workspace", type=Path, default=Path("generated-images"))
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 200, 500])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    console = Console(highlight=False)
    lines: list[str] = []
    with ray_cluster(arm_config(options, options.labels[0], options.seeds[0], [])):
        for labels in options.labels:
            reports = run_arms(options, labels, Progress(console))
            teacher = [report.teacher["test"]["accuracy"] for report in reports[BASE] if report.teacher]
            lines += [f"{labels} labels, {len(options.seeds)} seed(s), teacher {np.mean(teacher):.3f}:", ""]
            lines += [*table(reports), "", f"4x generated, by class: {deltas(reports, '4x generated')}.", ""]
    (options.workspace / "generated_images.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

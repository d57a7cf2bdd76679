"""One run of a comparison: its answers on the test split, and the seconds of each stage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raydistill.engine.records import read_epochs
from raydistill.results import Outcome
from raydistill.search.significance import Answers, read_answers
from raydistill.storage.directory import read_seconds

BASELINES = ("scratch", "linear_probe", "fine_tune")


@dataclass(frozen=True)
class Arm:
    """One run: its answers, and the seconds of each stage, shared or not."""

    arm: str
    seed: int
    label_share: float
    num_labelled: int
    val_accuracy: float
    test: Answers
    adapt_seconds: float
    generate_seconds: float
    teach_seconds: float
    train_seconds: float
    steps: int
    epochs: list[dict[str, float]]
    seconds_by_epoch: list[float]  # of training, up to the end of each epoch

    @property
    def test_accuracy(self) -> float:
        return float(self.test.right.mean())

    @property
    def seconds(self) -> float:
        return self.seconds_before + self.train_seconds

    @property
    def seconds_before(self) -> float:
        return self.adapt_seconds + self.generate_seconds + self.teach_seconds


def arm_of(name: str, seed: int, label_share: float, outcome: Outcome) -> Arm:
    """Read the results of a finished run from its stage directories."""
    report, samples, student = outcome.report, outcome.samples, outcome.student
    assert report is not None
    assert samples is not None
    assert student is not None
    epochs = read_epochs(student.path)
    spent = training_seconds(epochs, student.batch_size)
    seconds = {stage: read_seconds(path) for stage, path in outcome.directories.items()}
    return Arm(
        arm=name,
        seed=seed,
        label_share=label_share,
        num_labelled=samples.num_labelled["train"],
        val_accuracy=report.student["val"]["accuracy"],
        test=read_answers(report.path, "test"),
        adapt_seconds=sum(seconds.get(stage, 0.0) for stage in ("fine_tune", "features", "adapt")),
        generate_seconds=0.0 if outcome.generated is None else outcome.generated.actor_seconds,
        teach_seconds=seconds.get("teach", 0.0) + seconds.get("teach_generated", 0.0),
        train_seconds=spent[-1],
        steps=student.steps,
        epochs=epochs,
        seconds_by_epoch=spent,
    )


def training_seconds(epochs: list[dict[str, float]], batch_size: int) -> list[float]:
    """Seconds of training up to the end of each epoch, from the rates: without measuring val, and a resumed epoch
    counts once."""
    steps = np.diff([0.0, *(epoch["step"] for epoch in epochs)])
    return list(
        np.cumsum([batch_size * n / epoch["images_per_second"] for n, epoch in zip(steps, epochs, strict=True)])
    )


def is_baseline(arm: str) -> bool:
    """Whether the arm has no teacher, with or without generated images."""
    return arm.removesuffix("+generated") in BASELINES

"""compare, tune: the ways to train that are compared, and how settings are searched."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raydistill.config.section import Count, Section

Arm = Literal[
    "scratch", "linear_probe", "fine_tune", "kd", "align_uniform", "crd", "distill_pretrained", "job"
]  # fmt: skip


class Compare(Section):
    """What `compare` trains. The other stages do not read it."""

    arms: Annotated[tuple[Arm, ...], Field(min_length=1)] = (
        "scratch", "linear_probe", "fine_tune", "kd", "align_uniform", "crd", "distill_pretrained",
    )  # fmt: skip
    """Ways to train the student. `linear_probe`, `fine_tune` and `distill_pretrained` start from a pre-trained one."""
    seeds: Count = 3
    """Runs of each arm. Their seeds follow the job's."""
    student_weights: str | None = None
    """Pre-trained weights of the student, for the arms that need them: a state dict or `example:NAME`; null: the
    hub's."""
    label_shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.125, 0.25, 0.5, 1.0)
    """Shares of the labels at which `--learning-curve` trains."""


Objective = Literal[
    "val_accuracy", "val_balanced_accuracy", "val_top5", "val_ece", "loss", "parameters", "milliseconds_per_image"
]  # fmt: skip


class Tune(Section):
    """How `tune` searches. The other stages do not read it."""

    space: str | None = None
    """A YAML file of distributions by config key, or the name of one that comes with raydistill, as `loss`."""
    trials: Count = 30
    """Trials in all. The first has the job's own values. A higher number continues the search."""
    sampler: Literal["tpe", "gp", "cmaes", "qmc", "random", "grid"] = "tpe"
    """Optuna's sampler, seeded by the job's seed."""
    pruner: Literal["asha", "median", "none"] = "asha"
    """Ends trials that fall behind: by asynchronous successive halving, or below the median of earlier trials."""
    grace_epochs: Count | None = None
    """Epochs that every trial gets; null: a fifth of distill.epochs."""
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = ("val_accuracy",)
    """What is optimised. Several give a Pareto front, and `best` is its best trial by the first objective."""
    concurrent: Count | None = None
    """Trials at once; null: one on each GPU or, without any, one on every 4 CPUs."""
    confirm_seeds: Annotated[int, Field(ge=0)] = 3
    """New seeds with which the best and the job's own values are trained again and measured on test; 0: none."""
    storage: str | None = None
    """URL of a database for Optuna's study; null: SQLite in the stage directory."""

    @model_validator(mode="after")
    def _prunable(self) -> Tune:
        if self.pruner != "none" and self.objectives not in (("val_accuracy",), ("loss",)):
            raise ValueError(
                f"tune.pruner={self.pruner} compares what is measured during training, and tune.objectives="
                f"{list(self.objectives)} is known at the end; set tune.pruner=none"
            )
        return self

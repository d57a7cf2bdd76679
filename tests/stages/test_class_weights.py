"""The weights of the classes that `distill` gives to training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from raydistill.config import overlay
from raydistill.data.sample import SampleSet
from raydistill.engine.batches import DistillJob
from raydistill.engine.records import read_epochs
from raydistill.errors import ConfigError
from raydistill.models.student import read_student, split_logits
from raydistill.stages import distill
from tests.small_run import painted, write_shard
from tests.training import distil


def weights_of(monkeypatch: pytest.MonkeyPatch, job: DistillJob, progress) -> tuple[float, ...] | None:
    """Those that training gets."""
    seen = []

    def trained(loop, job, *more):
        seen.append(job.class_weights)
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "run_workers", trained)
    with pytest.raises(KeyboardInterrupt):
        distil(job, progress)
    return seen[0]


def relabel(samples: SampleSet, labels: list[int]) -> list[str]:
    """Other images of these labels in the only train shard, and their ids."""
    images = [painted(label, np.random.default_rng(k)).tobytes() for k, label in enumerate(labels)]
    return write_shard(Path(samples.path), "train-00000", images, labels)


ONE_OF_RED = [0, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("labels", [ONE_OF_RED, [1, 1, 2], [0, 1, 2], [2]])
def test_balanced_weights_count_the_labelled_train_images(make_set, progress, monkeypatch, labels) -> None:
    """Also with one image of a class; a class with none has weight 1. Unlabelled images are not counted."""
    some = make_set("set", num_train=40, labelled=len(labels))
    relabel(some.samples, labels)
    job = some.job("job", teacher=False, loss={"class_weights": "balanced"})
    present = np.unique(labels)
    by_sklearn = compute_class_weight("balanced", classes=present, y=np.array(labels))
    expected = dict(zip(present.tolist(), by_sklearn.tolist(), strict=True))
    assert weights_of(monkeypatch, job, progress) == pytest.approx([expected.get(c, 1.0) for c in range(3)])


def test_weights_by_name_and_what_has_none(tiny_set, progress, monkeypatch) -> None:
    def found(**loss: object) -> tuple[float, ...] | None:
        return weights_of(monkeypatch, tiny_set.job("job", loss=loss), progress)

    assert found(class_weights={"green": 4}) == (1.0, 4.0, 1.0)
    assert found() is None
    assert found(class_weights="balanced", task_weight=0) is None  # no term reads labels by class


def test_a_class_that_the_data_lacks_is_refused_with_those_near_it(tiny_set, progress) -> None:
    job = tiny_set.job("job", loss={"class_weights": {"gren": 4}})
    with pytest.raises(ConfigError) as refused:
        distil(job, progress)
    said = (
        "loss.class_weights: the data has no class 'gren' (nearest to 'gren': 'green'); it has 'red', 'green', 'blue'"
    )
    assert str(refused.value) == said
    assert not list(Path(job.path).iterdir())


def test_a_heavy_class_is_named_more_often(make_set, progress) -> None:
    """By a student of few epochs that is not sure yet."""
    answers = {}
    for name, classes in (("plain", None), ("heavy", {"blue": 30})):
        some = make_set(name, num_train=40)
        job = some.job("job", teacher=False, loss={"class_weights": classes}, distill={"epochs": 10, "keep": "last"})
        student, _ = read_student(distil(job, progress).path)
        logits, _ = split_logits(student, some.samples, "val", torch.device("cpu"), 5)
        answers[name] = torch.from_numpy(logits).softmax(1)[:, 2].mean().item()
    assert answers["heavy"] > answers["plain"] + 0.1


def test_class_weights_weigh_generated_images_too_and_do_not_count_them(make_set, progress, monkeypatch) -> None:
    """The first loss is log 3 for each image, since the classifier begins near zero. Real images are red or green and
    have weight 1; g of 9 in the batch are generated and blue, of weight 2 by their class and 0.5 by themselves."""
    real, made = make_set("real", num_train=9), make_set("made", num_train=9)
    relabel(real.samples, [0, 1, 0, 1, 0, 1, 0, 1, 1])
    ids = relabel(made.samples, [2] * 9)
    loss = {"class_weights": {"blue": 2}}
    job = real.job("job", False, loss=loss, generate={"pipeline": "a/b"}, distill={"epochs": 1, "batch_size": 9})
    job = replace(job, generated=made.samples, weights=dict.fromkeys(ids, 0.5))
    distil(job, progress)
    [record], first = read_epochs(job.path), next(iter(job.order(0)))
    g = int((first.shard >= 1).sum())
    assert 0 < g < 9
    assert record["task"] == pytest.approx(math.log(3) * (9 - g + g * 2 * 0.5) / (9 - g + g * 2), rel=0.03)
    balanced = replace(job, config=overlay(job.config, {"loss": {"class_weights": None}}), path=f"{job.path}-2")
    balanced = replace(balanced, config=overlay(balanced.config, {"loss": {"class_weights": "balanced"}}))
    assert weights_of(monkeypatch, balanced, progress) == pytest.approx((9 / (2 * 4), 9 / (2 * 5), 1.0))

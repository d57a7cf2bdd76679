"""What a worker is given: its share of each global batch, with labelled and unlabelled images in their proportion."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from raydistill.data.targets import UNLABELLED
from raydistill.engine import batches
from raydistill.engine.batches import read_batches
from raydistill.engine.loop import distill_loop
from raydistill.engine.workers import Worker
from raydistill.errors import ConfigError
from tests.training import here


def test_the_workers_of_a_node_share_its_memory(tiny_set, monkeypatch) -> None:
    """Each would hold the whole split: where one may, two may not."""
    job = tiny_set.job("cached", distill={"cache": "auto"})
    split = sum(tiny_set.samples.shards["train"]) * 3 * tiny_set.samples.size**2
    monkeypatch.setattr(batches, "available_bytes", lambda: 4 * split * 1.9)
    chosen: list[str] = []
    for name in ("InMemory", "Streamed"):
        reader = getattr(batches, name)
        monkeypatch.setattr(batches, name, lambda *given, n=name, r=reader: chosen.append(n) or r(*given))
    job = replace(job, targets=None)
    for beside in (1, 2):
        next(read_batches(job, 0, Worker(0, 1, "cpu", 1, lambda step: False, workers_on_node=beside)))
    assert chosen == ["InMemory", "Streamed"]


def test_a_device_without_room_for_the_split_is_named(tiny_set, monkeypatch) -> None:
    job = tiny_set.job("cached", distill={"cache": "device"})
    monkeypatch.setattr(batches, "available_bytes", lambda: 1e4)
    words = (
        r"^distill\.cache=device: the train split takes [\d,]{6,} bytes, and 10,000 are free on cpu; set distill\.cache"
    )
    with pytest.raises(ConfigError, match=words):
        next(read_batches(job, 0, here()))


def test_workers_together_see_the_global_batch(tiny_set) -> None:
    job = tiny_set.job("batches")

    def first_batches(rank: int, size: int):
        batches = read_batches(job, 0, Worker(rank, size, "cpu", 1, lambda step: False))
        return [next(batches) for _ in range(6)]

    alone, split = first_batches(0, 1), [first_batches(rank, 3) for rank in range(3)]
    for step, whole in enumerate(alone):
        together = np.concatenate([split[rank][step].parameters_VP for rank in range(3)])
        assert sorted(map(tuple, together)) == sorted(map(tuple, whole.parameters_VP))
        assert [len(split[rank][step].labels_V) for rank in range(3)] == [3, 3, 2]


def test_unlabelled_images_take_part_through_soft_targets_alone(make_set) -> None:
    """A third of what is drawn is labelled at least, and with more labels than that, what they are of the split."""
    for name, labelled, expected in (("few", 4, 13), ("many", 30, 30)):
        batches = read_batches(make_set(name, num_train=40, labelled=labelled).job("labels"), 0, here())
        seen = np.concatenate([next(batches).labels_V for _ in range(5)])
        assert (seen != UNLABELLED).sum() == expected
        assert (seen == UNLABELLED).sum() == 40 - expected


def test_labelled_share_is_kept(tiny_set) -> None:
    batches = read_batches(tiny_set.job("share", distill={"labelled_share": 0.5}), 0, here())
    for _ in range(10):
        assert (next(batches).labels_V != UNLABELLED).sum() == 4


def test_without_a_teacher_only_labelled_images_are_drawn_in_as_many_steps(tiny_set) -> None:
    scratch, distilled = tiny_set.job("scratch", teacher=False), tiny_set.job("distilled")
    assert scratch.total_steps == distilled.total_steps
    batch = next(read_batches(scratch, 0, here()))
    assert len(batch.labels_V) == 8
    assert (batch.labels_V != UNLABELLED).all()
    assert batch.features_VD is None
    assert "task" in distill_loop(scratch, here())


def test_few_labels_shrink_no_batch_of_an_arm_without_a_teacher(make_set) -> None:
    """It would take smaller and more steps than the others; with this an image comes twice, as two views."""
    few = make_set("few", num_train=40, labelled=5)
    settings = {"distill": {"epochs": 1, "batch_size": 20}}
    alone = few.job("alone", teacher=False, views={"per_image": "fresh"}, **settings)
    taught = few.job("taught", **settings)
    assert (alone.batch_size, alone.total_steps) == (taught.batch_size, taught.total_steps) == (20, 2)
    batch = next(read_batches(alone, 0, here()))
    assert (batch.labels_V != UNLABELLED).all()
    seen = {(row, *parameters) for row, parameters in zip(batch.rows_V, map(tuple, batch.parameters_VP), strict=True)}
    assert len(seen) == 20


@pytest.mark.parametrize(("num_train", "batch_size", "expected"), [(33, 32, 2), (5, 32, 1), (40, 16, 3), (3, 2, 2)])
def test_every_epoch_shows_every_image_in_full_batches(make_set, num_train, batch_size, expected) -> None:
    job = make_set(f"n{num_train}", num_train=num_train).job("job", distill={"epochs": 2, "batch_size": batch_size})
    assert job.steps_per_epoch == expected
    assert job.batch_size == min(batch_size, num_train)
    record = distill_loop(job, here())
    assert (record["step"], record["images"]) == (2 * expected, expected * job.batch_size)
    epoch = list(itertools.islice(read_batches(job, 0, here()), expected))
    assert set(np.concatenate([batch.rows_V for batch in epoch])) == set(range(num_train))

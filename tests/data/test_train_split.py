"""Batches of the train split: soft targets belong to their image and their view (case C07), whatever reads them."""

import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydistill.config import Views
from raydistill.data.sample import (
    SCHEMA,
    WINDOW_SHARDS,
    Pools,
    SampleSet,
    Visits,
    batch_order,
    encode_shard,
    sample_id,
    shard_name,
)
from raydistill.data.targets import UNLABELLED, encode_targets, labels_of, read_samples, read_targets
from raydistill.data.train_split import InMemory, OnDevice, Part, Shard, Streamed, TrainSplit
from raydistill.data.views import view_parameters
from raydistill.errors import CheckpointError

VIEWS, FEATURES, SIZE = 3, 5, 8
ROWS = (4, 0, 3, 6, 1)  # of each shard
SEED = 11


def ids(count: int) -> list[str]:
    return [sample_id(bytes([n])) for n in range(count)]


def features_of(identity: str, view: int) -> np.ndarray:
    """What a stub teacher says: different for every image and view, exact in float16."""
    digest = hashlib.sha256(f"{identity}/{view}".encode()).digest()
    return np.frombuffer(digest[:FEATURES], np.uint8).astype(np.float16)


def picture_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def label_of(number: int) -> int | None:
    return None if number % 3 == 0 else number % 4


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> TrainSplit:
    """A train split on disk with the targets of a stub teacher; image n is the n-th row over all shards."""
    tmp_path = tmp_path_factory.mktemp("split")
    number = 0
    for shard, count in enumerate(ROWS):
        numbers = range(number, number + count)
        images = [picture_of(n).tobytes() for n in numbers]
        columns = [
            ids(99)[number : number + count],
            images,
            map(label_of, numbers),
            ["real"] * count,
            ["train"] * count,
        ]
        rows = pa.table(dict(zip(SCHEMA.names, map(list, columns), strict=True)), schema=SCHEMA)
        (tmp_path / f"{shard_name('train', shard)}.parquet").write_bytes(encode_shard(rows))
        names = rows["sample_id"].to_pylist()
        features = np.array([[features_of(name, view) for name in names] for view in range(VIEWS)], np.float16)
        stored = encode_targets(names, features.reshape(VIEWS, count, FEATURES))
        (tmp_path / f"{shard_name('train', shard)}.safetensors").write_bytes(stored)
        number += count
    samples = SampleSet(str(tmp_path), ("a", "b", "c", "d"), SIZE, {"train": ROWS}, {"train": 0}, 0, {"train": ""}, "")
    return TrainSplit((Part(samples, str(tmp_path)),), Views(per_image=VIEWS, brightness=0.3), SEED)


def with_targets(split: TrainSplit, targets: str | None) -> TrainSplit:
    return replace(split, parts=(replace(split.parts[0], targets=targets),))


def image_number(shard: int, row: int) -> int:
    return sum(ROWS[:shard]) + row


def some_visits(
    split: TrainSplit, batches: int = 6, batch_size: int = 7, share: float = 0.6, seed: int = SEED
) -> list[Visits]:
    labels = split.labels()
    labelled = [np.flatnonzero(shard != UNLABELLED) for shard in labels]
    others = [np.flatnonzero(shard == UNLABELLED) for shard in labels]
    return list(itertools.islice(batch_order(Pools(labelled, others, share), batch_size, seed), batches))


@pytest.mark.parametrize("reader", [InMemory, Streamed])
def test_every_row_of_a_batch_is_of_one_image_and_one_view(split, reader):
    source = reader(split)
    seen = set()
    for visits in some_visits(split):
        batch = source.gather(visits)
        for k in range(len(visits)):
            number = image_number(int(visits.shard[k]), int(visits.row[k]))
            view = int(visits.visit[k]) % VIEWS
            label = label_of(number)
            np.testing.assert_array_equal(batch.images_VHHC[k], picture_of(number))
            np.testing.assert_array_equal(batch.features_VD[k], features_of(ids(99)[number], view))
            assert batch.labels_V[k] == (UNLABELLED if label is None else label)
            expected = view_parameters(split.views, SEED, [ids(99)[number]], [view])[0]
            np.testing.assert_array_equal(batch.parameters_VP[k], expected)
            seen.add((number, view))
    assert len(seen) > sum(ROWS)  # images came again, under another view


@given(share=st.floats(0.1, 0.9), batch_size=st.integers(1, 9), seed=st.integers(0, 99), fresh=st.booleans())
def test_memory_stream_and_device_give_the_same_batches(split, share, batch_size, seed, fresh):
    if fresh:
        split = replace(with_targets(split, None), views=Views(per_image="fresh"))
    memory, stream, device = InMemory(split), Streamed(split), OnDevice(split, torch.device("cpu"))
    for visits in some_visits(split, 4, batch_size, share, seed):
        numbers = device.gather(visits)
        assert numbers.images_VHHC.nbytes == 0
        given = (batch.arrays() for batch in (memory.gather(visits), stream.gather(visits), device.taken(numbers)))
        for first, *others in zip(*given, strict=True):
            for other in others:
                assert (first is None) == (other is None)
                if first is not None:
                    np.testing.assert_array_equal(first, other := np.asarray(other))
                    assert first.dtype == other.dtype


class CountingSplit(TrainSplit):
    """Real and generated shards of one row's bytes, made as they are read, which is counted."""

    reads = 0

    def shard(self, index: int) -> Shard:
        type(self).reads += 1
        rows = self.shard_rows[index]
        identities = [hashlib.md5(f"{index}/{row}".encode()).hexdigest() for row in range(rows)]
        return Shard(identities, np.zeros((rows, 6, 6, 3), np.uint8), np.zeros(rows, int), None, None, None)


ROWS_OF_SHARD, SHARDS = 64, 30


@pytest.mark.parametrize(
    ("pools", "share", "generated_share"), [(1, 1.0, 0.0), (2, 0.4, 0.0), (3, 0.33, 0.3), (3, 0.1, 0.03)]
)
def test_a_streamed_shard_is_read_once_in_each_pass_of_a_pool(pools, share, generated_share):
    """However many pools are visited in windows of their own, and however seldom one of them is."""
    samples = SampleSet("", ("a",), SIZE, {"train": (ROWS_OF_SHARD,) * SHARDS}, {"train": 0}, 0, {}, {})
    parts = (Part(samples, None),) * (2 if pools == 3 else 1)
    CountingSplit.reads = 0
    source = Streamed(CountingSplit(parts, Views(per_image="fresh"), SEED))
    first = ROWS_OF_SHARD if pools == 1 else ROWS_OF_SHARD // 2  # of each real shard so many rows are labelled
    none, rows, visited = [np.arange(0)] * SHARDS, np.arange(ROWS_OF_SHARD), np.zeros(3)
    labelled, others = [rows[:first]] * SHARDS, [rows[first:]] * SHARDS
    generated = [*none, *[rows] * SHARDS] if pools == 3 else ()
    order = batch_order(Pools(labelled, others, share, generated, generated_share), 64, SEED)
    for visits in itertools.islice(order, 150):
        source.ids(visits)
        real = visits.shard < SHARDS
        visited += [(real & (visits.row < first)).sum(), (real & (visits.row >= first)).sum(), (~real).sum()]
    rows_of_pool = [first, ROWS_OF_SHARD - first, ROWS_OF_SHARD]
    ideal = sum(n / rows for n, rows in zip(visited, rows_of_pool, strict=True) if rows)
    # A window that has begun has been read in full.
    assert CountingSplit.reads <= ideal + pools * WINDOW_SHARDS
    assert len(source._held) <= 4 * len(parts) * WINDOW_SHARDS


def test_streamed_shards_stay_within_the_bytes_there_are_and_too_few_are_said_once(caplog):
    samples = SampleSet("", ("a",), SIZE, {"train": (ROWS_OF_SHARD,) * SHARDS}, {"train": 0}, 0, {}, {})
    split = CountingSplit((Part(samples, None),), Views(per_image="fresh"), SEED)
    most = 5 * split.shard(0).num_bytes
    source = Streamed(split, most)
    order = batch_order(Pools([np.arange(ROWS_OF_SHARD)] * SHARDS, [np.arange(0)] * SHARDS, 1.0), 16, SEED)
    for visits in itertools.islice(order, 60):
        source.ids(visits)
        assert sum(shard.num_bytes for shard in source._held.values()) <= most
    (said,) = caplog.messages
    assert "images.shard_size" in said


@pytest.mark.parametrize("reader", [InMemory, Streamed])
def test_fresh_views_never_come_again(split, reader):
    source = reader(replace(with_targets(split, None), views=Views(per_image="fresh")))
    visits = Visits(np.zeros(50, int), np.ones(50, int), np.arange(50))
    batch = source.gather(visits)
    assert batch.features_VD is None
    assert len(np.unique(batch.parameters_VP, axis=0)) == 50


@pytest.mark.parametrize("reader", [InMemory, Streamed])
def test_targets_of_other_images_are_refused(split, reader, tmp_path):
    """The targets of an earlier set, one of whose images has gone since."""
    for shard, count in enumerate(ROWS):
        names = read_samples(split.parts[0].samples, "train", shard)["sample_id"].to_pylist()
        if shard == 3:
            names = [*names[1:], names[0]]
        stored = encode_targets(names, np.zeros((VIEWS, count, FEATURES), np.float16))
        (tmp_path / f"{shard_name('train', shard)}.safetensors").write_bytes(stored)
    with pytest.raises(CheckpointError, match="train-00003"):
        reader(with_targets(split, str(tmp_path))).gather(Visits(*np.array([[3], [0], [0]])))


@pytest.mark.parametrize("hard_labels", [True, False])
def test_generated_images_follow_the_real_ones_with_their_own_weights(split, hard_labels):
    """The same shards stand for both, so that what the second part gives is known from the first."""
    real = split.parts[0]
    weights = {name: 0.5 + 0.01 * n for n, name in enumerate(ids(99)[: sum(ROWS)])}
    both = replace(split, parts=(real, replace(real, weights=weights, hard_labels=hard_labels)))
    assert both.shard_rows == [*ROWS, *ROWS]
    visits = some_visits(split)[0]
    moved = replace(visits, shard=visits.shard + len(ROWS))
    alone = InMemory(split).gather(visits)
    assert alone.weights_V is None
    for reader in (InMemory, Streamed):
        first, second = (reader(both).gather(v) for v in (visits, moved))
        np.testing.assert_array_equal(first.labels_V, alone.labels_V)
        np.testing.assert_array_equal(second.labels_V, alone.labels_V if hard_labels else UNLABELLED)
        np.testing.assert_array_equal(second.features_VD, alone.features_VD)
        np.testing.assert_array_equal(second.images_VHHC, alone.images_VHHC)
        np.testing.assert_array_equal(second.rows_V, alone.rows_V + sum(ROWS))
        np.testing.assert_array_equal(first.weights_V, 1)
        expected = [0.5 + 0.01 * image_number(int(k), int(r)) for k, r in zip(visits.shard, visits.row, strict=True)]
        np.testing.assert_allclose(second.weights_V, expected, rtol=1e-6)


def test_labels_are_read_with_and_without_the_images(split):
    for shard, labels in enumerate(split.labels()):
        expected = [label_of(image_number(shard, row)) for row in range(ROWS[shard])]
        assert labels.tolist() == [UNLABELLED if label is None else label for label in expected]
        np.testing.assert_array_equal(labels, labels_of(read_samples(split.parts[0].samples, "train", shard)))


def test_targets_are_read_by_split_and_shard(split):
    names = read_samples(split.parts[0].samples, "train", 2)["sample_id"].to_pylist()
    found = read_targets(split.parts[0].targets, "train", 2, names)
    np.testing.assert_array_equal(found[1, 2], features_of(names[2], 1))

"""Batches of the train split: soft targets belong to their image and their view (case C07), whatever reads them."""

import hashlib
import itertools
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydistill.config import Views
from raydistill.data.order import STREAMS, Pool, Pools, Visits, batch_order
from raydistill.data.sample import (
    SCHEMA,
    SampleSet,
    encode_shard,
    sample_id,
    shard_name,
)
from raydistill.data.targets import UNLABELLED, encode_targets, read_samples, read_targets
from raydistill.data.train_split import InMemory, OnDevice, Part, Shard, Streamed, TrainSplit
from raydistill.data.views import view_parameters
from raydistill.errors import CheckpointError

VIEWS, FEATURES, SIZE = 3, 5, 8
ROWS, LABELLED = (4, 0, 3, 6, 1), 7  # of each shard, and the rows that have a label, in shards of their own
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
    return number % 4 if number < LABELLED else None


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
    samples = SampleSet(str(tmp_path), ("a", "b", "c", "d"), SIZE, {"train": ROWS}, {"train": LABELLED}, 0, {}, {})
    return TrainSplit((Part(samples, str(tmp_path)),), Views(per_image=VIEWS, brightness=0.3), SEED)


def with_targets(split: TrainSplit, targets: str | None) -> TrainSplit:
    return replace(split, parts=(replace(split.parts[0], targets=targets),))


def image_number(shard: int, row: int) -> int:
    return sum(ROWS[:shard]) + row


def visits_to(shards, rows, visits) -> Visits:
    none = np.zeros(len(shards), int)
    return Visits(none, np.array(shards), np.array(rows), np.array(visits), none)


def some_visits(
    split: TrainSplit, batches: int = 6, batch_size: int = 7, share: float = 0.6, seed: int = SEED
) -> list[Visits]:
    labelled, others, _ = split.pools()
    return list(itertools.islice(batch_order(Pools(labelled, others, share), batch_size, seed), batches))


def test_the_pools_are_the_shards_with_labels_those_without_and_those_of_generated_images(split):
    both = replace(split, parts=(*split.parts, replace(split.parts[0], weights={})))
    assert [pool.rows for pool in both.pools()] == [{0: 4, 2: 3}, {3: 6, 4: 1}, {5: 4, 7: 3, 8: 6, 9: 1}]


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
        assert numbers.images_VHHC.shape == (len(visits),)  # rows, no pixels
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


def counting(num_labelled: int = ROWS_OF_SHARD * SHARDS, parts: int = 1) -> CountingSplit:
    rows = {"train": (ROWS_OF_SHARD,) * SHARDS}
    samples = SampleSet("", ("a",), SIZE, rows, {"train": num_labelled}, 0, {}, {})
    CountingSplit.reads = 0
    return CountingSplit((Part(samples, None),) * parts, Views(per_image="fresh"), SEED)


@pytest.mark.parametrize(("share", "generated_share"), [(1.0, 0.0), (0.4, 0.0), (0.33, 0.3), (0.1, 0.03)])
@pytest.mark.parametrize("announced", [False, True])
def test_a_streamed_shard_is_read_once_in_each_pass_of_a_stream(share, generated_share, announced):
    """However seldom a pool is visited. Two streams may meet in a shard at different times."""
    labelled = SHARDS if share == 1.0 else SHARDS // 2
    split = counting(labelled * ROWS_OF_SHARD, 2 if generated_share else 1)
    source, (first, others, generated) = Streamed(split), split.pools()
    pools = Pools(first, others, share, generated, generated_share)
    visited = np.zeros(3)
    order = list(itertools.islice(batch_order(pools, 64, SEED), 150))
    for n, visits in enumerate(order):
        if announced:
            source.expect(order[min(n + 8, 149)])
        source.gather(visits)
        visited += [np.isin(visits.shard, [*pool.rows]).sum() for pool in pools.each]
        # Each stream is in a shard, and others may be on their way.
        assert len(source._held) <= STREAMS * np.count_nonzero(visited)
    source.close()
    passes = [n / pool.total for n, pool in zip(visited, pools.each, strict=True) if pool.total]
    cuts = len(passes) * STREAMS * (max(passes) + 1)
    assert CountingSplit.reads <= sum(SHARDS * n for n in passes) + cuts


def test_a_worker_that_holds_its_shards_only_reads_no_other(split):
    shards = {0, 3}
    memory, whole = InMemory(split, shards), InMemory(split)
    visits = [v[np.isin(v.shard, [*shards])] for v in some_visits(split, 8, 20)]
    for ours in visits:
        for one, other in zip(memory.gather(ours).arrays(), whole.gather(ours).arrays(), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_array_equal(one, other)
    assert len(memory._all.ids) == ROWS[0] + ROWS[3]
    with pytest.raises(AssertionError, match="its streams only"):
        memory.gather(visits_to([2], [0], [0]))


@pytest.mark.parametrize(("num_labelled", "shard"), [(13, 3), (6, 2), (0, 0)])
def test_a_shard_whose_labels_are_not_what_the_order_takes_them_for_is_named(split, num_labelled, shard):
    samples = replace(split.parts[0].samples, num_labelled={"train": num_labelled})
    with pytest.raises(CheckpointError, match=f"train-0000{shard}.parquet is damaged"):
        InMemory(replace(split, parts=(replace(split.parts[0], samples=samples),)))


def test_streamed_shards_stay_within_the_bytes_there_are_and_too_few_are_said_once(caplog):
    split = counting()
    most = 5 * split.shard(0).num_bytes
    source = Streamed(split, most)
    for visits in itertools.islice(batch_order(Pools(split.pools()[0], Pool({}), 1.0), 16, SEED), 60):
        source.expect(visits)
        source.gather(visits)
        assert sum(shard.num_bytes for shard in source._held.values()) <= most
    source.close()
    (said,) = caplog.messages
    assert "images.shard_size" in said


def test_shards_that_are_announced_are_read_side_by_side():
    """So that a store's latency is waited for once: here no read ends before another has begun."""
    two = threading.Barrier(2)

    class Late(CountingSplit):
        def shard(self, index: int) -> Shard:
            two.wait(60)
            return super().shard(index)

    split = counting()
    source = Streamed(Late(split.parts, split.views, SEED))
    visits = next(batch_order(Pools(split.pools()[0], Pool({}), 1.0), 64, SEED))
    assert len(set(visits.shard.tolist())) % 2 == 0
    source.expect(visits)
    assert len(source.gather(visits).rows_V) == 64
    source.close()


@pytest.mark.parametrize("reader", [InMemory, Streamed])
def test_fresh_views_never_come_again(split, reader):
    source = reader(replace(with_targets(split, None), views=Views(per_image="fresh")))
    visits = visits_to([0] * 50, [1] * 50, range(50))
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
        reader(with_targets(split, str(tmp_path))).gather(visits_to([3], [0], [0]))


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


def test_targets_are_read_by_split_and_shard(split):
    names = read_samples(split.parts[0].samples, "train", 2)["sample_id"].to_pylist()
    found = read_targets(split.parts[0].targets, "train", 2, names)
    np.testing.assert_array_equal(found[1, 2], features_of(names[2], 1))

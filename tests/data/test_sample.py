"""Shards and the order of visits: every row once a pass, any start is the tail of the whole, shares that add up."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.data.sample import (
    SCHEMA,
    Pools,
    Visits,
    batch_order,
    decode_shard,
    encode_shard,
    refuse_other_sizes,
    sample_id,
    samples_from_json,
    seeded_rank,
    visit_order,
    working_images,
)
from raydistill.errors import CheckpointError

# Shards of 0 to 6 rows, some of which take part.
shards = st.lists(st.lists(st.booleans(), max_size=6), min_size=1, max_size=20).map(
    lambda taking: [np.flatnonzero(mask) for mask in taking]
)
some_rows = shards.filter(lambda rows: sum(map(len, rows)) > 0)
seeds = st.integers(0, 2**32 - 1)


def first(order, count: int) -> list[tuple[int, int, int]]:
    """The first `count` visits as (shard, row, visit)."""
    taken: list[tuple[int, int, int]] = []
    while len(taken) < count:
        taken += triples(next(order))
    return taken[:count]


def triples(visits: Visits) -> list[tuple[int, int, int]]:
    return list(zip(visits.shard.tolist(), visits.row.tolist(), visits.visit.tolist(), strict=True))


def rows_of(shards_of_rows: list[np.ndarray]) -> list[tuple[int, int]]:
    return [(k, int(row)) for k, rows in enumerate(shards_of_rows) for row in rows]


@given(rows=some_rows, seed=seeds)
def test_each_pass_visits_every_row_once(rows, seed):
    expected = sorted(rows_of(rows))
    visits = first(visit_order(rows, seed), 3 * len(expected))
    for number in range(3):
        this_pass = visits[number * len(expected) : (number + 1) * len(expected)]
        assert sorted((shard, row) for shard, row, _ in this_pass) == expected
        assert {visit for *_, visit in this_pass} == {number}


@given(rows=some_rows, seed=seeds, start=st.integers(0, 300))
def test_a_resumed_order_is_the_tail_of_the_unbroken_one(rows, seed, start):
    whole = first(visit_order(rows, seed), start + 40)
    assert first(visit_order(rows, seed, start), 40) == whole[start:]


def test_rows_are_shuffled_anew_in_each_pass_and_for_each_seed():
    rows = [np.arange(50) for _ in range(3)]
    starts = itertools.product((0, 1), (0, 150))
    orders = {tuple(visit[:2] for visit in first(visit_order(rows, *start), 150)) for start in starts}
    assert len(orders) == 4


def test_neighbours_in_a_shard_are_not_neighbours_in_the_order():
    visits = first(visit_order([np.arange(100) for _ in range(4)], 0), 400)
    position = {visit[:2]: n for n, visit in enumerate(visits)}
    gaps = [abs(position[k, row] - position[k, row + 1]) for k in range(4) for row in range(99)]
    # Two random places of 400 lie 133 apart on average.
    assert np.mean(gaps) == pytest.approx(400 / 3, rel=0.2)


def test_every_order_of_a_few_rows_is_equally_likely():
    """One row a shard: its place is decided by the order of the shards and by the shuffle within their window."""
    rows = [np.array([0]), np.array([0]), np.array([0])]
    counts = dict.fromkeys(itertools.permutations(range(3)), 0)
    for seed in range(3000):
        counts[tuple(shard for shard, *_ in first(visit_order(rows, seed), 3))] += 1
    expected = 3000 / 6
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 20.5  # 99.9 % point for 5 degrees of freedom


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="no rows"):
        next(visit_order([np.array([], int)], 0))


@st.composite
def pools(draw):
    """Labelled and other rows of the same shards, disjoint, and a share that each pool can serve."""
    kinds = draw(st.lists(st.lists(st.sampled_from("LU-"), max_size=6), min_size=1, max_size=12))
    labelled, others = ([np.array([r for r, k in enumerate(s) if k == kind], int) for s in kinds] for kind in "LU")
    num_labelled, num_others = sum(map(len, labelled)), sum(map(len, others))
    shares = [1.0] if num_labelled else []
    shares += [0.0] if num_others else []
    if num_labelled and num_others:
        shares += [num_labelled / (num_labelled + num_others), 0.5, 1 / 3, draw(st.floats(0, 1))]
    if not shares:
        labelled, shares = [np.array([0])], [1.0]
        others = [np.array([], int)]
    return Pools(labelled, others, draw(st.sampled_from(shares)))


@given(pools=pools(), batch_size=st.integers(1, 17), seed=seeds, steps=st.integers(1, 12))
def test_batches_are_full_and_hold_the_labelled_share_over_any_stretch(pools, batch_size, seed, steps):
    is_labelled = set(rows_of(pools.labelled))
    batches = [triples(b) for b in itertools.islice(batch_order(pools, batch_size, seed), steps)]
    assert [len(batch) for batch in batches] == [batch_size] * steps
    counts = np.cumsum([0, *(sum(visit[:2] in is_labelled for visit in batch) for batch in batches)])
    for begin, end in itertools.combinations(range(steps + 1), 2):
        assert abs(counts[end] - counts[begin] - (end - begin) * batch_size * pools.labelled_share) < 1 + 1e-6


@given(pools=pools(), batch_size=st.integers(1, 17), seed=seeds, steps=st.integers(1, 12))
def test_rows_of_a_pool_are_visited_equally_often_and_counted(pools, batch_size, seed, steps):
    batches = itertools.islice(batch_order(pools, batch_size, seed), steps)
    visits = triples(Visits.concat(list(batches)))
    for pool in (rows_of(pools.labelled), rows_of(pools.others)):
        of_row: dict[tuple[int, int], list[int]] = {row: [] for row in pool}
        for shard, row, visit in visits:
            if (shard, row) in of_row:
                of_row[shard, row].append(visit)
        times = [len(seen) for seen in of_row.values()]
        assert not times or max(times) - min(times) <= 1
        assert all(seen == list(range(len(seen))) for seen in of_row.values())
    taking_part = {*rows_of(pools.labelled), *rows_of(pools.others)}
    assert {visit[:2] for visit in visits} <= taking_part


@given(pools=pools(), batch_size=st.integers(1, 17), seed=seeds, start=st.integers(0, 40))
def test_batches_from_any_step_are_the_tail_of_the_unbroken_sequence(pools, batch_size, seed, start):
    whole = itertools.islice(batch_order(pools, batch_size, seed), start, start + 4)
    resumed = itertools.islice(batch_order(pools, batch_size, seed, start), 4)
    assert [triples(batch) for batch in resumed] == [triples(batch) for batch in whole]


def test_the_two_pools_are_shuffled_apart():
    """With one row of each in a batch, a labelled row keeps meeting other company."""
    none = np.array([], int)
    batches = itertools.islice(batch_order(Pools([np.arange(40), none], [none, np.arange(40)], 0.5), 2, 0), 40)
    equal = sum(int(batch.row[0]) == int(batch.row[1]) for batch in batches)
    assert equal < 8  # one in 40 by chance


def table_of(count: int) -> pa.Table:
    rows = [
        {"sample_id": sample_id(bytes([n])), "image": bytes([n]) * n, "label": n if n % 3 else None, "source": "real",
         "split": "train"} for n in range(count)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@pytest.mark.parametrize("count", [0, 1, 10])
def test_a_shard_comes_back_as_it_was(count):
    table = table_of(count)
    found = decode_shard(encode_shard(table))
    assert found.equals(table)
    assert found.schema.equals(SCHEMA)


@given(
    side=st.integers(1, 9), count=st.integers(0, 12), cut=st.integers(0, 12), parts=st.integers(1, 3), data=st.data(),
)  # fmt: skip
def test_images_come_back_to_the_pixel_from_slices_chunks_and_picked_rows(side, count, cut, parts, data):
    images = np.random.default_rng(count).integers(0, 256, (count, side, side, 3), np.uint8)
    rows = [
        {"sample_id": sample_id(bytes([n])), "image": image.tobytes(), "label": n, "source": "real", "split": "train"}
        for n, image in enumerate(images)
    ]
    table = decode_shard(encode_shard(pa.Table.from_pylist(rows, schema=SCHEMA)))
    np.testing.assert_array_equal(working_images(table, side), images)
    np.testing.assert_array_equal(working_images(table.slice(cut), side), images[cut:])
    chunked = pa.concat_tables([table] * parts)
    np.testing.assert_array_equal(working_images(chunked, side), np.concatenate([images] * parts))
    picked = data.draw(st.lists(st.integers(0, count - 1))) if count else []
    np.testing.assert_array_equal(working_images(table.take(pa.array(picked, pa.int64())), side), images[picked])


@pytest.mark.parametrize("other", [b"", bytes(3 * 16 - 1), bytes(3 * 25), b"\x89PNG of an older version"])
def test_an_image_of_another_size_is_named_with_its_file(other):
    table = table_of(3).set_column(1, SCHEMA.field("image"), pa.array([bytes(3 * 16), other, bytes(3 * 16)]))
    with pytest.raises(CheckpointError, match=r"^train-00000 is damaged \(an image is not 4 x 4 pixels\); delete it"):
        refuse_other_sizes(table, 4, "train-00000")


def test_columns_may_come_in_another_order_and_integer_size():
    table = table_of(5)
    mixed = pa.table({name: table[name] for name in reversed(SCHEMA.names)})
    mixed = mixed.set_column(mixed.schema.get_field_index("label"), "label", table["label"].cast(pa.int64()))
    assert decode_shard(encode_shard(mixed)).equals(table)


@pytest.mark.parametrize(
    ("column", "values"),
    [("label", ["cat"] * 5), ("label", [2**40] * 5), ("image", [[0, 255]] * 5), ("source", [None] * 5)],
)
def test_a_column_that_does_not_fit_is_refused(column, values):
    table = table_of(5)
    with pytest.raises((pa.ArrowException, ValueError)):
        encode_shard(table.set_column(table.schema.get_field_index(column), column, pa.array(values)))


def test_equal_rows_give_equal_bytes():
    assert encode_shard(table_of(9)) == encode_shard(table_of(9))


@given(names=st.lists(st.text(max_size=8), min_size=2, max_size=30, unique=True), seed=seeds, gone=st.integers(0, 29))
def test_a_rank_does_not_change_when_other_images_come_or_go(names, seed, gone):
    order = sorted(names, key=lambda name: seeded_rank(seed, "split", name))
    left = [name for n, name in enumerate(names) if n != gone % len(names)]
    again = sorted(left, key=lambda name: seeded_rank(seed, "split", name))
    assert again == [name for name in order if name in left]


def test_ranks_differ_by_seed_and_purpose_and_favour_no_image():
    names = [str(n) for n in range(200)]
    kinds = itertools.product(range(40), ("split", "order", "label"))
    orders = [tuple(sorted(names, key=lambda name: seeded_rank(*kind, name))) for kind in kinds]
    assert len(set(orders)) == len(orders)
    places = np.mean([[order.index(name) for name in names] for order in orders], axis=0)
    # The mean of 120 uniform places scatters by 200 / sqrt(12 * 120) = 5.3.
    assert np.abs(places - 99.5).max() < 5 * 5.3


def test_samples_survive_the_trip_through_json():
    done = {
        "path": "/w/prepare-1", "classes": ["10", "2", "café", "a b"], "size": 32,
        "shards": {"train": [4, 3], "val": [2], "test": []}, "num_labelled": {"train": 5, "val": 2, "test": 0},
        "num_refused": 1, "ids": {"train": "a", "val": "b", "test": "c"},
        "labels": {"train": "d", "val": "e", "test": "f"},
    }  # fmt: skip
    samples = samples_from_json(done)
    assert samples.classes == ("10", "2", "café", "a b")
    assert [samples.num_rows(split) for split in ("train", "val", "test", "elsewhere")] == [7, 2, 0, 0]


@given(
    share=st.floats(0.05, 0.95), generated_share=st.floats(0.0, 0.95), batch_size=st.integers(1, 9),
    start=st.integers(0, 40),
)  # fmt: skip
def test_generated_rows_get_their_share_and_the_others_theirs_of_the_rest(share, generated_share, batch_size, start):
    empty = np.empty(0, np.int64)
    labelled, others = [np.arange(5), np.arange(0), empty], [np.arange(5, 9), np.arange(7), empty]
    generated = [empty, empty, np.arange(6)]
    pools = Pools(labelled, others, share, generated, generated_share)
    whole = list(itertools.islice(batch_order(pools, batch_size, 3), start + 30))
    for resumed, unbroken in zip(batch_order(pools, batch_size, 3, start), whole[start:], strict=False):
        assert triples(resumed) == triples(unbroken)
    visits = Visits.concat(whole)
    from_generated = visits.shard == 2
    assert abs(from_generated.sum() - generated_share * len(visits)) <= 1
    from_labelled = (visits.shard == 0) & (visits.row < 5)
    assert abs(from_labelled.sum() - share * (~from_generated).sum()) <= 1
    counts = np.bincount(visits.row[from_generated], minlength=6)
    assert counts.max() - counts.min() <= 1


# As the order was drawn before there were generated images.
WAS = (
    [0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 0, 1, 0],
    [3, 0, 5, 6, 4, 7, 0, 2, 3, 5, 6, 8, 1, 1, 4, 4, 3, 8, 2, 0, 5, 7, 5, 6],
)


def test_without_generated_rows_the_order_is_what_it_was():
    """Runs that were made before there were generated images are still theirs."""
    labelled, others = [np.arange(5), np.arange(3)], [np.arange(5, 9), np.arange(3, 7)]
    order = Visits.concat(list(itertools.islice(batch_order(Pools(labelled, others, 0.4), 6, 1), 4)))
    assert order.shard.tolist() == WAS[0]
    assert order.row.tolist() == WAS[1]

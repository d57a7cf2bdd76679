"""The order of visits: every row once a pass, any start is the tail of the whole, shares that add up, and workers that
together see each batch while each reads its own piece."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.data.order import Pool, Pools, Visits, batch_order

# Shards of 1 to 40 rows, not all of which are this pool's.
shards = st.dictionaries(st.integers(0, 30), st.integers(1, 40), max_size=12)
some_shards = shards.filter(bool)
seeds = st.integers(0, 2**32 - 1)


def first(order, count: int) -> list[tuple[int, int, int]]:
    """The first `count` visits as (shard, row, visit)."""
    taken: list[tuple[int, int, int]] = []
    while len(taken) < count:
        taken += triples(next(order))
    return taken[:count]


def triples(visits: Visits) -> list[tuple[int, int, int]]:
    return list(zip(visits.shard.tolist(), visits.row.tolist(), visits.visit.tolist(), strict=True))


def rows_of(pool: Pool) -> list[tuple[int, int]]:
    return [(shard, row) for shard, rows in pool.rows.items() for row in range(rows)]


@given(rows=some_shards, seed=seeds, backwards=st.booleans())
def test_each_pass_visits_every_row_once(rows, seed, backwards):
    pool = Pool(rows, backwards)
    visits = first(pool.visits(seed), 3 * pool.total)
    for number in range(3):
        this_pass = visits[number * pool.total : (number + 1) * pool.total]
        assert sorted((shard, row) for shard, row, _ in this_pass) == sorted(rows_of(pool))
        assert {visit for *_, visit in this_pass} == {number}


@given(rows=some_shards, seed=seeds, start=st.integers(0, 300))
def test_a_resumed_order_is_the_tail_of_the_unbroken_one(rows, seed, start):
    whole = first(Pool(rows).visits(seed), start + 40)
    assert first(Pool(rows).visits(seed, start), 40) == whole[start:]


def test_rows_are_shuffled_anew_in_each_pass_and_for_each_seed():
    pool = Pool({0: 50, 1: 50, 2: 50})
    starts = itertools.product((0, 1), (0, 150))
    orders = {tuple(visit[:2] for visit in first(pool.visits(*start), 150)) for start in starts}
    assert len(orders) == 4


def test_neighbours_in_a_shard_are_not_neighbours_in_the_order():
    visits = first(Pool(dict.fromkeys(range(4), 400)).visits(0), 1600)
    position = {visit[:2]: n for n, visit in enumerate(visits)}
    gaps = [abs(position[k, row] - position[k, row + 1]) for k in range(4) for row in range(399)]
    # Two random places of 1600 lie 533 apart on average.
    assert np.mean(gaps) == pytest.approx(1600 / 3, rel=0.2)


def test_every_order_of_the_rows_of_a_shard_is_equally_likely():
    counts = dict.fromkeys(itertools.permutations(range(3)), 0)
    for seed in range(3000, 6000):
        counts[tuple(row for _, row, _ in first(Pool({0: 3}).visits(seed), 3))] += 1
    expected = 3000 / 6
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 20.5  # 99.9 % point for 5 degrees of freedom


@given(rows=st.dictionaries(st.integers(0, 30), st.integers(256, 400), min_size=1, max_size=12), seed=seeds)
def test_any_few_visits_in_a_row_come_from_all_over_the_pool(rows, seed):
    """So a batch is fair where shards are not alike: of each it has its share, give or take what two cuts decide."""
    pool = Pool(rows)
    visits = np.array(first(pool.visits(seed), pool.total))
    for start in range(0, pool.total - 64, 64):
        counts = np.bincount(visits[start : start + 64, 0], minlength=31)
        assert max(abs(counts[shard] - 64 * count / pool.total) for shard, count in rows.items()) <= 4


@st.composite
def pools(draw):
    """Labelled, other and generated shards, and shares that each pool can serve."""
    kinds = draw(st.lists(st.tuples(st.sampled_from("LUG"), st.integers(1, 40)), min_size=1, max_size=20))
    pools = {kind: {n: rows for n, (k, rows) in enumerate(kinds) if k == kind} for kind in "LUG"}
    if not pools["L"] and not pools["U"]:
        pools["L"] = {99: 1}
    labelled, others = Pool(pools["L"]), Pool(pools["U"], backwards=True)
    shares = [1.0] if labelled.total else [0.0]
    if labelled.total and others.total:
        natural = labelled.total / (labelled.total + others.total)
        shares = [0.0, 1.0, natural, 0.5, 1 / 3, draw(st.floats(0, 1))]
    generated_share = draw(st.sampled_from([0.0, 0.5, draw(st.floats(0, 1))])) if pools["G"] else 0.0
    return Pools(labelled, others, draw(st.sampled_from(shares)), Pool(pools["G"]), generated_share)


@given(pools=pools(), batch_size=st.integers(1, 70), seed=seeds, steps=st.integers(1, 8))
def test_batches_are_full_and_hold_the_shares_over_any_stretch(pools, batch_size, seed, steps):
    batches = list(itertools.islice(batch_order(pools, batch_size, seed), steps))
    assert [len(batch) for batch in batches] == [batch_size] * steps
    counts = np.zeros((steps + 1, 3), int)
    for n, batch in enumerate(batches):
        shards = batch.shard.tolist()
        counts[n + 1] = counts[n] + [sum(shard in pool.rows for shard in shards) for pool in pools.each]
    for begin, end in itertools.combinations(range(steps + 1), 2):
        labelled, others, generated = counts[end] - counts[begin]
        assert abs(generated - (end - begin) * batch_size * pools.generated_share) < 1 + 1e-6
        assert abs(labelled - (labelled + others) * pools.labelled_share) < 2 + 1e-6


@given(pools=pools(), batch_size=st.integers(1, 70), seed=seeds, steps=st.integers(1, 8))
def test_rows_of_a_pool_are_visited_equally_often_and_counted(pools, batch_size, seed, steps):
    visits = triples(Visits.concat(list(itertools.islice(batch_order(pools, batch_size, seed), steps))))
    of_row: dict[tuple[int, int], list[int]] = {row: [] for pool in pools.each for row in rows_of(pool)}
    for shard, row, visit in visits:  # a KeyError is a row that takes no part
        of_row[shard, row].append(visit)
    for pool in pools.each:
        times = [len(of_row[row]) for row in rows_of(pool)]
        assert not times or max(times) - min(times) <= 1
    assert all(seen == list(range(len(seen))) for seen in of_row.values())


@given(pools=pools(), batch_size=st.integers(1, 70), seed=seeds, start=st.integers(0, 40))
def test_batches_from_any_step_are_the_tail_of_the_unbroken_sequence(pools, batch_size, seed, start):
    whole = itertools.islice(batch_order(pools, batch_size, seed), start, start + 4)
    resumed = itertools.islice(batch_order(pools, batch_size, seed, start), 4)
    assert [triples(batch) for batch in resumed] == [triples(batch) for batch in whole]


def test_the_two_pools_are_shuffled_apart():
    """With one row of each in a batch, a labelled row keeps meeting other company."""
    batches = itertools.islice(batch_order(Pools(Pool({0: 40}), Pool({1: 40}), 0.5), 2, 0), 40)
    equal = sum(int(batch.row[0]) == int(batch.row[1]) for batch in batches)
    assert equal < 8  # one in 40 by chance


@given(pools=pools(), batch_size=st.integers(1, 300), workers=st.integers(1, 40), seed=seeds, start=st.integers(0, 99))
def test_workers_together_see_each_batch_and_none_is_left_with_less_than_two(pools, batch_size, workers, seed, start):
    for visits in itertools.islice(batch_order(pools, batch_size, seed, start), 3):
        shares = [visits.of_worker(rank, workers) for rank in range(workers)]
        together = Visits.concat(shares)
        assert sorted(together.place) == list(range(batch_size))
        back = np.argsort(together.place)
        assert triples(together[back]) == triples(visits)
        assert min(map(len, shares)) >= min(2, batch_size // workers)


@given(pools=pools(), workers=st.sampled_from([1, 2, 4]), per_worker=st.integers(12, 40), seed=seeds)
def test_shares_are_equal_if_two_pools_fill_a_batch_and_workers_divide_the_streams(pools, workers, per_worker, seed):
    pools = Pools(pools.labelled, pools.others, pools.labelled_share)
    for visits in itertools.islice(batch_order(pools, workers * per_worker, seed), 4):
        assert {len(visits.of_worker(rank, workers)) for rank in range(workers)} == {per_worker}


@given(pools=pools(), workers=st.integers(1, 40), batch_size=st.integers(1, 300), seed=seeds)
def test_a_worker_visits_no_other_shard_than_it_was_told(pools, workers, batch_size, seed):
    told = [pools.shards_of(rank, workers, batch_size) for rank in range(workers)]
    for visits in itertools.islice(batch_order(pools, batch_size, seed), 12):
        for rank in range(workers):
            assert set(visits.of_worker(rank, workers).shard.tolist()) <= told[rank]


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8, 32])
def test_workers_together_read_little_more_than_the_set(workers):
    pools = Pools(Pool(dict.fromkeys(range(40), 256)), Pool(dict.fromkeys(range(40, 4000), 256), True), 0.33)
    read = [pools.shards_of(rank, workers, 64 * workers) for rank in range(workers)]
    assert set().union(*read) == set(range(4000))
    assert sum(map(len, read)) <= 4000 + 4 * workers
    assert max(map(len, read)) <= 1.35 * 4000 / workers  # 5 workers have 6 or 7 of 32 streams

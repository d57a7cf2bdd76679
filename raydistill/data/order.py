"""The order in which training visits images. It depends on the job alone: any number of workers sees the same batches.

A pool is a line of rows, shard after shard. Each pass cuts the line into STREAMS equal parts, and the visits of the
pool go to the streams in turn. So a batch takes from all over the pool, while a worker, which owns the streams of one
piece of the line, reads the shards of that piece alone.

Shapes: V visits, S streams.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial

import numpy as np

STREAMS = 32  # a power of two
# Workers own streams if a batch has so many images for each: their shares of it differ by some images, and none may be
# left with less than two. In smaller batches, and with more workers than streams, each reads all of the line.
_LEAST_SHARE = 12
# The stream of visit 0, 1, … of a pool: the bits of the number in reverse, so that any few visits in a row are spread
# evenly over the line, and over any number of workers.
_STREAM_OF_TURN = np.array([int(f"{turn:05b}"[::-1], 2) for turn in range(STREAMS)])
_BLOCK_ROUNDS = 4  # visits of a stream that are looked up together


def _own_streams(batch_size: int, workers: int) -> bool:
    return workers <= min(STREAMS, batch_size // _LEAST_SHARE)


@dataclass(frozen=True)
class Visits:
    """Rows to visit, in order. Each column is (V,): the stream (the second pool's follow the first's), the shard, the
    row in the shard, how often the row was visited before, and the place in the global batch."""

    stream: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    visit: np.ndarray
    place: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, which: slice | np.ndarray) -> Visits:
        return Visits(*(column[which] for column in vars(self).values()))

    @staticmethod
    def concat(parts: Sequence[Visits]) -> Visits:
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return Visits(*(np.concatenate(column) for column in columns))

    def of_worker(self, rank: int, size: int) -> Visits:
        """One worker's visits of a global batch: those of its streams, if it owns some."""
        if not _own_streams(len(self), size):
            return self[self.place % size == rank]
        return self[self.stream % STREAMS * size // STREAMS == rank]


@dataclass(frozen=True)
class Pool:
    """Rows that are drawn from alike. `rows`: how many each shard has, without empty ones. Where two pools fill a
    batch, the streams of one take turns `backwards`: those with a visit more in one have a visit less in the other."""

    rows: Mapping[int, int]
    backwards: bool = False

    @cached_property
    def total(self) -> int:
        return sum(self.rows.values())

    @cached_property
    def _streams(self) -> np.ndarray:
        """(S,): the stream whose turn visit 0, 1, … is."""
        return _STREAM_OF_TURN[::-1] if self.backwards else _STREAM_OF_TURN

    @cached_property
    def _line(self) -> tuple[list[int], np.ndarray]:
        """The shards, and where each ends in the line of rows."""
        return [*self.rows], np.cumsum([*self.rows.values()])

    def visits(self, seed: int, start: int = 0) -> Iterator[Visits]:
        """Endless visits in blocks, from visit `start` on. Each pass visits every row once, in an order that depends on
        the seed and the pass alone. Places are 0."""
        begun, skip = divmod(start, STREAMS)
        # Streams of a small pool share cuts and shards.
        cuts, shuffled = lru_cache(STREAMS)(self._cuts), lru_cache(2 * STREAMS)(partial(self._shuffled, seed))
        streams = [self._stream(seed, turn, begun, cuts, shuffled) for turn in range(STREAMS)]
        while True:
            rounds = [list(itertools.islice(stream, _BLOCK_ROUNDS)) for stream in streams]
            shard, row, visit = np.array(rounds).transpose(2, 1, 0).reshape(3, -1)
            block = Visits(np.tile(self._streams, _BLOCK_ROUNDS), shard, row, visit, np.zeros_like(row))
            yield block[skip:]
            skip = 0

    def _stream(
        self,
        seed: int,
        turn: int,
        start: int,
        cuts: Callable[[int], np.ndarray],
        shuffled: Callable[[int, int], np.ndarray],
    ) -> Iterator[tuple[int, int, int]]:
        """Shard, row and pass of the visits of one stream, from its visit `start` on."""
        shards, ends = self._line
        while True:
            number = (start * STREAMS + turn) // self.total
            begin, end = cuts(number)[self._streams[turn] :][:2].tolist()
            skip = start - int(_visits_of_turns(number * self.total)[turn])
            start += end - begin - skip
            first, last = np.searchsorted(ends, [begin, end - 1], "right")
            pieces = np.arange(first, last + 1)
            if len(pieces) > 1:
                pieces = np.random.default_rng([seed, number, turn, 1]).permutation(pieces)
            for k in pieces.tolist():
                offset = int(ends[k]) - self.rows[shards[k]]
                rows = shuffled(number, k)[max(begin - offset, 0) : end - offset].tolist()
                yield from ((shards[k], row, number) for row in rows[skip:])
                skip = max(skip - len(rows), 0)

    def _cuts(self, number: int) -> np.ndarray:
        """(S + 1,): where the streams of a pass begin and end in the line. They differ by a row at most."""
        before, after = (_visits_of_turns(passes * self.total) for passes in (number, number + 1))
        sizes = np.empty(STREAMS, np.int64)
        sizes[self._streams] = after - before
        return np.cumsum([0, *sizes])

    def _shuffled(self, seed: int, number: int, k: int) -> np.ndarray:
        """The rows of shard k of the line in their order in a pass."""
        return np.random.default_rng([seed, number, k, 2]).permutation(self.rows[self._line[0][k]])

    def shards_of(self, rank: int, size: int) -> set[int]:
        """The shards of a worker's streams, in any pass: a cut is never STREAMS rows away from that of equal parts."""
        streams = np.flatnonzero(np.arange(STREAMS) * size // STREAMS == rank)
        begin, end = streams[0] * self.total / STREAMS, (streams[-1] + 1) * self.total / STREAMS
        placed = zip(*self._line, self.rows.values(), strict=True)
        return {s for s, last, rows in placed if last > begin - STREAMS and last - rows < end + STREAMS}


def _visits_of_turns(total: int) -> np.ndarray:
    """(S,): how many of the first `total` visits of a pool are each turn's."""
    return (total - np.arange(STREAMS) + STREAMS - 1) // STREAMS


@dataclass(frozen=True)
class Pools:
    """Of all visits `generated_share` goes to generated rows; of the rest, `labelled_share` goes to labelled rows."""

    labelled: Pool
    others: Pool
    labelled_share: float
    generated: Pool = Pool({})
    generated_share: float = 0.0

    @property
    def each(self) -> tuple[Pool, Pool, Pool]:
        return self.labelled, self.others, self.generated

    def shards_of(self, rank: int, size: int, batch_size: int) -> set[int]:
        """The shards that a worker may read."""
        shares = self.labelled_share * (1 - self.generated_share), 1 - self.labelled_share, self.generated_share
        drawn = (pool for pool, share in zip(self.each, shares, strict=True) if share and pool.total)
        owns = _own_streams(batch_size, size)
        return set[int]().union(*(pool.shards_of(rank, size) if owns else pool.rows for pool in drawn))

    def visits_of(self, total: int) -> tuple[int, int, int]:
        """How many of the first `total` visits go to each pool."""
        generated = int(np.floor(total * self.generated_share + 1e-9))
        labelled = int(np.floor((total - generated) * self.labelled_share + 1e-9))
        return labelled, total - generated - labelled, generated


def batch_order(pools: Pools, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Visits]:
    """Endless global batches of exactly `batch_size` visits from `start_step` on.

    The split of a batch is the difference of rounded running totals. So the shares hold over any stretch, and every row
    of a pool is visited equally often, whatever the batch size: no last batch is short, and none is dropped.
    """
    begun = pools.visits_of(start_step * batch_size)
    seeds = (seed * 2, seed * 2 + 1, 2**34 + seed)
    orders = [p.visits(*each) if p.total else None for p, *each in zip(pools.each, seeds, begun, strict=True)]
    left: list[Visits | None] = [None, None, None]

    def take(pool: int, count: int) -> Iterator[Visits]:
        while count:
            order = orders[pool]
            assert order is not None, "a pool without rows has a share of 0"
            block = left[pool] or next(order)
            yield replace(block[:count], stream=block.stream[:count] + pool * STREAMS)
            left[pool] = block[count:] if len(block) > count else None
            count -= min(count, len(block))

    for step in itertools.count(start_step + 1):
        ended = pools.visits_of(step * batch_size)
        visits = Visits.concat([part for pool in range(3) for part in take(pool, ended[pool] - begun[pool])])
        yield replace(visits, place=np.arange(batch_size))
        begun = ended

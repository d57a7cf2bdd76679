"""Near pairs against the table of all pairs."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raydistill.data.near_duplicates import near_pairs


def slow_pairs(hashes: list[bytes], distance: int) -> set[tuple[int, int]]:
    bits = [np.unpackbits(np.frombuffer(h, np.uint8)) for h in hashes]
    numbered = itertools.combinations(range(len(hashes)), 2)
    return {(a, b) for a, b in numbered if 0 < (bits[a] != bits[b]).sum() <= distance}


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(2, 40))
def test_every_near_pair_is_found_once_and_no_other(seed: int, distance: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    bases = rng.integers(0, 2, (3, 256), np.uint8)
    rows = bases[rng.integers(0, 3, count)]
    for row in rows:  # up to eight bits off one of three pictures, anywhere or all in one place
        start = int(rng.integers(0, 248))
        places = rng.choice(256, 8, replace=False) if rng.random() < 0.5 else np.arange(start, start + 8)
        row[places[: rng.integers(0, 9)]] ^= 1
    hashes = [np.packbits(row).tobytes() for row in rows]
    found = list(near_pairs(hashes, distance))
    assert len(found) == len(set(found))
    assert set(found) == slow_pairs(hashes, distance)


def test_many_pictures_that_share_a_band_are_no_trouble() -> None:
    rng = np.random.default_rng(0)
    rows = np.zeros((3000, 256), np.uint8)
    rows[:, 200:] = rng.integers(0, 2, (3000, 56))  # the rest is blank in all
    hashes = [np.packbits(row).tobytes() for row in rows]
    assert set(near_pairs(hashes, 4)) <= {(a, b) for a in range(3000) for b in range(a + 1, 3000)}

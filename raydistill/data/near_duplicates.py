"""Finds pictures that are nearly equal, and pictures that show nothing.

Shapes: N hashes, B of their 256 bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from PIL import Image


def contrast(image: Image.Image) -> float:
    """Standard deviation of the brightness, between 0 and 255."""
    return float(np.asarray(image.convert("L"), np.float32).std())


def difference_hash(image: Image.Image) -> bytes:
    """256 bits: is each pixel of the picture at 17 x 16 brighter than its right neighbour (dHash by N. Krawetz)?"""
    grey = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.LANCZOS), np.int16)
    return np.packbits(grey[:, :-1] > grey[:, 1:]).tobytes()


def hash_words(hashes: Sequence[bytes]) -> np.ndarray:
    """(N, 4) uint64 of hashes of 256 bits."""
    return np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 4)


def near_pairs(hashes: Sequence[bytes], distance: int) -> Iterator[tuple[int, int]]:
    """Every pair of different hashes that differ in at most `distance` bits, once.

    Of `distance` + 1 bands, two such hashes share at least one. So only hashes that share a band are compared, and
    there is no table of all pairs.
    """
    bits_NB = np.unpackbits(np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), -1), axis=1)
    words_N4, seen = hash_words(hashes), set[tuple[int, int]]()
    for band_NB in np.array_split(bits_NB, distance + 1, axis=1):
        _, group_N = np.unique(np.packbits(band_NB, axis=1), axis=0, return_inverse=True)
        order = np.argsort(group_N.ravel(), kind="stable")
        starts = np.flatnonzero(np.diff(group_N.ravel()[order], prepend=-1))
        for members in np.split(order, starts[1:]):
            for row, one in enumerate(members[:-1]):
                others = members[row + 1 :]
                differ = np.bitwise_count(words_N4[others] ^ words_N4[one]).sum(axis=1)
                for other in others[(differ <= distance) & (differ > 0)]:
                    pair = (min(int(one), int(other)), max(int(one), int(other)))
                    if pair not in seen:
                        seen.add(pair)
                        yield pair


class NearHashes:
    """Growing hashes of 256 bits, which tell whether one of them lies near another hash.

    As in `near_pairs`, only hashes that share one of `distance` + 1 bands are compared. The bits of a band are spread
    over the picture: many pictures have one corner in common.
    """

    def __init__(self, distance: int, hashes: Sequence[bytes] = ()) -> None:
        self._distance, self._words_N4, self._count = distance, np.empty((64, 4), np.uint64), 0
        self._masks = [sum(1 << bit for bit in range(band, 256, distance + 1)) for band in range(distance + 1)]
        self._bands: list[dict[int, list[int]]] = [defaultdict(list) for _ in self._masks]
        for one in hashes:
            self.add(one)

    def add(self, one: bytes) -> None:
        if self._count == len(self._words_N4):
            self._words_N4 = np.concatenate([self._words_N4, np.empty_like(self._words_N4)])
        self._words_N4[self._count] = np.frombuffer(one, np.uint64)
        number = int.from_bytes(one)
        for mask, band in zip(self._masks, self._bands, strict=True):
            band[number & mask].append(self._count)
        self._count += 1

    def has_near(self, one: bytes) -> bool:
        """Whether one of them differs from `one` in at most `distance` bits."""
        number = int.from_bytes(one)
        found = [band.get(number & mask, []) for mask, band in zip(self._masks, self._bands, strict=True)]
        if not any(found):
            return False
        # A far distance has narrow bands, which nearly all hashes share: to look at all is faster than to pick them.
        rows = list(chain(*found)) if 8 * sum(map(len, found)) < self._count else slice(self._count)
        differ = np.bitwise_count(self._words_N4[rows] ^ np.frombuffer(one, np.uint64)).sum(axis=1)
        return bool((differ <= self._distance).any())

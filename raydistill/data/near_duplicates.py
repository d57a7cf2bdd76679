"""Finds pictures that are nearly equal, and pictures that show nothing.

Shapes: N hashes, B of their 256 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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

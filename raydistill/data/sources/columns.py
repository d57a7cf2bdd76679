"""The entries of a data set as columns: of a million images they take some hundred MB less than as many objects.

Shapes: N entries, P distinct paths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, islice
from typing import overload

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from raydistill.data.sample import SPLITS
from raydistill.escaping import quoted
from raydistill.storage.tables import values

_TOGETHER = 1 << 14  # entries that are objects at the same time
_SPLIT_NUMBERS = {None: -1} | {split: number for number, split in enumerate(SPLITS)}


@dataclass(frozen=True, slots=True)
class Entry:
    """One image as its source names it: a file, or a `row` of one. Label and split are None if the source gives
    none."""

    path: str
    label: str | None
    split: str | None
    row: int | None = None


def entry_name(entry: Entry) -> str:
    """The name of an entry in messages."""
    return quoted(entry.path) if entry.row is None else f"{quoted(entry.path)} row {entry.row}"


def bytes_of(name: str) -> bytes:
    """Works for names that are not valid text too. The bytes sort as the names do."""
    return name.encode(errors="surrogatepass")


@dataclass(frozen=True, eq=False)
class Entries(Sequence[Entry]):
    """N entries in order. `paths` and `labels` hold each value once, and the columns their numbers; -1 stands for
    None."""

    paths: pa.Array  # P paths, sorted, as `bytes_of` gives them
    labels: tuple[str, ...]
    path_N: np.ndarray
    row_N: np.ndarray
    label_N: np.ndarray
    split_N: np.ndarray  # an index into SPLITS

    @staticmethod
    def of(entries: Iterable[Entry]) -> Entries:
        """It takes some at a time. Labels are numbered as they appear."""
        labels, last, stream = dict[str, int](), None, iter(entries)
        paths = [pa.array([], pa.large_binary())]
        columns = [tuple(np.empty(0, kind) for kind in (bool, np.int64, np.int32, np.int8))]
        while some := list(islice(stream, _TOGETHER)):
            names = [entry.path for entry in some]
            is_other = [name != before for name, before in zip(names, [last, *names], strict=False)]
            paths.append(pa.array(map(bytes_of, compress(names, is_other)), pa.large_binary()))
            rows = [-1 if entry.row is None else entry.row for entry in some]
            numbers = [-1 if entry.label is None else labels.setdefault(entry.label, len(labels)) for entry in some]
            splits = [_SPLIT_NUMBERS[entry.split] for entry in some]
            columns.append((np.array(is_other), np.array(rows), np.array(numbers, np.int32), np.array(splits, np.int8)))
            last = names[-1]
        is_other_N, row_N, label_N, split_N = map(np.concatenate, zip(*columns, strict=True))
        distinct, number_R = _numbered(pa.concat_arrays(paths))
        return Entries(distinct, tuple(labels), number_R[np.cumsum(is_other_N) - 1], row_N, label_N, split_N)

    def __len__(self) -> int:
        return len(self.path_N)

    @overload
    def __getitem__(self, which: int) -> Entry: ...
    @overload
    def __getitem__(self, which: slice | np.ndarray) -> Entries: ...
    def __getitem__(self, which: int | slice | np.ndarray) -> Entry | Entries:
        """One entry or, by a slice, numbers or a mask, some."""
        if isinstance(which, slice | np.ndarray):
            columns = (self.path_N[which], self.row_N[which], self.label_N[which], self.split_N[which])
            return Entries(self.paths, self.labels, *columns)
        (path,) = values(self.paths.slice(int(self.path_N[which]), 1))
        return self._entry(_name_of(path), *(int(column[which]) for column in (self.row_N, self.label_N, self.split_N)))

    def __iter__(self) -> Iterator[Entry]:
        for first in range(0, len(self), _TOGETHER):
            some = self[first : first + _TOGETHER]
            columns = (some.row_N.tolist(), some.label_N.tolist(), some.split_N.tolist())
            for path, *numbers in zip(some.names(), *columns, strict=True):
                yield self._entry(path, *numbers)

    def _entry(self, path: str, row: int, label: int, split: int) -> Entry:
        named = (self.labels[label] if label >= 0 else None, SPLITS[split] if split >= 0 else None)
        return Entry(path, *named, None if row < 0 else row)

    def names(self) -> Iterator[str]:
        """The path of each."""
        return map(_name_of, values(self.paths.take(pa.array(self.path_N))))

    def distinct_paths(self) -> Iterator[str]:
        """Each path once, sorted."""
        used = np.unique(self.path_N)
        for first in range(0, len(used), _TOGETHER):
            yield from map(_name_of, values(self.paths.take(pa.array(used[first : first + _TOGETHER]))))

    def by_name(self) -> np.ndarray:
        """(N,): the numbers of the entries, sorted by path and row."""
        return np.lexsort((self.row_N, self.path_N))

    def places(self, first: int, end: int) -> list[tuple[int, str, int | None]]:
        """Index, path and row of a range of entries."""
        some = self[first:end]
        rows = (None if row < 0 else row for row in some.row_N.tolist())
        return list(zip(range(first, end), some.names(), rows, strict=True))

    def in_split(self, *splits: str | None) -> np.ndarray:
        """(N,) bool: which of them the source puts into one of these splits."""
        return np.isin(self.split_N, [_SPLIT_NUMBERS[split] for split in splits])

    @property
    def is_labelled(self) -> np.ndarray:
        return self.label_N >= 0

    def label_counts(self) -> Counter[str]:
        """How many have each label, in the order of `labels`."""
        counts = np.bincount(self.label_N[self.is_labelled], minlength=len(self.labels)).tolist()
        return Counter({label: count for label, count in zip(self.labels, counts, strict=True) if count})

    def counts(self) -> Counter[tuple[str | None, str | None]]:
        """How many have each split and label."""
        found = Counter[tuple[str | None, str | None]]()
        for number, split in [*enumerate(SPLITS), (-1, None)]:
            some = self[self.split_N == number]
            found.update({(split, label): count for label, count in some.label_counts().items()})
            if blank := len(some) - int(some.is_labelled.sum()):
                found[split, None] = blank
        return found

    def relabelled(self, names: Mapping[str, str], order: Sequence[str] = ()) -> Entries:
        """With other names for some labels. `order` lists the labels that are numbered first."""
        spelt = [names.get(label, label) for label in self.labels]
        numbers = {label: number for number, label in enumerate(dict.fromkeys([*order, *spelt]))}
        number_L = np.array([*(numbers[label] for label in spelt), -1], np.int32)
        return replace(self, labels=tuple(numbers), label_N=number_L[self.label_N])

    def renamed(self, rename: Callable[[str], str]) -> Entries:
        """With another form of each path."""
        renamed = pa.array((bytes_of(rename(_name_of(path))) for path in values(self.paths)), pa.large_binary())
        paths, number_P = _numbered(renamed)
        return replace(self, paths=paths, path_N=number_P[self.path_N])


def _numbered(paths: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The distinct paths, sorted, and the number of each given one among them."""
    order = pc.sort_indices(paths)
    in_order = paths.take(order)
    is_other = np.ones(len(paths), bool)
    is_other[1:] = pc.not_equal(in_order[1:], in_order[:-1]).to_numpy(zero_copy_only=False)
    numbers = np.empty(len(paths), np.int32)
    numbers[order.to_numpy()] = np.cumsum(is_other) - 1
    return in_order.filter(pa.array(is_other)), numbers


def _name_of(path: bytes) -> str:
    return path.decode(errors="surrogatepass")

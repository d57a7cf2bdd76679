"""Which images are used, in which split each is, and which of them keep their labels.

Images are numbers, those of their entries. Shapes: N entries, S some of them, C classes.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise, repeat

import numpy as np

from raydistill.config import RunConfig
from raydistill.data.sample import SPLITS, SampleSet, seeded_ranks
from raydistill.data.sources.columns import Entries, entry_name
from raydistill.errors import DataError
from raydistill.escaping import shortened

_TOGETHER = 1 << 14  # ids that are text at the same time


@dataclass(frozen=True)
class Decoded:
    """Entries with the ids of their files, 16 bytes each, and by number the reasons of those that cannot be used."""

    entries: Entries
    ids_N: np.ndarray
    reasons: Mapping[int, str]

    def by_name(self, is_usable: bool) -> np.ndarray:
        """(S,): the entries that can be used, or the others, sorted by path and row."""
        usable_N = np.ones(len(self.entries), bool)
        usable_N[list(self.reasons)] = False
        by_name_N = self.entries.by_name()
        return by_name_N[usable_N[by_name_N] == is_usable]

    def copies(self) -> list[np.ndarray]:
        """Groups of usable entries whose files are equal, the first by name first."""
        by_name_S = self.by_name(is_usable=True)
        order_S = np.argsort(self.ids_N[by_name_S], kind="stable")
        ids_S = self.ids_N[by_name_S[order_S]]
        starts = np.flatnonzero(np.r_[True, ids_S[1:] != ids_S[:-1]])
        sizes = np.diff(np.r_[starts, len(ids_S)])
        groups = [
            order_S[start : start + size] for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True)
        ]
        return [by_name_S[group] for group in sorted(groups, key=lambda group: group[0])]


def without_duplicates(known: Decoded) -> tuple[np.ndarray, list[dict[str, str]]]:
    """(S,) one entry for each distinct file, and why the others are refused. Of copies, it keeps the one in test, then
    in val, then a labelled one. An image under two labels is refused."""
    bad_S, kept_N = known.by_name(is_usable=False), np.ones(len(known.entries), bool)
    kept_N[bad_S] = False
    refused = [
        {"path": entry_name(entry), "reason": known.reasons[number]}
        for number, entry in zip(bad_S.tolist(), known.entries[bad_S], strict=True)
    ]
    order = {"test": 0, "val": 1}
    for group in known.copies():
        kept_N[group] = False
        several = list(known.entries[group])
        labels = sorted({entry.label for entry in several if entry.label})
        if len(labels) > 1:
            named = ", ".join(map(shortened, labels[:5])) + (" …" if len(labels) > 5 else "")
            reason = f"the same file stands under {len(labels)} labels: {named}"
            refused += [{"path": entry_name(entry), "reason": reason} for entry in several]
            continue
        first, *others = sorted(
            range(len(several)), key=lambda n: (order.get(several[n].split or "", 2), several[n].label is None)
        )
        kept_N[group[first]] = True
        reason = f"a copy of {entry_name(several[first])}"
        refused += [{"path": entry_name(several[n]), "reason": reason} for n in others]
    return np.flatnonzero(kept_N), refused


@dataclass(frozen=True)
class Drawn:
    """(S,) the images of each split, in order. In train the first `num_labelled` keep their label and the others do
    not; `num_left_out` unlabelled ones are not used."""

    splits: dict[str, np.ndarray]
    num_labelled: int
    num_left_out: int


def draw(config: RunConfig, known: Decoded, kept_S: np.ndarray) -> Drawn:
    """Raises DataError if there are fewer labels than classes."""
    splits = draw_splits(config, known, kept_S)
    labelled_S = draw_labelled(config, known, splits["train"])
    train_S = np.concatenate([labelled_S, draw_unlabelled(config, known, splits["train"], labelled_S)])
    return Drawn(splits | {"train": train_S}, len(labelled_S), len(splits["train"]) - len(train_S))


def draw_splits(config: RunConfig, known: Decoded, kept_S: np.ndarray) -> dict[str, np.ndarray]:
    """The splits that the data names. If it names none, each class is split in seeded shares, by content."""
    entries, ids_S = known.entries, known.ids_N[kept_S]
    has_val, has_test = (bool(entries.in_split(split).any()) for split in ("val", "test"))
    # A test split is drawn only if the data names no split at all.
    test_share = 0.0 if has_val or has_test else config.images.test_share
    val_share = 0.0 if has_val else config.images.val_share
    is_open_N = entries.in_split(None) if has_val else entries.in_split(None, "train")
    to_share = np.flatnonzero((is_open_N & entries.is_labelled)[kept_S])
    label = entries.label_N[kept_S[to_share]]
    by_class = np.lexsort((seeded_ranks(config.seed, "split", ids_S[to_share]), label))
    split_S = np.maximum(entries.split_N[kept_S], SPLITS.index("train"))
    for group in np.split(to_share[by_class], np.flatnonzero(np.diff(label[by_class])) + 1):
        num_test = _share_of(len(group), test_share, spare=2 if val_share else 1)
        num_val = _share_of(len(group) - num_test, val_share, spare=1)
        split_S[group] = SPLITS.index("train")
        split_S[group[:num_test]] = SPLITS.index("test")
        split_S[group[num_test : num_test + num_val]] = SPLITS.index("val")
    order = np.argsort(seeded_ranks(config.seed, "order", ids_S), kind="stable")
    return {split: kept_S[order[split_S[order] == number]] for number, split in enumerate(SPLITS)}


def _share_of(count: int, share: float, spare: int) -> int:
    """At least one if a share is asked for, while `spare` images are left over."""
    return min(max(round(count * share), 1), max(count - spare, 0)) if share else 0


def draw_labelled(config: RunConfig, known: Decoded, train_S: np.ndarray) -> np.ndarray:
    """(S,) train images that keep their label: all, or `images.num_labelled` of them, each class in proportion."""
    labelled_S = train_S[known.entries.is_labelled[train_S]]
    label_S = known.entries.label_N[labelled_S]
    counts_C = np.bincount(label_S, minlength=len(known.entries.labels))
    wanted = config.images.num_labelled
    if wanted is None or wanted >= len(labelled_S):
        return labelled_S
    if wanted < len(counts_C):
        raise DataError(
            f"images.num_labelled={wanted} is fewer than the {len(counts_C)} classes; give each at least one"
        )
    order = np.lexsort((seeded_ranks(config.seed, "label", known.ids_N[labelled_S]), label_S))
    place_S = np.arange(len(order)) - (np.cumsum(counts_C) - counts_C)[label_S[order]]
    kept = order[place_S < np.array(_in_proportion(counts_C.tolist(), wanted))[label_S[order]]]
    return labelled_S[np.sort(kept)]


def _in_proportion(counts: Sequence[int], wanted: int) -> list[int]:
    """At least one of each class."""
    total = sum(counts)
    exact = [max(1.0, wanted * count / total) for count in counts]
    kept = [int(value) for value in exact]
    # Largest remainders first, until the number is met; then, if the minimum of one exceeded it, largest classes first.
    order = sorted(range(len(kept)), key=lambda number: kept[number] - exact[number])
    for step in range(wanted - sum(kept)):
        kept[order[step % len(order)]] += 1
    largest = [(-count, number) for number, count in enumerate(kept)]
    heapq.heapify(largest)
    for _ in range(sum(kept) - wanted):
        count, number = largest[0]
        kept[number] -= 1
        heapq.heapreplace(largest, (count + 1, number))
    return kept


def draw_unlabelled(config: RunConfig, known: Decoded, train_S: np.ndarray, labelled_S: np.ndarray) -> np.ndarray:
    """(S,) the other train images, of which `images.num_unlabelled` are used."""
    others_S, most = train_S[~np.isin(train_S, labelled_S)], config.images.num_unlabelled
    if most is None or most >= len(others_S):
        return others_S
    ranks_S = seeded_ranks(config.seed, "pool", known.ids_N[others_S])
    return others_S[np.sort(np.argsort(ranks_S, kind="stable")[:most])]


def lacking_classes(entries: Entries, splits: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """Classes with too few images in a split, by what they lack."""
    counts = {split: entries[members_S].label_counts() for split, members_S in splits.items()}
    found = {"classes with a single train image": [c for c in entries.labels if counts["train"][c] == 1]}
    for split in ("val", "test"):
        if len(splits[split]):
            found[f"classes without a {split} image"] = [c for c in entries.labels if not counts[split][c]]
    return {what: names for what, names in found.items() if names}


def sample_set(config: RunConfig, path: str, known: Decoded, drawn: Drawn, num_refused: int) -> SampleSet:
    """The result of `prepare` in the directory `path`. A shard ends where the labelled images of a split do."""
    size, classes = config.images.rows_per_shard, known.entries.labels
    num_labelled, shards = dict[str, int](), dict[str, tuple[int, ...]]()
    ids, labels = dict[str, str](), dict[str, str]()
    for split, members_S in drawn.splits.items():
        total = len(members_S)
        count = num_labelled[split] = drawn.num_labelled if split == "train" else total
        starts = [*range(0, count, size), *range(count, total, size), total]
        shards[split] = tuple(end - first for first, end in pairwise(starts))
        named, others = known.ids_N[members_S[:count]], known.ids_N[members_S[count:]]
        # Soft targets line up with shards, so the ids tell too where the labelled ones end.
        border = [] if count in (0, total) else ["null"]
        ids[split] = _digest(chain(_in_json(named), border, _in_json(others)))
        numbers = chain(map(str, known.entries.label_N[members_S[:count]]), repeat("null"))
        pairs = map("[{}, {}]".format, chain(_in_json(named), _in_json(others)), numbers)
        labels[split] = _digest(chain([json.dumps(classes)], pairs))
    return SampleSet(
        path, classes, config.images.size, shards, num_labelled, num_refused, ids, labels, config.images.store
    )


def _in_json(ids_S: np.ndarray) -> Iterator[str]:
    for first in range(0, len(ids_S), _TOGETHER):
        names = ids_S[first : first + _TOGETHER].tobytes().hex()
        yield from (f'"{names[at : at + 32]}"' for at in range(0, len(names), 32))


def _digest(items: Iterator[str]) -> str:
    """Of a list in JSON, whose items are JSON already."""
    digest, comma = hashlib.sha256(b"["), ""
    while some := list(islice(items, _TOGETHER)):
        digest.update(f"{comma}{', '.join(some)}".encode())
        comma = ", "
    digest.update(b"]")
    return digest.hexdigest()[:16]

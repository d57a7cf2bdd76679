"""Which images are used, in which split each is, and which of them keep their labels."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from dataclasses import dataclass

from raydistill.config import RunConfig
from raydistill.data.sample import SPLITS, seeded_rank
from raydistill.data.sources.listing import Entry, Listing, entry_name
from raydistill.errors import DataError
from raydistill.escaping import shortened


@dataclass(frozen=True, slots=True)
class Decoded:
    """An entry with the id of its decoded image, or the reason why it has none."""

    entry: Entry
    id: str
    reason: str


def without_duplicates(known: list[Decoded]) -> tuple[list[Decoded], list[dict[str, str]]]:
    """One entry for each distinct file, and why the others are refused. Of copies, it keeps the one in test, then in
    val, then a labelled one. An image under two labels is refused."""
    refused = [{"path": entry_name(d.entry), "reason": d.reason} for d in known if d.reason]
    copies: dict[str, list[Decoded]] = defaultdict(list)
    for d in known:
        if not d.reason:
            copies[d.id].append(d)
    kept = []
    for group in copies.values():
        labels = sorted({d.entry.label for d in group if d.entry.label})
        if len(labels) > 1:
            named = ", ".join(map(shortened, labels[:5])) + (" …" if len(labels) > 5 else "")
            reason = f"the same file stands under {len(labels)} labels: {named}"
            refused += [{"path": entry_name(d.entry), "reason": reason} for d in group]
            continue
        order = {"test": 0, "val": 1}
        first, *others = sorted(group, key=lambda d: (order.get(d.entry.split or "", 2), d.entry.label is None))
        kept.append(first)
        refused += [{"path": entry_name(d.entry), "reason": f"a copy of {entry_name(first.entry)}"} for d in others]
    return kept, refused


@dataclass(frozen=True)
class Drawn:
    """The images of each split in order, in train those that keep their label first; the ids of these; and how many
    unlabelled train images are left out."""

    splits: dict[str, list[Decoded]]
    labelled: set[str]
    num_left_out: int


def draw(config: RunConfig, listing: Listing, kept: list[Decoded]) -> Drawn:
    """Raises DataError if there are fewer labels than classes."""
    splits = draw_splits(config, listing, kept)
    labelled = draw_labelled(config, listing, splits["train"])
    train = fewer_unlabelled(config, splits["train"], labelled)
    num_left_out = len(splits["train"]) - len(train)
    train.sort(key=lambda d: d.id not in labelled)
    return Drawn(splits | {"train": train}, labelled, num_left_out)


def draw_splits(config: RunConfig, listing: Listing, kept: list[Decoded]) -> dict[str, list[Decoded]]:
    """The splits that the data names. If it names none, each class is split in seeded shares, by content."""
    splits: dict[str, list[Decoded]] = {split: [] for split in SPLITS}
    to_share: dict[str, list[Decoded]] = defaultdict(list)
    has_val, has_test = listing.has_split("val"), listing.has_split("test")
    for d in kept:
        if d.entry.label and (d.entry.split is None or (d.entry.split == "train" and not has_val)):
            to_share[d.entry.label].append(d)
        else:
            splits[d.entry.split or "train"].append(d)
    # A test split is drawn only if the data names no split at all.
    test_share = 0.0 if has_val or has_test else config.images.test_share
    val_share = 0.0 if has_val else config.images.val_share
    for group in to_share.values():
        group.sort(key=lambda d: seeded_rank(config.seed, "split", d.id))
        num_test = _share_of(len(group), test_share, spare=2 if val_share else 1)
        num_val = _share_of(len(group) - num_test, val_share, spare=1)
        splits["test"] += group[:num_test]
        splits["val"] += group[num_test : num_test + num_val]
        splits["train"] += group[num_test + num_val :]
    for rows in splits.values():
        rows.sort(key=lambda d: seeded_rank(config.seed, "order", d.id))
    return splits


def _share_of(count: int, share: float, spare: int) -> int:
    """At least one if a share is asked for, while `spare` images are left over."""
    return min(max(round(count * share), 1), max(count - spare, 0)) if share else 0


def draw_labelled(config: RunConfig, listing: Listing, train: list[Decoded]) -> set[str]:
    """Ids of train samples that keep their label: all, or `images.num_labelled` of them, each class in proportion."""
    by_class: dict[str, list[str]] = {name: [] for name in listing.classes}
    for d in train:
        if d.entry.label:
            by_class[d.entry.label].append(d.id)
    wanted, total = config.images.num_labelled, sum(map(len, by_class.values()))
    if wanted is None or wanted >= total:
        return {i for ids in by_class.values() for i in ids}
    if wanted < len(by_class):
        raise DataError(
            f"images.num_labelled={wanted} is fewer than the {len(by_class)} classes; give each at least one"
        )
    exact = {name: max(1.0, wanted * len(ids) / total) for name, ids in by_class.items()}
    counts = {name: int(value) for name, value in exact.items()}
    # Largest remainders first, until the number is met; then, if the minimum of one exceeded it, largest classes first.
    order = sorted(exact, key=lambda name: counts[name] - exact[name])
    for step in range(wanted - sum(counts.values())):
        counts[order[step % len(order)]] += 1
    largest = [(-count, number, name) for number, (name, count) in enumerate(counts.items())]
    heapq.heapify(largest)
    for _ in range(sum(counts.values()) - wanted):
        count, number, name = largest[0]
        counts[name] -= 1
        heapq.heapreplace(largest, (count + 1, number, name))
    ranked = {n: sorted(ids, key=lambda i: seeded_rank(config.seed, "label", i)) for n, ids in by_class.items()}
    return {i for name, ids in ranked.items() for i in ids[: counts[name]]}


def lacking_classes(listing: Listing, splits: dict[str, list[Decoded]]) -> dict[str, list[str]]:
    """Classes with too few images in a split, by what they lack."""
    counts = {split: Counter(d.entry.label for d in members) for split, members in splits.items()}
    found = {"classes with a single train image": [c for c in listing.classes if counts["train"][c] == 1]}
    for split in ("val", "test"):
        if splits[split]:
            found[f"classes without a {split} image"] = [c for c in listing.classes if not counts[split][c]]
    return {what: names for what, names in found.items() if names}


def fewer_unlabelled(config: RunConfig, train: list[Decoded], labelled: set[str]) -> list[Decoded]:
    """Without the unlabelled samples beyond `images.num_unlabelled`."""
    most = config.images.num_unlabelled
    others = sorted((d.id for d in train if d.id not in labelled), key=lambda i: seeded_rank(config.seed, "pool", i))
    left_out = set() if most is None else set(others[most:])
    return [d for d in train if d.id not in left_out]

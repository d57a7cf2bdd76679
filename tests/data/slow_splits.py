"""The settling of duplicates, splits, labels and order again, slow and obvious: lists, one loop an image."""

from __future__ import annotations

from collections.abc import Sequence

from raydistill.config import RunConfig
from raydistill.data.sample import seeded_rank
from raydistill.data.sources.columns import Entry, entry_name

Shards = dict[str, list[list[tuple[int, int | None]]]]


def kept_one_by_one(entries: Sequence[Entry], ids: Sequence[str]) -> tuple[list[int], list[dict[str, str]]]:
    """The numbers of the entries that `prepare` keeps, and the rows of refused.json. An entry without an id cannot be
    used; one file is kept once, and not at all under two labels."""
    in_order = sorted(range(len(entries)), key=lambda n: (entries[n].path, entries[n].row or 0, n))
    refused = [{"path": entry_name(entries[n]), "reason": "not a picture"} for n in in_order if not ids[n]]
    kept, seen = [], set()
    for number in in_order:
        if not ids[number] or ids[number] in seen:
            continue
        seen.add(ids[number])
        same = [n for n in in_order if ids[n] == ids[number]]
        labels = sorted({entries[n].label for n in same} - {None})
        if len(labels) > 1:
            reason = f"the same file stands under {len(labels)} labels: {', '.join(labels)}"
            refused += [{"path": entry_name(entries[n]), "reason": reason} for n in same]
            continue
        place = {"test": 0, "val": 1}
        best, *others = sorted(same, key=lambda n: (place.get(entries[n].split, 2), entries[n].label is None))
        kept.append(best)
        reason = f"a copy of {entry_name(entries[best])}"
        refused += [{"path": entry_name(entries[n]), "reason": reason} for n in others]
    return kept, refused


def drawn_one_by_one(
    config: RunConfig, classes: Sequence[str], entries: Sequence[Entry], ids: Sequence[str], kept: Sequence[int]
) -> Shards:
    """For each split its shards, lists of (number of the entry, class number or None). Raises ValueError if there are
    fewer labels than classes."""
    images = config.images

    def ranked(numbers, purpose):
        return sorted(numbers, key=lambda n: seeded_rank(config.seed, purpose, ids[n]))

    def share(count, wanted, spare):
        return 0 if not wanted else min(max(round(count * wanted), 1), max(count - spare, 0))

    named = {e.split for e in entries}
    val_share = 0 if "val" in named else images.val_share
    test_share = 0 if named & {"val", "test"} else images.test_share
    split_of = {n: entries[n].split or "train" for n in kept}
    for name in classes:
        own = ranked(
            [n for n in kept if entries[n].label == name
             and (entries[n].split is None or (entries[n].split == "train" and "val" not in named))], "split"
        )  # fmt: skip
        num_test = share(len(own), test_share, 2 if val_share else 1)
        num_val = share(len(own) - num_test, val_share, 1)
        split_of |= {n: "test" if k < num_test else "val" if k < num_test + num_val else "train"
                     for k, n in enumerate(own)}  # fmt: skip
    of_split = {s: ranked([n for n in kept if split_of[n] == s], "order") for s in ("train", "val", "test")}

    by_class = {name: [n for n in of_split["train"] if entries[n].label == name] for name in classes}
    wanted, total = images.num_labelled, sum(map(len, by_class.values()))
    if wanted is None or wanted >= total:
        labelled = [n for n in of_split["train"] if entries[n].label]
    else:
        if wanted < len(classes):
            raise ValueError
        exact = {name: max(1.0, wanted * len(own) / total) for name, own in by_class.items()}
        counts = {name: int(value) for name, value in exact.items()}
        for k in range(wanted - sum(counts.values())):
            counts[sorted(exact, key=lambda name: int(exact[name]) - exact[name])[k % len(classes)]] += 1
        while sum(counts.values()) > wanted:
            counts[max(counts, key=counts.get)] -= 1
        labelled = [n for name, own in by_class.items() for n in ranked(own, "label")[: counts[name]]]
    others = [n for n in of_split["train"] if n not in labelled]
    used = others if images.num_unlabelled is None else ranked(others, "pool")[: images.num_unlabelled]

    number_of = {name: number for number, name in enumerate(classes)}
    rows = {s: [[(n, number_of[entries[n].label]) for n in of_split[s]]] for s in ("val", "test")}
    rows["train"] = [
        [(n, number_of[entries[n].label]) for n in of_split["train"] if n in labelled],
        [(n, None) for n in of_split["train"] if n in used],
    ]
    size = images.rows_per_shard
    return {s: [part[k : k + size] for part in parts for k in range(0, len(part), size)] for s, parts in rows.items()}

"""Entries as columns say what a list of entries says."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raydistill.data.sources.columns import Entries, Entry

# Half a character (of a name that is not UTF-8), and signs that UTF-16 would sort otherwise.
PATHS = st.text(st.sampled_from("aé/\udc80￿𝄞"), max_size=3)
ENTRIES = st.lists(
    st.builds(
        Entry, PATHS, st.none() | st.sampled_from("xyz"), st.sampled_from([None, "train", "val", "test"]),
        st.none() | st.integers(0, 2**40),
    )
)  # fmt: skip


@given(ENTRIES, st.randoms())
def test_columns_say_what_a_list_says(entries: list[Entry], random) -> None:
    columns = Entries.of(iter(entries))
    assert list(columns) == entries == [columns[number] for number in range(len(columns))]
    for which in (slice(1, None, 2), slice(-3, 5)):
        assert list(columns[which]) == entries[which]
    some = random.sample(range(len(entries)), len(entries) // 2)
    assert list(columns[np.array(some, int)]) == [entries[number] for number in some]
    for part, own in ((columns, entries), (columns[1::2], entries[1::2])):
        assert part.counts() == Counter((e.split, e.label) for e in own)
        assert part.label_counts() == Counter(e.label for e in own if e.label)
        assert list(part.distinct_paths()) == sorted({e.path for e in own})
        assert part.by_name().tolist() == sorted(
            range(len(own)), key=lambda n: (own[n].path, -1 if own[n].row is None else own[n].row)
        )
        assert part.in_split(None, "val").tolist() == [e.split in (None, "val") for e in own]
    first, end = sorted(random.choices(range(len(entries) + 1), k=2))
    assert columns.places(first, end) == [(n, entries[n].path, entries[n].row) for n in range(first, end)]


@given(ENTRIES)
def test_names_and_labels_may_become_the_same(entries: list[Entry]) -> None:
    found = Entries.of(entries).renamed(lambda path: path[:1]).relabelled({"x": "z"}, ("y", "w"))
    assert list(found) == [Entry(e.path[:1], "z" if e.label == "x" else e.label, e.split, e.row) for e in entries]
    assert found.labels[:2] == ("y", "w")
    assert list(found.distinct_paths()) == sorted({e.path[:1] for e in entries})

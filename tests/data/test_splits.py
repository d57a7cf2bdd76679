"""Which images keep their labels."""

from collections import Counter

import pytest

from raydistill.config import load_config
from raydistill.data.sources.listing import Entry, Listing
from raydistill.data.splits import Decoded, draw_labelled, without_duplicates


@pytest.mark.timeout(10)
def test_few_labels_for_very_many_classes_are_drawn_soon() -> None:
    small = [f"class {k}" for k in range(20_000)]
    train = [Decoded(Entry(f"{k}.png", label, None), f"{k}", "") for k, label in enumerate(small + ["large"] * 20_000)]
    listing = Listing((), (*small, "large"), {}, "")
    labelled = draw_labelled(load_config(["images.path=x", "images.num_labelled=20010"]), listing, train)
    counts = Counter(d.entry.label for d in train if d.id in labelled)
    assert counts == {**dict.fromkeys(small, 1), "large": 10}


def test_a_file_under_very_many_labels_has_a_short_reason():
    known = [Decoded(Entry("a.parquet", f"{k:04d}" * 500, None, k), "same", "") for k in range(1_000)]
    _, refused = without_duplicates(known)
    assert len(refused) == 1_000
    assert refused[0]["reason"].startswith("the same file stands under 1000 labels: 0000")
    assert max(len(row["reason"]) for row in refused) < 500

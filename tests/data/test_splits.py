"""Which images are used, in which split and order, and which keep their labels."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill.config import RunConfig, load_config
from raydistill.data.sample import seeded_rank, seeded_ranks
from raydistill.data.sources.columns import Entries, Entry
from raydistill.data.splits import Decoded, draw, draw_labelled, sample_set, without_duplicates
from raydistill.errors import DataError
from tests.data.slow_splits import drawn_one_by_one, kept_one_by_one

CLASSES = ("ant", "bee", "cat")


def file_id(number: int) -> str:
    return hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()


def decoded(entries: Sequence[Entry], ids: Sequence[str], classes: Sequence[str] = CLASSES) -> Decoded:
    """With an id for each usable file, and "" for the others."""
    reasons = {number: "not a picture" for number, i in enumerate(ids) if not i}
    columns = Entries.of(entries).relabelled({}, classes)
    return Decoded(columns, np.frombuffer(bytes.fromhex("".join(i or "0" * 32 for i in ids)), "S16"), reasons)


@st.composite
def data_sets(draw):
    """Rows of files in no order; several may be of one file, under one label or two, in one split or more."""
    splits = draw(st.sampled_from([[None], [None, "train"], ["train", "val"], [None, "train", "val", "test"]]))
    count = draw(st.integers(1, 40))
    rows = draw(st.permutations(range(count)))
    entries, ids = [], []
    for row in rows:
        split = draw(st.sampled_from(splits))
        labels = CLASSES if split in ("val", "test") else (*CLASSES, None)
        in_one = draw(st.booleans())
        path = "many.parquet" if in_one else f"{draw(st.sampled_from(['é', 'z', chr(0xDC80)]))}/{row}.png"
        entries.append(Entry(path, draw(st.sampled_from(labels)), split, row if in_one else None))
        ids.append(draw(st.sampled_from(["", *(file_id(k) for k in range(count))])))
    some = st.none() | st.integers(0, count)
    words = [f"seed={draw(st.integers(0, 3))}", f"images.val_share={draw(st.sampled_from([0, 0.1, 0.4]))}"]
    words += [f"images.test_share={draw(st.sampled_from([0, 0.2]))}", f"images.num_unlabelled={draw(some) or 'null'}"]
    words += [f"images.num_labelled={draw(some) or 'null'}", f"images.shard_size={draw(st.integers(1, 9))}"]
    return load_config(["images.path=x", *words]), entries, ids


def as_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@settings(max_examples=60)
@given(data_sets())
def test_splits_are_those_of_the_slow_and_obvious_way(made: tuple[RunConfig, list[Entry], list[str]]) -> None:
    config, entries, ids = made
    known = decoded(entries, ids)
    kept, refused = without_duplicates(known)
    names, expected_refused = kept_one_by_one(entries, ids)
    assert set(kept.tolist()) == set(names)
    assert refused == expected_refused
    try:
        expected = drawn_one_by_one(config, CLASSES, entries, ids, names)
    except ValueError:
        with pytest.raises(DataError, match="fewer than the 3 classes"):
            draw(config, known, kept)
        return
    drawn = draw(config, known, kept)
    samples, size = sample_set(config, "/w/prepare", known, drawn, len(refused)), config.images.shard_size
    for split, shards in expected.items():
        rows = [row for shard in shards for row in shard]
        assert drawn.splits[split].tolist() == [number for number, _ in rows]
        assert samples.shards[split] == tuple(map(len, shards))
        assert max(samples.shards[split], default=0) <= size
        assert samples.num_labelled[split] == sum(label is not None for _, label in rows)
        own = [ids[number] for number, _ in rows]
        border = samples.num_labelled[split]
        assert samples.ids[split] == as_json([*own[:border], *[None] * (0 < border < len(own)), *own[border:]])
        assert samples.labels[split] == as_json([CLASSES, *zip(own, (label for _, label in rows), strict=True)])


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=20), st.integers(-2, 2**40), st.text(max_size=5))
def test_ranks_of_many_are_those_of_each(ids: list[bytes], seed: int, purpose: str) -> None:
    ids = [*ids, bytes(16), b"\x01" + bytes(15), b"\xff" * 16]
    ranks = seeded_ranks(seed, purpose, np.array(ids, "S16"))
    each = [seeded_rank(seed, purpose, i.hex()) for i in ids]
    assert ranks.tobytes().hex() == "".join(each)
    assert np.argsort(ranks, kind="stable").tolist() == sorted(range(len(ids)), key=each.__getitem__)


@pytest.mark.timeout(10)
def test_few_labels_for_very_many_classes_are_drawn_soon() -> None:
    small = [f"class {k}" for k in range(20_000)]
    labels = small + ["large"] * 20_000
    train = [Entry(f"{k}.png", label, None) for k, label in enumerate(labels)]
    known = decoded(train, [file_id(k) for k in range(len(train))], (*small, "large"))
    config = load_config(["images.path=x", "images.num_labelled=20010"])
    labelled = draw_labelled(config, known, np.arange(len(train)))
    counts = Counter(labels[number] for number in labelled)
    assert counts == {**dict.fromkeys(small, 1), "large": 10}


def test_a_file_under_very_many_labels_has_a_short_reason() -> None:
    entries = [Entry("a.parquet", f"{k:04d}" * 500, None, k) for k in range(1_000)]
    kept, refused = without_duplicates(decoded(entries, [file_id(0)] * 1_000, ()))
    assert len(kept) == 0
    assert len(refused) == 1_000
    assert refused[0]["reason"].startswith("the same file stands under 1000 labels: 0000")
    assert max(len(row["reason"]) for row in refused) < 500

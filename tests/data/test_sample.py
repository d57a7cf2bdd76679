"""Shards come back as they were, ranks favour no image, and what does not fit is refused."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.data.sample import (
    SCHEMA,
    decode_shard,
    encode_shard,
    refuse_other_sizes,
    sample_id,
    samples_from_json,
    seeded_rank,
    working_images,
)
from raydistill.errors import CheckpointError

seeds = st.integers(0, 2**32 - 1)


def table_of(count: int) -> pa.Table:
    rows = [
        {"sample_id": sample_id(bytes([n])), "image": bytes([n]) * n, "label": n if n % 3 else None, "source": "real",
         "split": "train"} for n in range(count)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@pytest.mark.parametrize("count", [0, 1, 10])
def test_a_shard_comes_back_as_it_was(count):
    table = table_of(count)
    found = decode_shard(encode_shard(table))
    assert found.equals(table)
    assert found.schema.equals(SCHEMA)


@given(
    side=st.integers(1, 9), count=st.integers(0, 12), cut=st.integers(0, 12), parts=st.integers(1, 3), data=st.data(),
)  # fmt: skip
def test_images_come_back_to_the_pixel_from_slices_chunks_and_picked_rows(side, count, cut, parts, data):
    images = np.random.default_rng(count).integers(0, 256, (count, side, side, 3), np.uint8)
    rows = [
        {"sample_id": sample_id(bytes([n])), "image": image.tobytes(), "label": n, "source": "real", "split": "train"}
        for n, image in enumerate(images)
    ]
    table = decode_shard(encode_shard(pa.Table.from_pylist(rows, schema=SCHEMA)))
    np.testing.assert_array_equal(working_images(table, side), images)
    np.testing.assert_array_equal(working_images(table.slice(cut), side), images[cut:])
    chunked = pa.concat_tables([table] * parts)
    np.testing.assert_array_equal(working_images(chunked, side), np.concatenate([images] * parts))
    picked = data.draw(st.lists(st.integers(0, count - 1))) if count else []
    np.testing.assert_array_equal(working_images(table.take(pa.array(picked, pa.int64())), side), images[picked])


@pytest.mark.parametrize("other", [b"", bytes(3 * 16 - 1), bytes(3 * 25), b"\x89PNG of an older version"])
def test_an_image_of_another_size_is_named_with_its_file(other):
    table = table_of(3).set_column(1, SCHEMA.field("image"), pa.array([bytes(3 * 16), other, bytes(3 * 16)]))
    with pytest.raises(CheckpointError, match=r"^train-00000 is damaged \(an image is not 4 x 4 pixels\); delete it"):
        refuse_other_sizes(table, 4, "train-00000")


def test_columns_may_come_in_another_order_and_integer_size():
    table = table_of(5)
    mixed = pa.table({name: table[name] for name in reversed(SCHEMA.names)})
    mixed = mixed.set_column(mixed.schema.get_field_index("label"), "label", table["label"].cast(pa.int64()))
    assert decode_shard(encode_shard(mixed)).equals(table)


@pytest.mark.parametrize(
    ("column", "values"),
    [("label", ["cat"] * 5), ("label", [2**40] * 5), ("image", [[0, 255]] * 5), ("source", [None] * 5)],
)
def test_a_column_that_does_not_fit_is_refused(column, values):
    table = table_of(5)
    with pytest.raises((pa.ArrowException, ValueError)):
        encode_shard(table.set_column(table.schema.get_field_index(column), column, pa.array(values)))


def test_equal_rows_give_equal_bytes():
    assert encode_shard(table_of(9)) == encode_shard(table_of(9))


@given(names=st.lists(st.text(max_size=8), min_size=2, max_size=30, unique=True), seed=seeds, gone=st.integers(0, 29))
def test_a_rank_does_not_change_when_other_images_come_or_go(names, seed, gone):
    order = sorted(names, key=lambda name: seeded_rank(seed, "split", name))
    left = [name for n, name in enumerate(names) if n != gone % len(names)]
    again = sorted(left, key=lambda name: seeded_rank(seed, "split", name))
    assert again == [name for name in order if name in left]


def test_ranks_differ_by_seed_and_purpose_and_favour_no_image():
    names = [str(n) for n in range(200)]
    kinds = itertools.product(range(40), ("split", "order", "label"))
    orders = [tuple(sorted(names, key=lambda name: seeded_rank(*kind, name))) for kind in kinds]
    assert len(set(orders)) == len(orders)
    places = np.mean([[order.index(name) for name in names] for order in orders], axis=0)
    # The mean of 120 uniform places scatters by 200 / sqrt(12 * 120) = 5.3.
    assert np.abs(places - 99.5).max() < 5 * 5.3


def test_samples_survive_the_trip_through_json():
    done = {
        "path": "/w/prepare-1", "classes": ["10", "2", "café", "a b"], "size": 32,
        "shards": {"train": [4, 3], "val": [2], "test": []}, "num_labelled": {"train": 5, "val": 2, "test": 0},
        "num_refused": 1, "ids": {"train": "a", "val": "b", "test": "c"},
        "labels": {"train": "d", "val": "e", "test": "f"},
    }  # fmt: skip
    samples = samples_from_json(done)
    assert samples.classes == ("10", "2", "café", "a b")
    assert [samples.num_rows(split) for split in ("train", "val", "test", "elsewhere")] == [7, 2, 0, 0]

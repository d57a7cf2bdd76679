"""Tables of strangers: nothing in them runs, whatever was imported before, and what is no plain column is refused."""

import base64
import contextlib
import errno
import math
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather
from pyarrow import parquet as pq
from pyarrow.parquet import encryption

from raydistill.data.sources.containers import count_rows, list_rows, next_part, read_rows
from raydistill.errors import CheckpointError, DataError
from raydistill.storage import filesystems
from raydistill.storage.tables import arrow_headers, open_table, parquet_headers, read_table, rows_of
from raydistill.storage.tables import values as values_of
from tests.image_files import write_table


class Payload:
    """What a stranger pickles: loading it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return open, (self.marker, "w")


class Pickled(pa.ExtensionType):
    """As Ray's own: the type and each value are loaded by pickle."""

    def __init__(self, marker: str = "") -> None:
        self.marker = marker
        super().__init__(pa.binary(), "tests.pickled")

    def __arrow_ext_serialize__(self) -> bytes:
        return pickle.dumps(Payload(Path(self.marker)))

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> "Pickled":
        pickle.loads(serialized)
        return cls()


@pytest.fixture
def registered():
    pa.register_extension_type(Pickled())
    yield
    pa.unregister_extension_type("tests.pickled")


@pytest.mark.parametrize("column", ["image", "label", "split", "other"])
@pytest.mark.parametrize("name", ["t.parquet", "file.arrow", "stream.arrow", "file.feather"])
@pytest.mark.parametrize("nested", [False, True])
def test_an_extension_type_is_refused_before_anything_is_made_of_it(tmp_path, registered, column, name, nested):
    marker = tmp_path / "ran"
    values = pa.ExtensionArray.from_storage(Pickled(str(marker)), pa.array([b"1", b"2"]))
    plain = {"image": [b"1", b"2"], "label": ["a", "b"], "split": ["train", "val"]}
    made = pa.StructArray.from_arrays([values], names=["bytes"]) if nested else values
    where = f"{column}.bytes" if nested else column
    path = write_table(tmp_path / name, pa.table({**plain, column: made}))
    for read in (lambda: open_table(str(path)).__enter__(), lambda: count_rows(str(path))):
        with pytest.raises(DataError, match=f"^.*{name}: the column {where} is of the extension type tests.pickled.*$"):
            read()
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("column", ["image", "label", "split"])
@pytest.mark.parametrize("first", ["ray.data", "raydistill.stages.prepare"])
def test_rays_pickled_objects_do_not_run(tmp_path, column, first):
    code = f"""
import sys, pickle, pyarrow as pa, pyarrow.parquet as pq
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType
class P:
    def __reduce__(self): return open, ({str(tmp_path / "ran")!r}, "w")
made = pa.ExtensionArray.from_storage(ArrowPythonObjectType(), pa.array([pickle.dumps(P())] * 2, pa.large_binary()))
table = {{"image": [b"1", b"2"], "label": ["a", "b"], "split": ["train", "train"], {column!r}: made}}
pq.write_table(pa.table(table), {str(tmp_path / "t.parquet")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
    code = f"""
import {first}
from raydistill.config import Images
from raydistill.data.sources.listing import list_images
list_images(Images(path={str(tmp_path / "t.parquet")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert f"the column {column} is of the extension type ray.data" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_offsets_that_point_elsewhere_are_refused(tmp_path):
    """Read as they are, they show what else is in the process's memory as a class's name, or end it."""
    column = pa.array(["a" * 8, "b" * 8] * 15)
    path = write_table(tmp_path / "t.arrow", pa.table({"image": [b"1"] * 30, "label": column}))
    good = column.buffers()[1].to_pybytes()[:124]
    bad = np.frombuffer(good, np.int32).copy()
    bad[30] += 4096
    whole = path.read_bytes()
    assert good in whole
    path.write_bytes(whole.replace(good, bad.tobytes()))
    with pytest.raises(DataError, match="damaged"):
        list(list_rows(str(path), Counter(), Counter()))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (pa.array(["img/1.png", "img/2.png"]), "holds string.*for paths make a .csv"),
        (pa.array([[1, 2], [3]], pa.list_(pa.uint8())), "holds list<.*encode each picture"),
        (pa.array([1, 2]), "holds int64"),
        (pa.array([{"path": "a"}, {"path": "b"}]), "holds struct<"),
    ],
)
def test_an_image_column_of_another_type_is_refused_with_the_way_out(tmp_path, image, reason):
    path = write_table(tmp_path / "t.parquet", pa.table({"image": image, "label": ["a", "b"]}))
    with pytest.raises(DataError, match=reason):
        count_rows(str(path))


def test_names_that_count_upwards_are_no_bomb_however_few_bytes_they_take(tmp_path):
    names = pa.table({"image": [f"folder/{k}.jpg" for k in range(100_000)], "label": ["cat"] * 100_000})
    pq.write_table(names, tmp_path / "t.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "t.parquet").stat().st_size < 50_000
    with pytest.raises(DataError, match=r"for paths make a \.csv"):
        count_rows(str(tmp_path / "t.parquet"))


def test_columns_of_one_name_and_old_feather_are_refused(tmp_path):
    twice = pa.Table.from_arrays([pa.array([b"1"]), pa.array(["a"]), pa.array(["b"])], ["image", "label", "label"])
    with pytest.raises(DataError, match="several columns label"):
        count_rows(str(write_table(tmp_path / "t.parquet", twice)))
    (tmp_path / "t.feather").write_bytes(b"FEA1" + bytes(64))
    with pytest.raises(DataError, match="feather's first version"):
        count_rows(str(tmp_path / "t.feather"))
    feather.write_feather(pa.table({"image": [b"1", b"2"]}), tmp_path / "t.feather", compression="zstd")
    assert count_rows(str(tmp_path / "t.feather")) == 2


@pytest.mark.parametrize("column", ["image", "label", "split"])
def test_a_column_of_a_few_bytes_that_unpacks_to_many_is_refused_by_its_headers(tmp_path, column):
    few = {"image": pa.array([b"x"] * 40), "label": pa.array(["a", "b"] * 20), "split": pa.array(["train"] * 40)}
    few[column] = pa.array([b"x" * (4 << 20)] * 40, pa.binary()).cast(pa.binary() if column == "image" else pa.string())
    pq.write_table(pa.table(few), tmp_path / "t.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "t.parquet").stat().st_size < 100_000
    with pytest.raises(DataError, match=f"t.parquet: .*the column {column}, unpacks to .*: a decompression bomb"):
        list(list_rows(str(tmp_path / "t.parquet"), Counter(), Counter()))


@pytest.mark.parametrize("column", ["image", "label"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_many_parts_that_each_unpack_to_few_bytes_are_refused_by_what_they_unpack_to_in_all(tmp_path, suffix, column):
    """Row groups and batches: one of them may always unpack to 64 MiB."""
    few = {"image": pa.array([b"x"] * 2), "label": pa.array(["a", "b"])}
    large = pa.array(["x" * (20 << 20 if column == "image" else 60_000)] * 2)
    table = pa.table({**few, column: large.cast(few[column].type)})
    file, many = tmp_path / f"t.{suffix}", 4 if column == "image" else 700
    if suffix == "parquet":
        with pq.ParquetWriter(file, table.schema, compression="zstd", use_dictionary=False) as writer:
            for _ in range(many):
                writer.write_table(table)
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(file, table.schema, options=options) as stream:
            for _ in range(many):
                stream.write_table(table)
    with pytest.raises(DataError, match=f"t.{suffix}: .*unpacks? to .*: a decompression bomb"):
        list(list_rows(str(file), Counter(), Counter()))


def test_a_batch_that_every_process_would_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("raydistill.storage.tables.arrow._MOST_OF_A_BATCH", 100_000)
    table = pa.table({"image": [bytes(1000)] * 200, "label": ["a", "b"] * 100})
    feather.write_feather(table, tmp_path / "t.feather", compression="uncompressed")
    with pytest.raises(DataError, match=r"t.feather: a batch of 2.*, above 100,000; write smaller batches"):
        count_rows(str(tmp_path / "t.feather"))
    feather.write_feather(table, tmp_path / "t.feather", compression="uncompressed", chunksize=50)
    assert count_rows(str(tmp_path / "t.feather")) == 200


TEXT = "x" * 60_000
SHARED = {
    "dictionary": lambda n: pa.DictionaryArray.from_arrays(pa.array([0] * n, pa.int32()), pa.array([TEXT])),
    "view": lambda n: pa.Array.from_buffers(pa.string_view(), n, [
        None, pa.py_buffer(struct.pack("<i4sii", 60_000, b"xxxx", 0, 0) * n), pa.py_buffer(TEXT.encode()),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("column", ["label", "split"])
@pytest.mark.parametrize("kind", SHARED)
def test_rows_that_share_a_text_do_not_have_a_copy_each(tmp_path, kind, column):
    columns = {"image": pa.array([b""] * 1_000), "label": pa.array(["a"] * 1_000)} | {column: SHARED[kind](1_000)}
    path = write_table(tmp_path / "t.arrow", pa.table(columns))
    tracemalloc.start()
    rows = [(row.label, None) for row in list_rows(str(path), Counter(), Counter())]
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 1_000
    assert held < 45e6, held  # of 60 MB


@pytest.mark.parametrize("column", ["label", "split"])
def test_a_mapping_is_refused_by_its_type(tmp_path, column):
    inner = pa.StructArray.from_arrays([SHARED["dictionary"](2_000)], ["a"], mask=pa.array([True] + [False] * 1_999))
    columns = {"image": pa.array([b""] * 2_000), "label": pa.array(["a"] * 2_000)} | {column: inner}
    path = write_table(tmp_path / "t.arrow", pa.table(columns))
    tracemalloc.start()
    with pytest.raises(DataError, match=f"t.arrow: row 1: the {column} is a mapping"):
        list(list_rows(str(path), Counter(), Counter()))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 5e6, held


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "file.arrow"])
def test_one_long_label_that_many_rows_share_is_refused_before_they_have_it(tmp_path, name):
    label = pa.array(["x" * (4 << 20)]).dictionary_encode()
    labels = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), label.dictionary)
    path = write_table(tmp_path / name, pa.table({"image": pa.array([b""] * 5000), "label": labels}))
    with pytest.raises(DataError, match=rf"{name}: the column label holds 4,194,304 bytes in one row"):
        list(list_rows(str(path), Counter(), Counter()))  # 20 GB, if each had its own


def write_batches(path: Path, dictionaries: list[pa.Array], count: int, **options: Any) -> Path:
    """Batches of a row, whose labels are the first word of each dictionary in turn."""
    labels = [pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), words) for words in dictionaries]
    batches = [pa.record_batch({"image": [b"1"], "label": own}) for own in labels]
    new = pa.ipc.new_file if path.name.startswith("file") else pa.ipc.new_stream
    with new(path, batches[0].schema, options=pa.ipc.IpcWriteOptions(compression="zstd", **options)) as writer:
        for k in range(count):
            writer.write_batch(batches[k % len(batches)])
    return path


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow"])
def test_a_large_dictionary_that_very_many_batches_share_is_refused(tmp_path, name):
    words = pa.array(["a", "b"] + [""] * 2_000_000)
    path = write_batches(tmp_path / name, [words], 100)
    with pytest.raises(DataError, match=rf"{name}: what its batches hold, each with all dictionaries, unpacks to"):
        count_rows(str(path))
    assert [row.label for row in list_rows(str(write_batches(path, [words], 5)), Counter(), Counter())] == ["a"] * 5


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow"])
def test_a_dictionary_that_grows_with_each_batch_counts_each_time(tmp_path, name):
    words = pa.array(["a"] + [""] * 2_000_000)
    growing = [pa.concat_arrays([words, pa.array(["b"] * k, pa.string())]) for k in range(20)]
    path = write_batches(tmp_path / name, growing, 20, emit_dictionary_deltas=True)
    assert path.stat().st_size < 50_000
    with pytest.raises(DataError, match=rf"{name}: what its batches hold, each with all dictionaries, unpacks to"):
        count_rows(str(path))
    few = [pa.array(["a", "b"]), pa.array(["a", "b", "c"])]
    path = write_batches(path, few, 2, emit_dictionary_deltas=True)
    assert [row.label for row in list_rows(str(path), Counter(), Counter())] == ["a", "a"]


def test_each_dictionary_of_a_stream_is_looked_at_and_each_batchs_indices(tmp_path):
    damaged = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 1)), pa.py_buffer(b"\xff")]
    )
    path = write_batches(tmp_path / "t.arrow", [pa.array(["a"]), damaged], 2)
    with pytest.raises(DataError, match=r"t\.arrow: .*[Ii]nvalid UTF"):
        list(list_rows(str(path), Counter(), Counter()))
    good, none = (pa.DictionaryArray.from_arrays(pa.array([k], pa.int32()), ["a"], safe=False) for k in (0, 9))
    with pa.ipc.new_stream(path, pa.schema({"image": pa.binary(), "label": good.type})) as writer:
        for label in (good, good, none):
            writer.write_batch(pa.record_batch({"image": [b"1"], "label": label}))
    with pytest.raises(DataError, match=r"t\.arrow: .*out of bounds"):
        list(list_rows(str(path), Counter(), Counter()))


def test_compression_that_the_sizes_do_not_tell_of_is_refused(tmp_path):
    batch = pa.record_batch({"image": [b"1"], "label": ["a"]})
    with pa.ipc.new_stream(tmp_path / "t.arrow", batch.schema) as writer:
        writer.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "zstd"})
    with pytest.raises(DataError, match=r"t\.arrow: .*compressed as Arrow 0\.17 did"):
        count_rows(str(tmp_path / "t.arrow"))


@pytest.mark.timeout(10)
def test_a_block_that_a_footer_names_very_often_is_refused(tmp_path):
    table = pa.table({"image": [b"1", b"2"], "label": ["a", "b"]})
    whole = (path := write_table(tmp_path / "file.arrow", table, 1)).read_bytes()
    footer = whole[-10 - int.from_bytes(whole[-10:-6], "little") : -10]
    assert count_rows(str(path)) == 2
    root = arrow_headers._indirect(footer, 0)
    places = list(arrow_headers._vector(footer, root, 3, 24))
    count = 250_000
    vector = struct.pack("<I", count) + footer[places[0] : places[0] + 24] * count
    field = arrow_headers._field(footer, root, 3)
    moved = bytearray(footer + bytes(-(len(footer) + 4) % 8))
    struct.pack_into("<I", moved, field, len(moved) - field)
    body = whole[: -10 - len(footer)]
    path.write_bytes(body + moved + vector + (len(moved) + len(vector)).to_bytes(4, "little") + b"ARROW1")
    with pytest.raises(DataError, match=r"file\.arrow: .*its blocks overlap"):
        count_rows(str(path))


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow"])
@pytest.mark.parametrize("is_struct", [False, True])
def test_rows_that_share_the_bytes_of_one_picture_are_counted(tmp_path, name, is_struct):
    def views(count: int) -> pa.Array:
        view = np.array([1 << 20, 0, 0, 0], np.int32)
        shared = [None, pa.py_buffer(np.tile(view, count)), pa.py_buffer(bytes(1 << 20))]
        images = pa.Array.from_buffers(pa.binary_view(), count, shared)
        return pa.StructArray.from_arrays([images], ["bytes"]) if is_struct else images

    for count in (40, 400):
        path = write_table(tmp_path / name, pa.table({"image": views(count), "label": ["a"] * count}))
        assert count_rows(str(path)) == count
        if count == 40:
            assert sum(len(data) for _, data in read_rows(str(path), range(count))) == 40 << 20
        else:
            with pytest.raises(
                DataError, match=rf"{name}: what the rows of a batch share unpacks to 419,430,400 bytes"
            ):
                list(read_rows(str(path), [0]))


@pytest.mark.parametrize("name", ["t.parquet", "file.arrow", "stream.arrow"])
@pytest.mark.parametrize("shape", ["struct", "list", "map"])
def test_an_extension_type_is_found_at_every_depth(tmp_path, registered, name, shape):
    marker = tmp_path / "ran"
    values = pa.ExtensionArray.from_storage(Pickled(str(marker)), pa.array([b"1", b"2"]))
    made = {
        "struct": lambda: pa.StructArray.from_arrays([pa.StructArray.from_arrays([values], ["a"])], ["b"]),
        "list": lambda: pa.ListArray.from_arrays([0, 1, 2], values),
        "map": lambda: pa.MapArray.from_arrays([0, 1, 2], ["x", "y"], values),
    }[shape]()
    path = write_table(tmp_path / name, pa.table({"image": [b"1", b"2"], "other": made}))
    with pytest.raises(DataError, match=r"the column other\..* is of the extension type tests"):
        count_rows(str(path))
    assert not marker.exists()


def test_a_file_of_ours_holds_what_ours_hold_and_nothing_that_runs(tmp_path, registered):
    schema = pa.schema([("id", pa.string()), ("n", pa.int32())])
    good = pa.table({"id": ["a", "b"], "n": pa.array([1, None], pa.int32()), "more": [[1], [2]]})
    path = str(write_table(tmp_path / "t.parquet", good))
    assert rows_of(read_table(path, schema)) == [{"id": "a", "n": 1}, {"id": "b", "n": None}]
    marker = tmp_path / "ran"
    pickled = pa.ExtensionArray.from_storage(Pickled(str(marker)), pa.array([b"1", b"2"]))
    for at, column in ((0, pickled), (2, pickled), (1, pa.array(["1", "2"])), (0, pa.array([1, 2]))):
        write_table(tmp_path / "t.parquet", good.set_column(at, good.schema.names[at], column))
        with pytest.raises(CheckpointError, match=r"t\.parquet is damaged \(.*(id|more|n)\b.*delete it and .*DONE"):
            read_table(path, schema)
    write_table(tmp_path / "t.parquet", good.drop_columns("n"))
    with pytest.raises(CheckpointError, match="no column n of the type int32"):
        read_table(path, schema)
    with pytest.raises(FileNotFoundError):
        read_table(str(tmp_path / "none.parquet"), schema)
    with pytest.raises(DataError, match="may be code"):
        values_of(pickled)
    assert not marker.exists()


def test_an_encrypted_file_is_called_so(tmp_path):
    class Kms(encryption.KmsClient):
        def __init__(self, _: object) -> None:
            super().__init__()

        def wrap_key(self, key: bytes, _: str) -> bytes:
            return base64.b64encode(key)

    factory, connection = encryption.CryptoFactory(Kms), encryption.KmsConnectionConfig()
    table = pa.table({"image": [b"1", b"2"], "label": ["a", "b"]})
    for is_plain in (True, False):
        settings = encryption.EncryptionConfiguration("key", column_keys={"key": ["label"]}, plaintext_footer=is_plain)
        keys = factory.file_encryption_properties(connection, settings)
        pq.write_table(table, tmp_path / "t.parquet", encryption_properties=keys)
        with pytest.raises(DataError, match=r"t\.parquet: .*encrypted"):
            list(list_rows(str(tmp_path / "t.parquet"), Counter(), Counter()))


def test_a_decimal_of_no_such_scale_is_refused(tmp_path):
    """Arrow's own message names a class of Python's."""
    kind = pa.decimal128(5, 2_000_000_000)
    label = pa.Array.from_buffers(kind, 2, pa.array([1, 2], pa.decimal128(5, 0)).buffers())
    path = write_table(tmp_path / "t.arrow", pa.table({"image": [b"1", b"2"], "label": label}))
    with pytest.raises(DataError, match="the column label holds decimal128"):
        list(list_rows(str(path), Counter(), Counter()))


def test_very_many_columns_are_read_or_refused_soon(tmp_path):
    names = ["image", "label", *map(str, range(50_000))]
    table = pa.Table.from_arrays([pa.array([b"1"]), *[pa.array(["a"])] * 50_001], names)
    assert count_rows(str(write_table(tmp_path / "t.arrow", table))) == 1
    (tmp_path / "t.parquet").write_bytes(b"PAR1" + bytes(17 << 20) + (17 << 20).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(DataError, match="a footer of 17,825,792 bytes"):
        count_rows(str(tmp_path / "t.parquet"))


def test_columns_nested_without_end_are_refused_before_arrow_follows_them(tmp_path):
    """20,000 levels, which Arrow's reader follows to its stack's end: SIGSEGV."""
    name, group = b"\x18\x01a", b"\x35\x02"  # thrift: a name, an optional element
    inner = [group + name + b"\x15\x02\x00"] * 20_000
    elements = [b"\x48\x01s\x15\x02\x00", *inner, b"\x15\x02\x25\x02" + name + b"\0"]
    count = bytes([0xFC, len(elements) & 127 | 128, len(elements) >> 7 & 127 | 128, len(elements) >> 14])
    footer = b"\x15\x02\x19" + count + b"".join(elements) + b"\x16\x00\x19\x0c\x00"
    (tmp_path / "t.parquet").write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    code = f"from raydistill.data.sources.containers import count_rows; count_rows({str(tmp_path / 't.parquet')!r})"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert "nested more than 64 levels deep" in done.stderr


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("footer", "most_megabytes"),
    [
        (b"\x15\x02\x49\xf7" + b"\xff" * 8 + b"\x7f\x00", 1),  # a list of 2^63 - 1 doubles, of which none is there
        (b"\x15\x02\x49\xfc\x80\x80\x10" + bytes(1 << 18) + b"\0", 2),  # empty structs, a byte each
        (b"\x15\x02\x19\xfc\x80\x80\x10" + bytes(1 << 18) + b"\0", 2),  # as columns
        (b"\x15\x02\x39\xfc\x80\x80\x10" + bytes(1 << 18) + b"\0", 2),  # as row groups
    ],
    ids=["doubles", "others", "columns", "row groups"],
)
def test_a_footer_takes_no_more_than_it_has(footer, most_megabytes):
    tracemalloc.start()
    with contextlib.suppress(ValueError, EOFError, LookupError):
        parquet_headers.footer(footer)
    assert tracemalloc.get_traced_memory()[1] < most_megabytes << 20
    tracemalloc.stop()


BIG, NOISE = b"x" * (4 << 20), np.random.default_rng(0).bytes(4 << 20)


def bombs(folder: Path) -> None:
    labels = pa.array(["a", "b"] * 32)
    big = pa.table({"image": pa.array([BIG] * 64), "label": labels})
    for codec in ("gzip", "zstd", "brotli", "snappy"):
        pq.write_table(big, folder / f"{codec}.parquet", compression=codec, use_dictionary=False)
    paged = {"use_dictionary": False, "data_page_size": 1 << 20, "write_batch_size": 1}
    pq.write_table(big, folder / "pages.parquet", compression="zstd", **paged)
    struct = pa.table({"image": pa.array([{"bytes": BIG, "path": "x"}] * 64), "label": labels})
    pq.write_table(struct, folder / "struct.parquet", compression="zstd", use_dictionary=False)
    long = pa.table({"image": pa.array([b"x"] * 64), "label": pa.array([BIG.decode()] * 64, pa.large_string())})
    pq.write_table(long, folder / "label.parquet", compression="zstd", use_dictionary=False)
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([NOISE]))
    same = pa.table({"image": one, "label": pa.array(["a", "b"] * 500)})
    pq.write_table(same, folder / "dictionary.parquet", dictionary_pagesize_limit=64 << 20)
    delta = {"use_dictionary": False, "column_encoding": {"image": "DELTA_BYTE_ARRAY"}}
    pq.write_table(pa.table({"image": [BIG] * 64, "label": labels}), folder / "delta.parquet", **delta)
    nulls = pa.table({"image": pa.nulls(10**7, pa.binary()), "label": pa.nulls(10**7, pa.string())})
    pq.write_table(nulls, folder / "nulls.parquet", row_group_size=10**7)
    for codec in ("lz4", "zstd"):
        write_table(folder / f"{codec}.arrow", big, compression=codec)
        write_table(folder / f"file-{codec}.arrow", long, compression=codec)
    ends = pa.RunEndEncodedArray.from_arrays(pa.array([2 * 10**9], pa.int32()), pa.array(["a"]))
    write_table(folder / "ends.arrow", pa.table({"image": pa.nulls(2 * 10**9), "label": ends}))
    # Two good ones: large pictures in one row group, and one that is compressed as much as pictures are.
    rng = np.random.default_rng(1)
    large = pa.table({"image": [rng.bytes(400_000) for _ in range(800)], "label": ["a", "b"] * 400})
    pq.write_table(large, folder / "good.parquet", row_group_size=10_000)


READ_ALL = """
import resource, sys
from collections import Counter
from raydistill.data.sources.containers import list_rows, read_rows
from raydistill.errors import CheckpointError, DataError
import ray.data, raydistill.stages.prepare
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        listed = sum(1 for _ in list_rows(path, Counter(), Counter()))
        print(path.rpartition("/")[2], listed, sum(1 for _ in read_rows(path, range(listed))))
    except DataError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_few_bytes_take_little_memory_and_good_files_are_read_in_parts(tmp_path):
    bombs(tmp_path)
    paths = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run([sys.executable, "-c", READ_ALL, *paths], env=os.environ, capture_output=True, text=True)
    *lines, megabytes = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert int(megabytes) < 400, done.stdout
    read = {line for line in lines if "a decompression bomb" not in line}
    assert read == {"good.parquet 800 800", "dictionary.parquet 1000 1000", "delta.parquet 64 64"}, done.stdout


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "tar"])
def test_what_the_system_says_of_a_file_is_no_damage(tmp_path, monkeypatch, suffix):
    path = str(tmp_path / f"set.{suffix}")

    def fails(number: int) -> Callable:
        def opened(*arguments: object, **options: object) -> None:
            raise OSError(number, os.strerror(number), path)

        return opened

    monkeypatch.setattr(filesystems, "open_file", fails(errno.EACCES))
    with pytest.raises(DataError, match=r"set\.\w+: cannot be read: Permission denied$"):
        count_rows(path)
    monkeypatch.setattr(filesystems, "open_file", fails(errno.EMFILE))
    with pytest.raises(OSError, match="Too many open files"):
        count_rows(path)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ["t.parquet", "file.arrow", "stream.arrow", "dictionaries.arrow"])
def test_a_file_of_many_parts_is_read_part_by_part_as_soon_as_at_once(tmp_path, name):
    count = 2000 if name == "t.parquet" else 10_000
    labels = pa.array(["a", "b"] * (count // 2))
    table = pa.table({"image": [b"%d" % k for k in range(count)], "label": labels})
    encoded = labels.dictionary_encode() if name == "dictionaries.arrow" else labels
    write_table(tmp_path / name, table.set_column(1, "label", encoded), 1)
    path, some = str(tmp_path / name), range(0, count, 25)
    read = [found for first in some for found in read_rows(path, [first, first + 1])]
    assert read == [(k, b"%d" % k) for first in some for k in (first, first + 1)]
    assert [row.label for row in list_rows(path, Counter(), Counter())] == table["label"].to_pylist()
    assert [next_part(path, row) for row in (7, count - 1, count)] == [8, count, math.inf]


def test_a_column_in_very_many_pages_is_refused(tmp_path):
    table = pa.table({"image": [b"%d" % k for k in range(20_000)], "label": ["a"] * 20_000})
    small = {"use_dictionary": False, "data_page_size": 1, "write_batch_size": 1, "compression": "none"}
    pq.write_table(table, tmp_path / "t.parquet", **small)
    with pytest.raises(DataError, match=r"t\.parquet: .* in too many pages"):
        list(read_rows(str(tmp_path / "t.parquet"), [0]))
    pq.write_table(table, tmp_path / "t.parquet", **{**small, "data_page_size": 4096, "write_batch_size": 100})
    assert [data for _, data in read_rows(str(tmp_path / "t.parquet"), [0, 19_999])] == [b"0", b"19999"]


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow"])
def test_a_schema_of_any_length_is_refused(tmp_path, name):
    table = pa.table({"image": [b"1"], "label": ["a"]}).replace_schema_metadata({"huggingface": "x" * (17 << 20)})
    with pytest.raises(DataError, match=rf"{name}: .*17,8\d\d,\d\d\d bytes.*16,777,216"):
        count_rows(str(write_table(tmp_path / name, table)))


@pytest.mark.parametrize("name", ["t.parquet", "file.arrow", "stream.arrow", "file.feather"])
@pytest.mark.parametrize("kind", [pa.null(), pa.binary()])
def test_millions_of_rows_without_pictures_are_refused_before_each_is(tmp_path, name, kind):
    labels = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3 << 20, np.int8)), ["a"])
    path = write_table(tmp_path / name, pa.table({"image": pa.nulls(3 << 20, kind), "label": labels}))
    for count in (count_rows, lambda path: next(list_rows(path, Counter(), Counter()))):
        with pytest.raises(DataError, match=r"3,145,728 rows from [\d,]+ bytes"):
            count(str(path))


def test_a_footer_whose_column_states_no_size_is_refused_in_words():
    with pytest.raises(ValueError, match="a column without a size"):
        parquet_headers.footer(bytes.fromhex("491c191c3c000026020000"))

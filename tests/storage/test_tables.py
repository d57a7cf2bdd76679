"""Tables of strangers: nothing in them runs, whatever was imported before, and what is no plain column is refused."""

import io
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather
from pyarrow import parquet as pq

from raydistill.data.many import count_rows, list_rows
from raydistill.errors import DataError
from raydistill.storage.tables import open_table


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


def save(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return path
    make = pa.ipc.new_file if path.name.startswith("file") else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("column", ["image", "label", "split", "other"])
@pytest.mark.parametrize("name", ["t.parquet", "file.arrow", "stream.arrow", "file.feather"])
@pytest.mark.parametrize("nested", [False, True])
def test_an_extension_type_is_refused_before_anything_is_made_of_it(tmp_path, registered, column, name, nested):
    marker = tmp_path / "ran"
    values = pa.ExtensionArray.from_storage(Pickled(str(marker)), pa.array([b"1", b"2"]))
    plain = {"image": [b"1", b"2"], "label": ["a", "b"], "split": ["train", "val"]}
    made = pa.StructArray.from_arrays([values], names=["bytes"]) if nested else values
    where = f"{column}.bytes" if nested else column
    path = save(tmp_path / name, pa.table({**plain, column: made}))
    for read in (lambda: open_table(str(path), name).__enter__(), lambda: count_rows(str(path))):
        with pytest.raises(
            DataError, match=f"{name}: the column {where} is of the extension type tests.pickled"
        ) as refused:
            read()
        assert "\n" not in str(refused.value)
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
from raydistill.data.images import list_images
list_images(Images(path={str(tmp_path / "t.parquet")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert f"the column {column} is of the extension type ray.data" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_offsets_that_point_elsewhere_are_refused(tmp_path):
    """Read as they are, they show what else is in the process's memory as a class's name, or end it."""
    column = pa.array(["a" * 8, "b" * 8] * 15)
    batch = pa.record_batch({"image": [b"1"] * 30, "label": column})
    with pa.ipc.new_stream(sink := io.BytesIO(), batch.schema) as writer:
        writer.write_batch(batch)
    good = column.buffers()[1].to_pybytes()[:124]
    bad = np.frombuffer(good, np.int32).copy()
    bad[30] += 4096
    path = tmp_path / "t.arrow"
    path.write_bytes(sink.getvalue().replace(good, bad.tobytes()))
    assert path.read_bytes() != sink.getvalue()
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
    path = save(tmp_path / "t.parquet", pa.table({"image": image, "label": ["a", "b"]}))
    with pytest.raises(DataError, match=reason):
        count_rows(str(path))


def test_columns_of_one_name_and_old_feather_are_refused(tmp_path):
    twice = pa.Table.from_arrays([pa.array([b"1"]), pa.array(["a"]), pa.array(["b"])], ["image", "label", "label"])
    with pytest.raises(DataError, match="several columns label"):
        count_rows(str(save(tmp_path / "t.parquet", twice)))
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
    with pytest.raises(DataError, match=f"t.parquet: .*the column {column} unpacks to .*: a decompression bomb"):
        list(list_rows(str(tmp_path / "t.parquet"), Counter(), Counter()))


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "file.arrow"])
def test_one_long_label_that_many_rows_share_is_refused_before_they_have_it(tmp_path, name):
    label = pa.array(["x" * (4 << 20)]).dictionary_encode()
    labels = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), label.dictionary)
    path = save(tmp_path / name, pa.table({"image": pa.array([b""] * 5000), "label": labels}))
    with pytest.raises(DataError, match=rf"{name}: the column label holds 4,194,304 bytes in one row"):
        list(list_rows(str(path), Counter(), Counter()))  # 20 GB, if each had its own

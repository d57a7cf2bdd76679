"""Files of many images as other libraries write them, read row by row and in any order."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from raydistill.config import Images, load_config
from raydistill.data.images import list_images
from raydistill.data.many import count_rows, list_rows, read_rows
from raydistill.errors import DataError
from raydistill.stages.prepare import chunks, read_chunk


def picture(seed: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def features(names: list[str]) -> dict[bytes, bytes]:
    label = {"names": names, "_type": "ClassLabel"}
    return {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}}).encode()}


def as_arrow(path: Path, count: int, first: int = 0) -> Path:
    """The file that `datasets.save_to_disk` writes: a stream of record batches, images as structs."""
    images = [{"bytes": picture(first + k), "path": f"{k}.png"} for k in range(count)]
    table = pa.table({"image": images, "label": pa.array([k % 2 for k in range(count)], pa.int64())})
    table = table.replace_schema_metadata(features(["cat", "dog"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


def entries_of(path: str | Path):
    return list_images(load_config([f"images.path={path}"]).images)


def bytes_of(listing) -> dict[tuple[str, int | None], bytes]:
    found = {}
    for chunk in chunks(listing.entries, Images(path="x")):
        for index, data, reason in read_chunk(chunk):
            assert reason == ""
            entry = listing.entries[index]
            found[entry.path, entry.row] = data
    return found


def test_webdataset_shards_with_their_labels_and_splits(tmp_path):
    made = {}
    for split, number, first in (("train", 0, 0), ("train", 1, 6), ("val", 0, 12)):
        files: dict[str, bytes] = {}
        for k in range(first, first + 6):
            label = "cat" if k % 2 else "dog"
            files[f"some.folder/{k:04d}.png" if k % 3 else f"{k:04d}.png"] = picture(k)
            key = f"some.folder/{k:04d}" if k % 3 else f"{k:04d}"
            kind = ("cls", "json", "txt")[k % 3]
            files[f"{key}.{kind}"] = json.dumps({"label": label}).encode() if kind == "json" else f"{label}\n".encode()
            made[picture(k)] = (label, split)
        tar(tmp_path / "set" / f"{split}-{number:06d}.tar", files)
    (tmp_path / "set" / "README.md").write_text("x")
    listing = entries_of(tmp_path / "set")
    assert listing.classes == ("cat", "dog")
    assert listing.ignored == {"files ending in .md": 1}
    read = bytes_of(listing)
    assert len(read) == len(listing.entries) == 18
    for entry in listing.entries:
        assert (entry.label, entry.split) == made[read[entry.path, entry.row]]


def test_an_image_without_a_label_beside_it_is_unlabelled(tmp_path):
    files = {"a.jpg": picture(0), "a.cls": b"0", "b.jpg": picture(1), "b.cls": b"1", "c.JPG": picture(2), "d.cls": b"1"}
    rows = list(list_rows(str(tar(tmp_path / "t.tar", files))))
    assert [(row.number, row.label) for row in rows] == [(0, "0"), (1, "1"), (2, None)]


def test_two_images_under_one_key_are_refused(tmp_path):
    path = tar(tmp_path / "t.tar", {"a.jpg": picture(0), "a.png": picture(1), "a.cls": b"0"})
    with pytest.raises(DataError, match=r"a\.jpg and a\.png stand under one key"):
        list(list_rows(str(path)))
    path = tar(tmp_path / "u.tar", {"a.jpg": picture(0), "a.json": b"{"})
    with pytest.raises(DataError, match=r"a\.json cannot be read as text or JSON"):
        list(list_rows(str(path)))


def test_a_data_set_saved_to_disk_by_datasets(tmp_path):
    root = tmp_path / "saved"
    as_arrow(root / "train" / "data-00000-of-00002.arrow", 7)
    as_arrow(root / "train" / "data-00001-of-00002.arrow", 5, first=7)
    as_arrow(root / "test" / "data-00000-of-00001.arrow", 4, first=50)
    (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (root / "train" / "state.json").write_text("{}")
    listing = entries_of(root)
    assert listing.classes == ("cat", "dog")
    assert {split: sum(e.split == split for e in listing.entries) for split in ("train", "test")} == {
        "train": 12,
        "test": 4,
    }
    read = bytes_of(listing)
    assert read[str(root / "train" / "data-00001-of-00002.arrow"), 4] == picture(11)
    assert {e.label for e in listing.entries if e.row == 1} == {"dog"}


def test_the_parquet_files_of_a_hub_repository(tmp_path):
    for split, first in (("train", 0), ("validation", 20)):
        images = [{"bytes": picture(first + k), "path": None} for k in range(6)]
        table = pa.table({"image": images, "label": pa.array([k % 2 for k in range(6)], pa.int64())})
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        table = table.replace_schema_metadata(features(["cat", "dog"]))
        pq.write_table(table, tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    listing = entries_of(tmp_path / "set")
    assert {e.split for e in listing.entries} == {"train", "val"}
    assert len(bytes_of(listing)) == 12


def test_shards_on_another_file_system(tmp_path):
    files = {f"{k}.{kind}": data for k in range(4) for kind, data in (("png", picture(k)), ("cls", b"%d" % (k % 2)))}
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/tars/train-0.tar", tar(tmp_path / "t.tar", files).read_bytes())
    listing = entries_of("memory://tars")
    assert all(
        entry.path == "memory:///tars/train-0.tar" or entry.path == "memory://tars/train-0.tar"
        for entry in listing.entries
    )
    assert sorted(bytes_of(listing).values()) == sorted(picture(k) for k in range(4))
    whole = entries_of("memory://tars/train-0.tar")
    assert [e.label for e in whole.entries] == ["0", "1", "0", "1"]
    fs.mkdir("/elsewhere")
    fs.mv("/tars/train-0.tar", "/elsewhere/train-0.tar")
    fs.rm("/elsewhere", recursive=True)


@pytest.mark.parametrize("kind", ["tar", "arrow", "parquet"])
def test_any_rows_are_read_in_the_files_order(tmp_path, kind):
    if kind == "tar":
        path = tar(tmp_path / "t.tar", {f"{k}.png": picture(k) for k in range(10)})
    elif kind == "arrow":
        path = as_arrow(tmp_path / "t.arrow", 10)
    else:
        path = tmp_path / "t.parquet"
        table = pa.table({"image": [picture(k) for k in range(10)], "label": ["a", "b"] * 5})
        pq.write_table(table, path, row_group_size=4)
    assert count_rows(str(path)) == 10
    for rows in ([3], [9, 0], [2, 3, 4, 5], range(10), []):
        assert list(read_rows(str(path), rows)) == [(k, picture(k)) for k in sorted(rows)]


@pytest.mark.parametrize("kind", ["tar", "arrow", "parquet"])
def test_a_damaged_file_is_named(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    path.write_bytes(b"no such thing" * 100)
    with pytest.raises(DataError, match=rf"t\.{kind}: not a {kind} file, or a damaged one"):
        entries_of(path)
    with pytest.raises(DataError, match=rf"t\.{kind}: not a {kind} file, or a damaged one"):
        count_rows(str(path))


def test_a_folder_of_pictures_stays_one_whatever_lies_beside_them(tmp_path, class_folders):
    root = class_folders({"cat": 3, "dog": 3})
    tar(root / "backup.tar", {"a.png": picture(0)})
    listing = entries_of(root)
    assert len(listing.entries) == 6
    assert listing.ignored == {"files ending in .tar": 1}

"""Files of many images as other libraries write them, read row by row and in any order."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tarfile
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from raydistill.config import Images, load_config
from raydistill.data.chunks import chunks, read_chunk
from raydistill.data.sources import containers
from raydistill.data.sources.containers import count_rows, list_rows, read_rows
from raydistill.data.sources.listing import list_images
from raydistill.errors import DataError
from raydistill.storage.filesystems import write_bytes
from tests.image_files import picture, write_table, write_tar


def as_datasets(path: Path, count: int, first: int = 0) -> Path:
    """A file of `datasets`: images as structs, labels as numbers whose names are in the schema."""
    images = [{"bytes": picture(first + k), "path": f"{k}.png"} for k in range(count)]
    table = pa.table({"image": images, "label": [k % 2 for k in range(count)]})
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    return write_table(path, table.replace_schema_metadata({"huggingface": json.dumps(info)}), 3)


def entries_of(path: str | Path):
    return list_images(load_config([f"images.path={path}"]).images)


def bytes_of(listing) -> dict[tuple[str, int | None], bytes]:
    found = {}
    for chunk in chunks(listing.entries, Images(path="x")):
        for index, data, reason in read_chunk(chunk, Images(path="-")):
            assert reason == ""
            found[listing.entries[index].path, listing.entries[index].row] = data
    return found


def test_webdataset_shards_with_their_labels_and_splits(tmp_path):
    made = {}
    for split, number, first in (("train", 0, 0), ("train", 1, 6), ("val", 0, 12)):
        files: dict[str, bytes] = {}
        for k in range(first, first + 6):
            label, kind = "cat" if k % 2 else "dog", ("cls", "json", "txt")[k % 3]
            key = f"some.folder/{k:04d}" if k % 3 else f"{k:04d}"
            files[f"{key}.png"] = picture(k)
            files[f"{key}.{kind}"] = json.dumps({"label": label}).encode() if kind == "json" else f"{label}\n".encode()
            made[picture(k)] = (label, split)
        write_tar(tmp_path / "set" / f"{split}-{number:06d}.tar", files)
    (tmp_path / "set" / "README.md").write_text("x")
    listing = entries_of(tmp_path / "set")
    assert listing.classes == ("cat", "dog")
    assert listing.ignored == {"files ending in .md": 1}
    read = bytes_of(listing)
    assert len(read) == len(listing.entries) == 18
    for entry in listing.entries:
        assert (entry.label, entry.split) == made[read[entry.path, entry.row]]


def test_a_data_set_saved_to_disk_by_datasets(tmp_path):
    root = tmp_path / "saved"
    as_datasets(root / "train" / "data-00000-of-00002.arrow", 7)
    as_datasets(root / "train" / "data-00001-of-00002.arrow", 5, first=7)
    as_datasets(root / "test" / "data-00000-of-00001.arrow", 4, first=50)
    (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (root / "train" / "state.json").write_text("{}")
    listing = entries_of(root)
    assert listing.classes == ("cat", "dog")
    assert Counter(entry.split for entry in listing.entries) == {"train": 12, "test": 4}
    read = bytes_of(listing)
    assert read[str(root / "train" / "data-00001-of-00002.arrow"), 4] == picture(11)
    assert {e.label for e in listing.entries if e.row == 1} == {"dog"}


def test_the_names_beside_many_files_are_read_once_and_anew_once_they_change(tmp_path, monkeypatch):
    read, place = [], tmp_path / "dataset_info.json"
    monkeypatch.setattr(containers, "_json", lambda data: read.append(data) or json.loads(data))
    for k in range(5):
        table = pa.table({"image": [b"1", b"2"], "label": [0, 1]})
        write_table(tmp_path / f"train-{k:05d}-of-00005.parquet", table)
    for names in (["cat", "dog"], ["apple", "pear", "plum"]):
        place.write_text(json.dumps({"features": {"label": {"names": names}}}))
        assert {entry.label for entry in entries_of(tmp_path).entries} == set(names[:2])
    assert sum(len(data) > 2 for data in read) == 2


def test_the_parquet_files_of_a_hub_repository(tmp_path):
    for split, first in (("train", 0), ("validation", 20)):
        as_datasets(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet", 6, first)
    listing = entries_of(tmp_path / "set")
    assert {e.split for e in listing.entries} == {"train", "val"}
    assert len(bytes_of(listing)) == 12


def test_shards_on_another_file_system(tmp_path):
    files = {f"{k}.{kind}": data for k in range(4) for kind, data in (("png", picture(k)), ("cls", b"%d" % (k % 2)))}
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/tars/train-0.tar", write_tar(tmp_path / "t.tar", files).read_bytes())
    listing = entries_of("memory://tars")
    assert {entry.path for entry in listing.entries} <= {"memory:///tars/train-0.tar", "memory://tars/train-0.tar"}
    assert sorted(bytes_of(listing).values()) == sorted(picture(k) for k in range(4))
    whole = entries_of("memory://tars/train-0.tar")
    assert [e.label for e in whole.entries] == ["0", "1", "0", "1"]
    fs.rm("/tars", recursive=True)


@pytest.mark.parametrize("suffix", ["tar", "parquet", "arrow"])
def test_a_file_in_a_bucket_is_read_anew_once_it_is_replaced(tmp_path, bucket, suffix):
    """Where its rows lie is kept from one read to the next; here both versions are as long."""
    for rows in ([b"first", b"2"], [b"1", b"other"]):
        path = tmp_path / f"t.{suffix}"
        if suffix == "tar":
            write_tar(path, {f"{k}.png": data for k, data in enumerate(rows)})
        else:
            write_table(path, pa.table({"image": rows, "label": ["a", "b"]}), 1)
        write_bytes(f"{bucket}/t.{suffix}", path.read_bytes())
        for _ in range(2):
            assert list(read_rows(f"{bucket}/t.{suffix}", [0, 1])) == list(enumerate(rows))
            assert list(read_rows(f"{bucket}/t.{suffix}", [1])) == [(1, rows[1])]


@pytest.mark.parametrize("kind", ["tar", "arrow", "parquet"])
def test_any_rows_are_read_in_the_files_order(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    if kind == "tar":
        write_tar(path, {f"{k}.png": picture(k) for k in range(10)})
    else:
        as_datasets(path, 10)
    assert count_rows(str(path)) == 10
    for rows in ([3], [9, 0], [2, 3, 4, 5], range(10), []):
        assert list(read_rows(str(path), rows)) == [(k, picture(k)) for k in sorted(rows)]


@pytest.mark.parametrize("kind", ["tar", "arrow", "parquet"])
def test_a_damaged_file_is_named(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    for content in (b"no such thing" * 100, b""):
        path.write_bytes(content)
        for read in (entries_of, lambda path: count_rows(str(path))):
            with pytest.raises(DataError, match=rf"t\.{kind}: not an? {kind} file, or a damaged one"):
                read(path)


def test_a_folder_of_pictures_stays_one_whatever_lies_beside_them(tmp_path, class_folders):
    root = class_folders({"cat": 3, "dog": 3})
    write_tar(root / "backup.tar", {"a.png": picture(0)})
    listing = entries_of(root)
    assert len(listing.entries) == 6
    assert listing.ignored == {"files ending in .tar": 1}


# WebDataset as tools write it


def packed(path: Path, *names: str, ignored: Counter[str] | None = None) -> list[tuple[int, str | None]]:
    """Rows of a tar whose members have these names; `NAME=TEXT` has that content, the others are pictures."""
    parts = [name.partition("=") for name in names]
    write_tar(path, [(name, text.encode() or picture(k)) for k, (name, _, text) in enumerate(parts)], "é" * 80)
    rows = list_rows(str(path), Counter() if ignored is None else ignored, Counter())
    return [(row.number, row.label) for row in rows]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["a.png", "b.png", "a.cls=0", "b.cls=1"], ["0", "1"]),  # the labels after the images, as --append does it
        (["b.cls=1", "a.cls=0", "b.png", "a.png"], ["1", "0"]),
        (["2024.05.01_1.png", "2024.05.01_1.cls=x", "2024.05.01_2.png", "2024.05.01_2.cls=y"], ["x", "y"]),
        (["v1.001.png", "v1.001.cls=x", "v1.002.png", "v1.003.png"], ["x", None, None]),
        (["1.input.png", "1.cls=x", "2.input.png", "2.target.cls=y", "2.cls=z"], ["x", "z"]),
        (["1.png", "1.mask.png", "1.cls=x", "2.seg.png", "2.cls=y", "2.png"], ["x", "y"]),
        (["1.left.jpg", "1.jpg", "1.cls=x"], ["x"]),
        (["a.b/1.PNG", "a.b/1.CLS=x", "./c/1.Jpg", './c/1.json={"class": 3}'], ["x", "3"]),
        (["1.png", "1.json={}", "1.txt=x"], ["x"]),
        (["1.png", "1.cls=-1", "2.png", "2.cls= nan "], [None, None]),
        (["a.jpg", "a.cls=0", "b.jpg", "b.cls=1", "c.JPG", "d.cls=1"], ["0", "1", None]),
        (["../../1.png", "../../1.cls=x", "/abs/2.png", "/abs/2.cls=y"], ["x", "y"]),
    ],
)
def test_labels_find_their_images_however_tools_name_and_order_them(tmp_path, names, labels):
    assert [label for _, label in packed(tmp_path / "t.tar", *names)] == labels
    assert count_rows(str(tmp_path / "t.tar")) == len(labels)
    assert len(list(read_rows(str(tmp_path / "t.tar"), range(len(labels))))) == len(labels)
    assert [path.name for path in tmp_path.rglob("*")] == ["t.tar"]
    assert not (tmp_path.parent / "1.png").exists()


def test_a_label_may_carry_the_whole_name_of_its_image(tmp_path):
    names = ["1.png", "1.png.json=3", "v1.2.png", "v1.2.png.cls=4", "1.mask.png", "2.png", "2.cls=5", "2.png.cls=6"]
    ignored = Counter[str]()
    assert [label for _, label in packed(tmp_path / "t.tar", *names, ignored=ignored)] == ["3", "4", "5"]
    assert sum(ignored.values()) == 2  # the mask, and the second label of 2


@pytest.mark.parametrize("size", [3 * 512 + 100, 4 * 512 + 1, 5 * 512 - 1])
def test_a_tar_that_is_cut_off_is_refused_wherever_it_is_cut(tmp_path, size):
    """Each member here has a block for its head and one for its content."""
    path = write_tar(tmp_path / "t.tar", {f"{k}.png": b"x" * 512 for k in range(4)})
    path.write_bytes(path.read_bytes()[:size])
    for read in (entries_of, lambda path: count_rows(str(path))):
        with pytest.raises(DataError, match=r"t\.tar: (truncated or damaged|not a tar file, or a damaged one)"):
            read(path)


def test_a_second_tar_behind_the_end_of_the_first_is_refused(tmp_path):
    one, other = (write_tar(tmp_path / f"{k}.tar", {f"{k}.png": picture(k), f"{k}.cls": b"%d" % k}) for k in range(2))
    one.write_bytes(one.read_bytes() + other.read_bytes())
    with pytest.raises(DataError, match=r"0\.tar: data follows after its end"):
        entries_of(one)


def test_labels_in_names_of_folders_of_tables_are_named(tmp_path):
    for label in ("cat", "dog"):
        write_table(tmp_path / f"label={label}" / "part-0.parquet", pa.table({"image": [picture(0)]}))
    with pytest.raises(DataError, match="no column label among image; a label in its folder's name is not read"):
        entries_of(tmp_path)


def test_what_a_tar_holds_besides_is_counted(tmp_path):
    ignored = Counter[str]()
    packed(tmp_path / "t.tar", "1.png", "1.mask.png", "1.cls=x", "9.cls=y", "1.bbox=z", "._1.png", ignored=ignored)
    assert ignored.total() == 4
    assert ignored["images in tar files beside the image of their key, such as masks"] == 1
    assert ignored["labels in tar files without an image"] == 1


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["1.left.jpg", "1.right.jpg", "1.cls=x"], r"1\..* leave only the image"),
        (["1.png", "1.cls=x", "2.png", "1.png"], r"1\..* leave only the image"),
        (["1.jpg", "1.png", "1.cls=x"], r"1\.jpg and 1\.png have one key; leave only the image"),
        (["1.png", "1.cls=x", "1.cls=y"], r"1\..* keep one"),
        (["1.png", "1.json={"], r"1\.json cannot be read as text or JSON"),
    ],
)
def test_a_key_with_two_images_or_labels_or_a_damaged_one_is_refused_by_name(tmp_path, names, reason):
    with pytest.raises(DataError, match=reason):
        packed(tmp_path / "t.tar", *names)


def test_links_devices_and_sparse_files_in_a_tar_are_never_read(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(99))
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, kind in (("1.png", tarfile.SYMTYPE), ("2.png", tarfile.LNKTYPE), ("3.png", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret.png")
            archive.addfile(member)
        member = tarfile.TarInfo("4.png")
        member.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(member)
    ignored = Counter[str]()
    assert list(list_rows(str(tmp_path / "t.tar"), ignored, Counter())) == []
    assert ignored.total() == 4


@pytest.mark.parametrize(
    ("data", "way_out"),
    [
        (gzip.compress(b"x" * 2000, mtime=0), "gunzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "unzstd"),
        (bz2.compress(b"x"), "bunzip2"),
        (lzma.compress(b"x"), "unxz"),
    ],
)
def test_a_compressed_tar_is_refused_with_the_way_out(tmp_path, data, way_out):
    (tmp_path / "t.tar").write_bytes(data)
    with pytest.raises(DataError, match=rf"t\.tar: compressed with .* \({way_out} unpacks it"):
        entries_of(tmp_path / "t.tar")


# Folders that `datasets` saved, and what lies beside data


def test_what_datasets_keeps_of_its_work_is_not_read(tmp_path):
    root = tmp_path / "saved"
    for split, first in (("train", 0), ("test", 50)):
        as_datasets(root / split / "data-00000-of-00001.arrow", 6, first)
        as_datasets(root / split / "cache-0123456789abcdef.arrow", 6, first + 100)
        as_datasets(root / split / "old.arrow", 6, first + 200)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split}
        (root / split / "state.json").write_text(json.dumps(state))
    (root / "train" / "cache-fedcba9876543210_00000_of_00002.arrow").write_bytes(b"junk")
    listing = entries_of(root)
    assert {Path(entry.path).name for entry in listing.entries} == {"data-00000-of-00001.arrow"}
    assert len(listing.entries) == 12
    assert listing.ignored["files that `datasets` keeps beside its data (cache-….arrow)"] == 5
    (root / "train").rename(tmp_path / "alone")
    assert {entry.split for entry in entries_of(tmp_path / "alone").entries} == {"train"}
    (tmp_path / "alone" / "state.json").write_text(json.dumps({"_indices_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(DataError, match="flatten_indices"):
        entries_of(tmp_path / "alone")


@pytest.mark.parametrize("beside", ["assets/preview.png", "README_files/a.png", "data/preview.jpg"])
def test_a_preview_beside_data_is_no_class(tmp_path, beside):
    as_datasets(tmp_path / "set" / "data" / "train.arrow", 8)
    (tmp_path / "set" / beside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "set" / beside).write_bytes(picture(70))
    listing = entries_of(tmp_path / "set")
    assert listing.classes == ("cat", "dog")
    assert listing.ignored == {"pictures beside files of many images": 1}


def test_numbered_shards_are_data_whatever_pictures_lie_beside_them(tmp_path, class_folders):
    root = class_folders({"images": 2, "docs/figures": 2})
    as_datasets(root / "data" / "train-00000-of-00001.arrow", 8)
    assert entries_of(root).classes == ("cat", "dog")

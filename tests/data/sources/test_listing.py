"""Readers: what counts as an image, as a class and as a split (cases C02 and C03), and what the fingerprint notices."""

import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from raydistill.config import Images
from raydistill.data.sources import path_tables
from raydistill.data.sources.listing import Listing, list_images, natural
from raydistill.data.sources.reading import read_bytes_of
from raydistill.errors import ConfigError, DataError
from tests.image_files import picture, write_table


def listed(path: Path | str, **options: object) -> Listing:
    return list_images(Images(path=str(path), **options))


def facts(listing: Listing, root: Path) -> list[tuple[str, str | None, str | None]]:
    """(path below the root, label, split) of every entry."""
    found = [(str(Path(e.path).relative_to(root)), e.label, e.split) for e in listing.entries]
    return sorted(found, key=lambda fact: fact[0])


def refusal(path: Path | str, **options: object) -> str:
    """The message of the DataError, which is one line."""
    with pytest.raises(DataError) as refused:
        listed(path, **options)
    (message,) = refused.value.args
    assert "\n" not in message
    return message


def rewrite_until_its_time_differs(path: Path, data: bytes) -> None:
    """File times have steps of some milliseconds; a real edit comes later than that."""
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:
        path.write_bytes(data)


# Folders


def test_class_folders_without_splits(class_folders):
    root = class_folders({"cat": 2, "dog/small": 1, "dog": 1})
    listing = listed(root)
    assert listing.classes == ("cat", "dog")
    expected = {"cat/0.png": "cat", "cat/1.png": "cat", "dog/0.png": "dog", "dog/small/0.png": "dog"}
    assert facts(listing, root) == [(path, label, None) for path, label in expected.items()]
    assert listing.ignored == {}
    assert not listing.has_split("val")


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("train", "val", "test"), ("Training", "VALID", "testing"), ("train", "validation", "Test")],
)
def test_class_folders_in_splits(class_folders, train, val, test):
    root = class_folders({f"{train}/a": 1, f"{train}/b": 1, f"{val}/a": 1, f"{val}/b": 1, f"{test}/a": 1})
    listing = listed(root)
    assert listing.classes == ("a", "b")
    expected = {(label, split) for label in "ab" for split in ("train", "val", "test")} - {("b", "test")}
    assert {(label, split) for _, label, split in facts(listing, root)} == expected
    assert [listing.has_split(split) for split in ("train", "val", "test")] == [True, True, True]


def test_a_class_may_be_called_test_where_there_is_no_train_folder(class_folders):
    root = class_folders({"test": 1, "val": 1, "essay": 1})
    listing = listed(root)
    assert listing.classes == ("essay", "test", "val")
    assert {split for *_, split in facts(listing, root)} == {None}


@pytest.mark.parametrize("name", ["unlabelled", "unlabeled", "Unlabelled"])
def test_unlabelled_folders_are_train_images_without_a_label(class_folders, name):
    inner = [f"{name}/0.png", f"train/{name}/deep/0.png"]
    for counts, expected in (
        ({"a": 1, "b": 1, name: 2}, [f"{name}/0.png", f"{name}/1.png"]),
        ({"train/a": 1, "train/b": 1, f"train/{name}/deep": 1, name: 1}, sorted(inner)),
    ):
        root = class_folders(counts, f"of {len(counts)}")
        listing = listed(root)
        assert listing.classes == ("a", "b")
        assert [fact[0] for fact in facts(listing, root) if fact[1:] == (None, "train")] == expected


def test_images_in_no_class_or_split_are_counted_not_used(class_folders):
    root = class_folders({"train/a": 1, "train/b": 1, "train": 3, "extra/a": 2, ".": 1})
    listing = listed(root)
    assert len(listing.entries) == 2
    assert sum(listing.ignored.values()) == 6


def test_hidden_and_system_files_are_neither_images_nor_classes(class_folders):
    root = class_folders({"cat": 2, "dog": 2, ".ipynb_checkpoints": 1, "cat/.ipynb_checkpoints": 1, "__MACOSX/cat": 1})
    plain = class_folders({"cat": 2, "dog": 2}, "plain")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._1.jpg", ".hidden.png"):
        (root / "cat" / name).write_bytes(b"x" * 80)
    (root / "__MACOSX" / "cat" / "._1.jpg").write_bytes(b"x" * 80)
    listing = listed(root)
    assert listing.classes == ("cat", "dog")
    assert facts(listing, root) == facts(listed(plain), plain)
    assert listing.ignored == {"hidden and system files": 9}


@pytest.mark.parametrize("suffix", [".JPG", ".Jpeg", ".PNG", ".WebP", ".bmp", ".gif", ".tif", ".TIFF", ".jfif"])
def test_every_spelling_of_an_extension_is_read(class_folders, suffix):
    root = class_folders({"a": 2, "b": 1})
    (root / "a" / "0.png").rename(root / "a" / f"IMG_6003{suffix}")
    assert len(listed(root).entries) == 3


def test_other_files_are_counted_by_their_ending(class_folders):
    root = class_folders({"a": 1, "b": 1, "empty": 0})
    for name in ("notes.txt", "more.TXT", "README", "clip.mp4"):
        (root / "a" / name).write_text("x")
    counts = {"files ending in .txt": 2, "files ending in nothing": 1, "files ending in .mp4": 1, "empty folders": 1}
    assert (listing := listed(root)).ignored == counts
    assert listing.classes == ("a", "b")


def test_names_of_any_script_are_kept(class_folders):
    names = ["café", "a b", "猫", "x=y", "50%", 'naïve,quoted"', "10", "2"]
    root = class_folders(dict.fromkeys(names, 1))
    assert sorted(listed(root).classes) == sorted(names)


def test_links_to_folders_and_files_are_followed(class_folders, tmp_path):
    real = class_folders({"a": 2, "b": 1}, "real")
    root = tmp_path / "linked"
    (root / "b").mkdir(parents=True)
    (root / "a").symlink_to(real / "a", target_is_directory=True)
    (root / "b" / "one.png").symlink_to(real / "b" / "0.png")
    listing = listed(root)
    assert [fact[:2] for fact in facts(listing, root)] == [("a/0.png", "a"), ("a/1.png", "a"), ("b/one.png", "b")]
    assert read_bytes_of(listing.entries[0].path, 10**6) == (real / "a" / "0.png").read_bytes()


def test_a_name_that_is_no_text_is_an_image_and_a_class(class_folders):
    root = class_folders({"a": 2, "b": 2, "caf": 2})
    (root / "caf").rename(root / os.fsdecode(b"caf\xe9"))
    (root / "a" / "0.png").rename(root / "a" / os.fsdecode(b"\xff\n.png"))
    before = listed(root)
    assert before.classes == (r"$'caf\xe9'", "a", "b")
    assert all(read_bytes_of(entry.path, 10**6).startswith(b"\x89PNG") for entry in before.entries)
    (root / "a" / os.fsdecode(b"\xff\n.png")).rename(root / "a" / os.fsdecode(b"\xfe\n.png"))
    assert listed(root).fingerprint != before.fingerprint
    assert len(listed(root, max_per_class=1).entries) == 3


# Classes and splits that do not match (case C02)


@pytest.mark.parametrize("how", ["no folder", "an empty folder"])
def test_a_class_without_val_images_is_named(class_folders, how):
    counts = {"train/a": 2, "train/b": 2, "train/c": 2, "val/b": 1, "val/c": 1}
    root = class_folders(counts if how == "no folder" else {**counts, "val/a": 0})
    assert "'a'" in refusal(root)
    listing = listed(root, allow_missing_val=True)
    assert listing.classes == ("a", "b", "c")
    assert {label for _, label, split in facts(listing, root) if split == "val"} == {"b", "c"}


@pytest.mark.parametrize("split", ["val", "test"])
def test_what_is_measured_on_needs_labels(tmp_path, split):
    (tmp_path / "t.csv").write_text(f"path,label,split\na.png,x,train\nb.png,y,train\nc.png,,{split}\nd.png,,train\n")
    assert f"1 {split} images have no label" in refusal(tmp_path / "t.csv")


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_train_lacks_is_refused_with_the_nearest_name(class_folders, split):
    root = class_folders({"train/tiger": 2, "train/lion": 2, "val/tiger": 1, "val/lion": 1, f"{split}/tigre": 3})
    message = refusal(root)
    assert "3" in message
    assert "'tigre'" in message
    assert "'tiger'" in message


def test_a_class_list_from_a_file_rules(class_folders, tmp_path):
    root = class_folders({"a": 1, "b": 1, "c": 1})
    names = tmp_path / "classes.txt"
    names.write_text("﻿c\n\nb\r\na\n", encoding="utf-8")
    assert listed(root, classes=str(names)).classes == ("c", "b", "a")
    for text, said in (("c\nb\n", "'a'"), ("c\nb\na\nd\n", "'d'"), ("a\nb\nc\na\n", "twice")):
        names.write_text(text)
        assert said in refusal(root, classes=str(names))
    assert "classes.json" in refusal(root, classes=str(tmp_path / "classes.json"))


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({"only": 3}, "'only'"), ({"unlabelled": 3}, "no labelled class"), ({".hidden/a": 2}, "no images"),
        ({"a": 0, "b": 0}, "no images"), ({}, "no images"),
    ],
)  # fmt: skip
def test_fewer_than_two_classes_are_refused(class_folders, tmp_path, counts, reason):
    (tmp_path / "images").mkdir()
    assert reason in refusal(class_folders(counts))


def test_paths_that_lead_nowhere_are_refused(tmp_path):
    assert "missing" in refusal(tmp_path / "missing")
    refusal("nonsense://bucket/images")
    (tmp_path / "images.zip").write_bytes(b"PK")
    assert ".csv" in refusal(tmp_path / "images.zip")
    with pytest.raises(ConfigError):
        listed("example:nonsense")


# Order of classes


def test_numbers_in_names_count_as_numbers(class_folders):
    names = ["img10", "img2", "img1", "img12b3", "img12b20", "img12", "b", "a"]
    expected = ("a", "b", "img1", "img2", "img10", "img12", "img12b3", "img12b20")
    assert listed(class_folders(dict.fromkeys(names, 1))).classes == expected


@given(st.lists(st.text(min_size=1, max_size=6) | st.sampled_from(["²", "10²", "①", "٣", "m²"]), min_size=1))
def test_any_names_can_be_sorted(names):
    assert sorted(natural(name) for name in names) == sorted(natural(name) for name in reversed(names))


def by_parts(name):
    """The same order, from a list of texts and numbers."""
    return [(1, int(part)) if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name) if part]


@given(*[st.text(st.sampled_from("ab019٣ é\0\x01\U0010ffff"), max_size=8)] * 2)
def test_names_sort_as_lists_of_their_parts(one, other):
    assert (natural(one) < natural(other)) == (by_parts(one) < by_parts(other))


def test_what_a_name_sorts_by_is_not_far_larger_than_the_name():
    name = "1a" * 20_000
    assert sum(map(sys.getsizeof, natural(name))) < 4 * len(name)


@given(numbers=st.lists(st.integers(0, 10**6), min_size=1, max_size=10), word=st.sampled_from(["", "class", "x y "]))
def test_numbered_names_sort_by_their_numbers(numbers, word):
    names = [f"{word}{number}" for number in numbers]
    assert sorted(names, key=natural) == [f"{word}{number}" for number in sorted(numbers)]


def test_the_order_of_classes_does_not_depend_on_the_process(class_folders):
    """`1`, `01` and `001` are one number: what decides must not be the order of a set."""
    names = [f"{'0' * zeros}{number}" for number in range(4) for zeros in range(6)]
    root = class_folders(dict.fromkeys(names, 1))
    code = "import sys\nfrom raydistill.config import Images\nfrom raydistill.data.sources.listing import list_images\n"
    code += "print(list_images(Images(path=sys.argv[1])).classes)"
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code, str(root)], env=env, capture_output=True, check=True)
        assert done.stdout == f"{listed(root).classes}\n".encode()


# Tables


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("bom", ["", "﻿"])
def test_tables_of_paths(class_folders, tmp_path, suffix, bom):
    root = class_folders({"pictures": 4})
    rows = [
        ("images/pictures/0.png", "cat", "train"),
        (str(root / "pictures" / "1.png"), "dog", "validation"),
        ("images/pictures/2.png", "", ""),
        ("images/pictures/3.png", " dog, big ", "train"),
        ("images/pictures/3.png", "cat", "val"),
    ]
    if suffix == ".jsonl":
        keys = ("path", "label", "split")
        lines = [json.dumps(dict(zip(keys, row, strict=True)), ensure_ascii=False) for row in rows]
    else:
        mark = "," if suffix == ".csv" else "\t"
        lines = [mark.join(f'"{cell}"' for cell in row) for row in [("path", "label", "split"), *rows]]
    table = tmp_path / f"table{suffix}"
    table.write_text(bom + "\n".join(lines) + "\n\n", encoding="utf-8")
    with pytest.raises(DataError, match="'dog'"):  # in val, but not in train: ` dog, big ` is another class
        listed(table)
    table.write_text(table.read_text(encoding="utf-8").replace(" dog, big ", " dog "), encoding="utf-8")
    listing = listed(table)
    assert listing.classes == ("cat", "dog")
    assert [name for name, *_ in facts(listing, root)] == [f"pictures/{k}.png" for k in (0, 1, 2, 3, 3)]
    rest = [("cat", "train"), ("dog", "val"), (None, None), ("dog", "train"), ("cat", "val")]
    assert [tuple(fact[1:]) for fact in facts(listing, root)] == rest
    assert all(read_bytes_of(entry.path, 10**6).startswith(b"\x89PNG") for entry in listing.entries)


def test_labels_and_paths_that_no_program_writes_end_nothing(tmp_path):
    rows = [("0.png", "a"), ("\ud800.png", "7" * 5000), ("1.png", "\ud800")]
    lines = [json.dumps({"path": path, "label": label}) for path, label in rows]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    listing = list_images(Images(path=str(tmp_path / "t.jsonl")))
    assert {len(name) for name in listing.classes} == {1, 5000, len("$'\\ud800'")}


def test_a_jsonl_may_hold_every_line_separator_of_unicode(tmp_path):
    table = tmp_path / "table.jsonl"
    rows = [{"path": "1.png", "label": "a\u2028b"}, {"path": "2.png", "label": "c\x85d"}]
    table.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert set(listed(table).classes) == {r"$'a\u2028b'", r"$'c\u0085d'"}  # as names are written that hold such signs


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("t.csv", "file,label\na.png,x\n", "line 1 (file, label) does not name the columns"),
        ("t.csv", "path,class\na.png,x\n", "line 1 (path, class) does not name the columns"),
        ("t.csv", "Path,Label\na.png,x\n", "write Path as path, Label as label"),
        ("t.csv", "a/0.png,x\nb.png,y\n", "line 1 (a/0.png, x) does not name the columns"),
        ("t.csv", "path,label\na.png,x\nb.png,y, the second\n", "line 3 has 3 fields and the header 2"),
        ("t.csv", "path,label\na.png,x\n\nb.png\n", "line 4 has 1 fields and the header 2"),
        ("t.csv", "path,label,label\na.png,x,y\n", "line 1 has several columns label"),
        ("t.csv", 'path,label\na.png,"x\nb.png,y\n', "is a quote not closed?"),
        ("t.csv", 'path,label\na.png,x\nb.png,"y"z\n', "line 3"),
        ("t.csv", "path,label\na\0.png,x\n", "line 2: the path holds a NUL"),
        ("t.tsv", "path,label\na.png,x\n", "by commas; save it with tabs"),
        ("t.csv", "path|label\na.png|x\n", "by bars; save it with commas"),
        ("t.csv", "path,label\na.png,x\n,y\n", "line 3"),
        ("t.csv", "path,label,split\na.png,x,train\nb.png,y,holdout\n", "line 3"),
        ("t.csv", "path;label\na.png;x\n", "line 1 (path;label): the fields are separated by semicolons"),
        ("t.jsonl", '{"path": "a.png", "label": "x"}\n\n{broken\n', "line 3"),
        ("t.jsonl", '{"path": "a.png", "label": "x"}\n5\n', "line 2"),
        ("t.jsonl", '{"path": "a.png"}\n', "line 1"),
        ("t.jsonl", '{"path": null, "label": "x"}\n', "line 1"),
        ("t.jsonl", '{"path": 5, "label": "x"}\n', "line 1: the path is not text but 5"),
        ("t.jsonl", '{"Path": "a.png", "label": "x"}\n', "write Path as path"),
        ("t.jsonl", '{"path": "a.png", "label": "x", "label": "y"}\n', "the key 'label' is there twice; keep one"),
        ("t.jsonl", "[" * 100_000 + "\n", "line 1 is not a JSON object"),
        ("t.jsonl", '[{"path": "a.png", "label": "x"},\n', "write one on each line"),
        ("t.jsonl", '{"file_name": "a.png", "label": "x"}\n', "line 1 (file_name, label) lacks a column"),
        ("t.csv", "'path', \"label\"\n'a.png','x'\n", """write 'path' as path, "label" as label"""),
        ("t.csv", "", "no images"),
        ("t.csv", "path,label\n", "no images"),
        ("t.csv", "path,label\na.png,x\nb.png,x\n", "'x'"),
    ],
)
def test_tables_that_cannot_be_used_are_refused_where_they_fail(tmp_path, name, content, where):
    (tmp_path / name).write_text(content)
    assert where in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("header", "end"), [("path,label", ","), ("path,label,", ""), ("path,label,,", ",,"), ("path,label,", ",,")]
)
def test_commas_that_end_lines_are_no_fields(tmp_path, header, end):
    (tmp_path / "t.csv").write_text(f"{header}\na.png,x{end}\nb.png,y{end}\n")
    found = {Path(entry.path).name: entry.label for entry in listed(tmp_path / "t.csv").entries}
    assert found == {"a.png": "x", "b.png": "y"}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_table_in_another_encoding_is_refused(tmp_path, encoding):
    (tmp_path / "t.csv").write_bytes("path,label\na.png,é\nb.png,y\n".encode(encoding))
    assert "UTF-8" in refusal(tmp_path / "t.csv")


# Parquet


def named(table: pa.Table, names: list[str]) -> pa.Table:
    """The same with the names of its integer labels, as `datasets` writes them."""
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    return table.replace_schema_metadata({"huggingface": json.dumps(features)})


def test_parquet_with_bytes_and_names(tmp_path):
    splits = ["train", "train", "train", None, "test"]
    columns = {"image": [b"1"] * 5, "label": ["b", "a", None, "", "a"], "split": splits, "other": range(5)}
    listing = listed(write_table(tmp_path / "t.parquet", pa.table(columns)))
    assert listing.classes == ("a", "b")
    labels = ["b", "a", None, None, "a"]
    assert [(e.row, e.label, e.split) for e in listing.entries] == list(zip(range(5), labels, splits, strict=True))


def test_parquet_as_hugging_face_datasets_writes_it(tmp_path):
    images = [{"bytes": picture(n), "path": f"{n}.png"} for n in range(4)]
    table = pa.table({"image": images, "label": pa.array([0, 2, 1, -1], pa.int64())})
    listing = listed(write_table(tmp_path / "t.parquet", named(table, ["zebra", "ant", "cat"])))
    assert [entry.label for entry in listing.entries] == ["zebra", "cat", "ant", None]
    assert listing.classes == ("ant", "cat", "zebra")


def test_parquet_with_categories(tmp_path):
    table = pa.table({"image": [b"1", b"2", b"3"], "label": pa.array(["x", "y", "x"]).dictionary_encode()})
    path = write_table(tmp_path / "t.parquet", table)
    assert [entry.label for entry in listed(path).entries] == ["x", "y", "x"]


def test_parquet_that_cannot_be_used_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    for table, where in (
        (pa.table({"img": [b"1"], "label": ["a"]}), "image"),
        (pa.table({"image": [b"1"], "label": ["a"], "split": ["holdout"]}), "row 0"),
        (named(pa.table({"image": [b"1", b"2"], "label": [0, 2]}), ["a", "b"]), "row 1"),
    ):
        assert where in refusal(write_table(path, table))
    path.write_bytes(b"<html>")
    assert "t.parquet" in refusal(path)


# The fingerprint (case C12)


@pytest.fixture(params=["folder", "table", "parquet"])
def source(request, class_folders, tmp_path) -> tuple[Path, Path]:
    """A source of images, and a file of it that a user may change."""
    root = class_folders({"a": 2, "b": 2})
    if request.param == "folder":
        return root, root / "a" / "0.png"
    if request.param == "table":
        table = root / "table.csv"
        table.write_text("path,label\na/0.png,x\na/1.png,x\nb/0.png,y\nb/1.png,y\n")
        return table, root / "a" / "0.png"
    path = write_table(root / "t.parquet", pa.table({"image": [b"1", b"2"], "label": ["x", "y"]}))
    return path, path


def test_the_fingerprint_is_that_of_the_same_files(source):
    path, _ = source
    assert listed(path).fingerprint == listed(path).fingerprint


def test_the_fingerprint_notices_a_new_content_of_the_same_size_and_time(source):
    path, changed = source
    before, times = listed(path).fingerprint, changed.stat()
    data = bytearray(changed.read_bytes())
    if changed.suffix == ".parquet":
        data = bytearray(bytes(data).replace(b"\x01\x00\x00\x001", b"\x01\x00\x00\x003"))
        assert bytes(data) != changed.read_bytes()
    else:
        data[-20] ^= 1
    rewrite_until_its_time_differs(changed, bytes(data))
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (changed.stat().st_size, changed.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert listed(path).fingerprint != before


def test_the_fingerprint_stays_when_the_folder_moves(source, tmp_path):
    path, _ = source
    before = listed(path).fingerprint
    (tmp_path / "images").rename(tmp_path / "moved")
    assert listed(tmp_path / "moved" / path.relative_to(tmp_path / "images")).fingerprint == before


def test_the_fingerprint_notices_files_that_come_go_or_change_their_name_or_class(class_folders):
    root = class_folders({"a": 2, "b": 2})
    seen = [listed(root).fingerprint]
    for change in (
        lambda: shutil.copy(root / "a" / "0.png", root / "a" / "9.png"),
        lambda: (root / "a" / "9.png").rename(root / "a" / "8.png"),
        lambda: (root / "a" / "8.png").rename(root / "b" / "8.png"),
        lambda: (root / "b").rename(root / "c"),
        lambda: (root / "c" / "8.png").unlink(),
    ):
        change()
        seen.append(listed(root).fingerprint)
    assert len(set(seen)) == len(seen)


def test_the_fingerprint_notices_a_label_that_changes_in_a_table(class_folders):
    table, seen = class_folders({"a": 2}) / "t.csv", set()
    for rows in ("a/0.png,x\na/1.png,y\n", "a/0.png,y\na/1.png,x\n"):
        table.write_text(f"path,label\n{rows}")
        seen.add(listed(table).fingerprint)
    assert len(seen) == 2


def test_the_fingerprint_notices_a_change_behind_a_link(class_folders, tmp_path):
    real = class_folders({"a": 1, "b": 1}, "real")
    root = tmp_path / "linked"
    for name in "ab":
        (root / name).mkdir(parents=True)
        (root / name / "0.png").symlink_to(real / name / "0.png")
    before = listed(root).fingerprint
    target = real / "a" / "0.png"
    rewrite_until_its_time_differs(target, target.read_bytes()[:-1] + b"x")
    assert listed(root).fingerprint != before


def test_files_that_are_ignored_change_no_fingerprint(class_folders):
    root = class_folders({"a": 1, "b": 1})
    before = listed(root).fingerprint
    for name in ("notes.txt", ".DS_Store"):
        (root / "a" / name).write_text("x")
    assert listed(root).fingerprint == before


# Elsewhere than on a disk of this machine


def test_a_remote_folder_is_read_like_a_local_one(class_folders):
    root = class_folders({"train/a": 2, "train/b": 1, "val/a": 1, "val/b": 1})
    memory = fsspec.filesystem("memory")
    for path in root.rglob("*.png"):
        memory.pipe_file(f"/bucket/{path.relative_to(root)}", path.read_bytes())
    try:
        listing = listed("memory://bucket")
        assert listing.classes == ("a", "b")
        local = listed(root)
        assert [(e.label, e.split) for e in listing.entries] == [(e.label, e.split) for e in local.entries]
        remote, here = ([read_bytes_of(e.path, 10**6) for e in of.entries] for of in (listing, local))
        assert remote == here
        memory.pipe_file("/bucket/train/a/0.png", Image.new("RGB", (1, 1)).tobytes())
        assert listed("memory://bucket").fingerprint != listing.fingerprint
    finally:
        memory.rm("/bucket", recursive=True)


def test_max_per_class_keeps_that_many_of_each_class_and_split_and_says_so(class_folders) -> None:
    root = class_folders({"train/cat": 7, "train/dog": 2, "val/cat": 4, "val/dog": 1, "train/unlabelled": 5})
    whole = list_images(Images(path=str(root)))
    listing = list_images(Images(path=str(root), max_per_class=3))
    counts = Counter(f"{entry.split}/{entry.label}" for entry in listing.entries)
    assert counts == {"train/cat": 3, "train/dog": 2, "val/cat": 3, "val/dog": 1, "train/None": 3}
    assert set(listing.entries) < set(whole.entries)
    assert sum(listing.ignored.values()) == 4 + 1 + 2
    assert listing.fingerprint != whole.fingerprint


@pytest.mark.parametrize(
    ("suffix", "head"), [(".csv", "path,label\n"), (".tsv", "path\tlabel\n"), (".jsonl", '{"path": "')]
)
def test_a_line_without_end_is_refused_before_it_is_held(tmp_path, monkeypatch, suffix, head):
    monkeypatch.setattr(path_tables, "_LONGEST_LINE", 1 << 16)
    (tmp_path / f"t{suffix}").write_text(head + "x" * (20 << 20))
    tracemalloc.start()
    assert "has more than 65,536 characters" in refusal(tmp_path / f"t{suffix}")
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_other_systems_write_them(tmp_path, end):
    table = tmp_path / "t.csv"
    table.write_bytes(f'path,label{end}"a{end}b.png",x{end}c.png,y{end}'.encode("utf-8-sig"))
    assert [Path(entry.path).name for entry in listed(table).entries] == [f"a{end}b.png", "c.png"]


def test_the_line_that_is_not_utf8_is_named_wherever_it_is(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"path,label\n" + b"a.png,x\n" * 5000 + b"b\xff.png,y\n" + b"a.png,x\n" * 5000)
    assert "line 5002 is not UTF-8" in refusal(tmp_path / "t.csv")


MANY_CLASSES = "path,label\n" + "".join(f"{k}.png,class {k}\n" for k in range(140_000))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("t.csv", "path,label\na,b\n" + "\n" * 400_000, r"[\d,]+ rows from [\d,]+ bytes, too few for as many pictures"),
        ("t.jsonl", "\n" * 400_000, r"[\d,]+ rows from [\d,]+ bytes, too few"),
        pytest.param("t.csv", "path,label\n" + "a,b\n" * 400_000, r"[\d,]+ rows from", marks=pytest.mark.slow),
        pytest.param("t.csv", MANY_CLASSES, "131,073 classes", marks=pytest.mark.slow),
    ],
    ids=["blank", "json", "rows", "classes"],
)
def test_millions_of_rows_in_a_few_bytes_are_refused_soon(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    assert re.search(rf"t\.\w+: {reason}", refusal(tmp_path / name))


def test_texts_of_any_length_in_a_table_are_told_in_a_short_sentence(tmp_path):
    long, path = "a b/" * 1_000_000, tmp_path / "t.jsonl"
    for row in ({"path": "a.png", "label": "a", "split": long}, {long: 1}, {"path": [long], "label": "a"}):
        path.write_text(json.dumps(row))
        assert len(refusal(path)) < 300 + len(str(path))
    write_table(tmp_path / "t.parquet", pa.table({"image": [b"1"], long: ["a"]}))
    assert len(refusal(tmp_path / "t.parquet")) < 300 + len(str(path))
    (tmp_path / "classes.txt").write_text(long)
    path.write_text('{"path": "a.png", "label": "a"}')
    said = refusal(path, classes=str(tmp_path / "classes.txt"))
    assert "classes.txt: a line of 4,000,000 characters" in said


def test_lists_of_too_many_classes_are_refused(tmp_path):
    table = pa.table({"image": [b"1", b"2"], "label": [0, 1]})
    names, path = [str(k) for k in range(140_000)], tmp_path / "t.parquet"
    assert "t.parquet: 140,000 classes, above 131,072" in refusal(write_table(path, named(table, names)))
    (tmp_path / "classes.txt").write_text("\n".join(names))
    write_table(path, table)
    assert "classes.txt: 140,000 classes, above 131,072" in refusal(path, classes=str(tmp_path / "classes.txt"))


def test_few_files_that_a_table_names_very_often_are_refused(tmp_path):
    rows = [f"{'./' * (k % 9)}a.png,{'ab'[k % 2]}" for k in range(5_000)]
    (tmp_path / "s.csv").write_text("\n".join(["path,label", *rows]))
    with pytest.raises(DataError, match="5,000 rows name 1 files; name each file once"):
        list_images(Images(path=str(tmp_path / "s.csv")))

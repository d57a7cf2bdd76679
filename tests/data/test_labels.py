"""What labels mean, in every kind of file alike, and which names are one class."""

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from raydistill.config import Images
from raydistill.data.labels import label_of, one_spelling
from raydistill.data.sources.listing import Listing, list_images
from raydistill.errors import DataError
from tests.image_files import write_table, write_tar


def listed(path: Path, **options: object) -> Listing:
    return list_images(Images(path=str(path), **options))


def write(path: Path, labels: list) -> Path:
    """A source of as many images; their bytes do not matter here."""
    images = [b"%d" % k for k in range(len(labels))]
    if path.suffix in (".csv", ".tsv"):
        mark = "," if path.suffix == ".csv" else "\t"
        rows = [("path", "label"), *((f"{k}.png", "" if label is None else label) for k, label in enumerate(labels))]
        path.write_text("".join(f"{name}{mark}{label}\n" for name, label in rows))
    elif path.suffix == ".jsonl":
        rows = [{"path": f"{k}.png", "label": label} for k, label in enumerate(labels)]
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".tar":
        beside = {f"{k}.json": json.dumps({"label": label}).encode() for k, label in enumerate(labels)}
        write_tar(path, beside | {f"{k}.png": data for k, data in enumerate(images)})
    else:
        write_table(path, pa.table({"image": images, "label": labels}))
    return path


TEXT, TYPED = (".csv", ".tsv"), (".jsonl", ".tar", ".parquet", ".arrow", ".feather")


@pytest.mark.parametrize("suffix", [*TEXT, *TYPED])
@pytest.mark.parametrize("nothing", ["nan", "NaN", "None", "<NA>", "-1"])
def test_what_programs_write_for_nothing_is_no_label_and_is_said(tmp_path, suffix, nothing):
    listing = listed(write(tmp_path / f"t{suffix}", ["cat", "dog", nothing, None, "cat"]))
    assert [entry.label for entry in listing.entries] == ["cat", "dog", None, None, "cat"]
    assert listing.notes == {f"labels {nothing}, read as no label": 1}


@pytest.mark.parametrize("suffix", TYPED)
@pytest.mark.parametrize(
    ("labels", "classes", "found"),
    [
        ([3, 10, 3], ("3", "10"), ["3", "10", "3"]),
        ([0.0, 1.0, float("nan"), None], ("0", "1"), ["0", "1", None, None]),
        ([0, 1, -1], ("0", "1"), ["0", "1", None]),
        ([True, False, None], ("false", "true"), ["true", "false", None]),
    ],
)
def test_numbers_and_truths_are_names(tmp_path, suffix, labels, classes, found):
    listing = listed(write(tmp_path / f"t{suffix}", labels))
    assert listing.classes == classes
    assert [entry.label for entry in listing.entries] == found


@pytest.mark.parametrize("suffix", TEXT)
def test_whole_numbers_that_pandas_wrote_beside_gaps(tmp_path, suffix):
    listing = listed(write(tmp_path / f"t{suffix}", ["0.0", "1.0", None, "10.0"]))
    assert listing.classes == ("0", "1", "10")
    assert listing.notes == {"labels such as 1.0, read as whole numbers": 3}
    assert listed(write(tmp_path / f"v{suffix}", ["1.0", "1.5", "2.0"])).classes == ("1.0", "1.5", "2.0")


MULTI = "multi-label data is not supported"


@pytest.mark.parametrize("suffix", TYPED)
@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([["cat"], ["cat"]], MULTI), ([["cat", "dog"], ["cat"]], MULTI), ([[], []], MULTI),
        ([{"name": "cat"}, {"name": "dog"}], "the label is a mapping; write only the name of the class"),
        ([1.0, 0.5], r"the label is 0\.5, a fraction"),
    ],
)  # fmt: skip
def test_what_is_no_class_is_refused_in_one_sentence(tmp_path, suffix, labels, reason):
    with pytest.raises(DataError, match=rf"^.*t{suffix}: .*{reason}.*$"):
        listed(write(tmp_path / f"t{suffix}", labels))


@pytest.mark.parametrize("suffix", [*TEXT, *TYPED])
def test_whole_numbers_as_text_are_the_same_everywhere(tmp_path, suffix):
    """-1.0 is no label and 0 beside 0.0 is one class; a class list may have them as they stand."""
    path = write(tmp_path / f"t{suffix}", ["0.0", "0", "1.0", "-1.0", None, "10"])
    listing = listed(path)
    assert [entry.label for entry in listing.entries] == ["0", "0", "1", None, None, "10"]
    assert listing.notes == {"labels -1.0, read as no label": 1, "labels such as 1.0, read as whole numbers": 2}
    (tmp_path / "classes.txt").write_text("1.0\n2.0\n")
    path = write(tmp_path / f"u{suffix}", ["1.0", "2.0"])
    assert listed(path, classes=str(tmp_path / "classes.txt")).classes == ("1.0", "2.0")


def test_folders_named_as_versions_keep_their_names(class_folders):
    assert listed(class_folders({"1.0": 1, "2.0": 1, "-1.0": 1})).classes == ("-1.0", "1.0", "2.0")


@pytest.mark.parametrize("suffix", [*TEXT, *TYPED])
def test_what_programs_write_of_bytes_and_lists_as_text(tmp_path, suffix):
    listing = listed(
        write(tmp_path / f"t{suffix}", ["b'cat'", "b'dog'", "b'caf\\xc3\\xa9'", "[other]", "b'", "{[1]: 2}"])
    )
    assert [entry.label for entry in listing.entries] == ["cat", "dog", "café", "[other]", "b'", "{[1]: 2}"]
    assert listing.notes == {"labels such as b'cat', read as the text in them": 3}
    for text in ("['cat']", "[0 1]", "[0. 1. 0.]"):
        with pytest.raises(DataError, match="multi-label data is not supported"):
            listed(write(tmp_path / f"u{suffix}", [text, text]))


def test_decimals_and_padded_bytes(tmp_path):
    for labels, classes in (
        (pa.array([1, 2], pa.int64()).cast(pa.decimal128(30, 2)), ("1", "2")),
        (pa.array([b"cat\0\0", b"horse"], pa.binary(5)), ("cat", "horse")),
    ):
        assert listed(write(tmp_path / "t.parquet", labels)).classes == classes


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(3), pa.large_string(), pa.binary_view()])
def test_bytes_are_read_as_text(tmp_path, suffix, kind):
    array = pa.array(["cat", "dog", None], kind) if "string" in str(kind) else pa.array([b"cat", b"dog", None], kind)
    if suffix == ".feather" and "view" in str(kind):
        pytest.skip("feather has no such type")
    listing = listed(write(tmp_path / f"t{suffix}", array))
    assert [entry.label for entry in listing.entries] == ["cat", "dog", None]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (pa.array([b"caf\xe9", b"dog"]), "row 0: the label is bytes that are not UTF-8"),
        (pa.array([b"cat", None, b"d"]).dictionary_encode(), ""),
        (pa.array([1, 2], pa.int32()).cast(pa.date32()), "the column label holds date32"),
        (pa.array([[0, 1], [1, 0]], pa.list_(pa.int8(), 2)), "multi-label"),
    ],
)
def test_other_types_are_read_or_refused_by_row(tmp_path, suffix, labels, reason):
    path = write(tmp_path / f"t{suffix}", labels)
    if not reason:
        assert listed(path).classes == ("cat", "d")
        return
    with pytest.raises(DataError, match=reason):
        listed(path)


def test_huge_and_endless_numbers_are_refused_or_names():
    notes = Counter[str]()
    assert label_of(2**63, "t", notes) == str(2**63)
    for value in (float("inf"), -0.25, object()):
        with pytest.raises(DataError, match=r"^t: the label is"):
            label_of(value, "t", notes)


@pytest.mark.parametrize("label", ["[0" + ",0" * (8 << 20) + "]", "x" * 65_537])
def test_a_label_of_any_length_is_refused_unread(label):
    tracemalloc.start()
    with pytest.raises(DataError, match=r"^t: the label has [\d,]+ characters, too many for a label$"):
        label_of(label, "t", Counter())
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 1e6


def test_names_of_a_class_label_in_the_file_or_in_the_folder(tmp_path):
    info = {"features": {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}}}
    path = write(tmp_path / "data-00000-of-00001.arrow", [1, 0, -1])
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert [entry.label for entry in listed(path).entries] == ["ant", "zebra", None]
    (tmp_path / "dataset_info.json").write_text("[" * 9999)
    assert [entry.label for entry in listed(path).entries] == ["1", "0", None]


# Names that look the same


@pytest.mark.parametrize(
    ("one", "other"),
    [("café", "cafe\u0301"), ("black cat", "black  cat"), ("cat", "cat\u200b"), ("a b", "a\u00a0b")],
)
def test_names_that_look_the_same_are_one_class_and_that_is_said(tmp_path, one, other):
    listing = listed(path := write(tmp_path / "t.jsonl", [one, one, other, "dog"]))
    assert Counter(entry.label for entry in listing.entries) == {one: 3, "dog": 1}
    assert listing.notes == {f"labels {other!a}, read as {one!a}, which looks the same": 1}
    (tmp_path / "classes.txt").write_text(f"dog\n{one}\n", encoding="utf-8")
    write(path, [one, other, other, "dog"])
    assert listed(path, classes=str(tmp_path / "classes.txt")).classes == ("dog", one)


def test_folders_that_look_the_same_are_one_class(class_folders):
    listing = listed(class_folders({"café": 2, "cafe\u0301": 1, "dog": 1, "dog ": 1}))
    assert Counter(entry.label for entry in listing.entries) == {"café": 3, "dog": 2}
    assert sum(listing.notes.values()) == 2


def test_names_that_differ_in_case_alone_are_refused_unless_both_are_listed(class_folders, tmp_path):
    root = class_folders({"Cat": 2, "cat": 1, "dog": 1})
    with pytest.raises(DataError, match=r"the classes 'Cat' and 'cat' differ only in case"):
        listed(root)
    (tmp_path / "classes.txt").write_text("cat\nCat\ndog\n")
    assert listed(root, classes=str(tmp_path / "classes.txt")).classes == ("cat", "Cat", "dog")


def test_a_class_of_which_no_file_is_read_is_named(class_folders):
    root = class_folders({"cat": 2, "dog": 2, "phone": 0, "download": 2})
    for k in range(3):
        (root / "phone" / f"{k}.heic").write_bytes(b"x")
    for k in range(2):
        (root / "download" / f"{k}.png").rename(root / "download" / f"{k}")
    notes = listed(root).notes
    assert sorted(notes.values()) == [2, 3]
    assert any("'phone', which is not a class" in what and "3 ending in .heic" in what for what in notes)
    assert any("'download', which is not a class" in what and "2 ending in nothing" in what for what in notes)


@pytest.mark.timeout(10)
def test_very_many_listed_classes_find_their_spelling_soon() -> None:
    names = [f"class {k}" for k in range(50_000)]
    assert one_spelling(Counter(names), names, Counter()) == {name: name for name in names}

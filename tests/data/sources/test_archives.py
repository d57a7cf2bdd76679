"""Tar files of strangers: what their headers say of sizes is known before anything is made of it."""

import gc
import io
import os
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from raydistill.data.sources.archives import Member, images_of
from raydistill.data.sources.containers import count_rows, list_rows, read_rows
from raydistill.data.sources.reading import read_pictures
from raydistill.errors import DataError

END = bytes(1024)


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """A block whose size may be negative, as GNU's base 256 allows."""
    stated = (
        b"%011o\0" % size if 0 <= size < 8**11 else b"\x80\xff"[size < 0 :][:1] + (size % (1 << 88)).to_bytes(11, "big")
    )
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + stated + b"00000000000\0" + b" " * 8 + kind
    block = block.ljust(257, b"\0") + b"ustar\x0000"
    block = block.ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(*records: tuple[str, str], kind: bytes = b"x") -> bytes:
    data = b""
    for key, value in records:
        body = f" {key}={value}\n".encode()
        data += str(next(n for n in range(len(body), 999) if len(str(n)) + len(body) == n)).encode() + body
    return header(b"pax", len(data), kind) + padded(data)


def member(name: bytes, data: bytes = b"png") -> bytes:
    return header(name, len(data)) + padded(data)


GOOD = member(b"1.png") + member(b"1.cls", b"a")


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (header(b"a.png", -512), "less than no bytes"),
        (pax(("size", "-1536")) + member(b"a.png"), "less than no bytes"),
        (header(b"pax", -512, b"x"), "less than no bytes"),
        (header(b"pax", 1 << 30, b"x"), "a header of 1,073,741,824 bytes"),
        (header(b"pax", 1 << 30, b"g"), "a header of 1,073,741,824 bytes"),
        (header(b"././@LongLink", 1 << 34, b"L"), "a header of 17,179,869,184 bytes"),
        (header(b"././@LongLink", 1 << 34, b"K"), "a header of 17,179,869,184 bytes"),
        (pax(("size", "6000000000"), kind=b"g") + GOOD, "6,000,000,000 bytes, some of them not its own"),
        (header(b"pax", 65536, b"x") + b"1" * 65536 + GOOD, "a number that is too long"),
        (header(b"pax", 98, b"x") + padded(b"9" * 90 + b" a=bcde\n") + GOOD, "a damaged one"),
        (pax(("comment", "x")) * 2000 + GOOD, "headers of headers without end"),
        (header(b"a.png", 7 << 30) + padded(b"x"), "unexpected end of data"),
        (
            pax(*((f"comment{k}", "x") for k in range(101)), kind=b"g") + GOOD,
            "more than 100 attributes of all its members",
        ),
    ],
)
def test_headers_that_lie_end_in_one_sentence(tmp_path, archive, reason):
    (tmp_path / "t.tar").write_bytes(archive + END)
    with pytest.raises(DataError, match=rf"t\.tar: .*{reason}") as refused:
        list(list_rows(str(tmp_path / "t.tar"), Counter(), Counter()))
    assert "\n" not in str(refused.value)


SPARSE = ("GNU.sparse.size", "6000000000"), ("GNU.sparse.numblocks", "1")


@pytest.mark.parametrize(
    "records",
    [
        [*SPARSE, ("GNU.sparse.offset", "0"), ("GNU.sparse.numbytes", "3")],  # the three forms of pax
        [*SPARSE, ("GNU.sparse.map", "0,3")],
        [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "6000000000")],
        [("GNU.sparse.realsize", "6000000000")],
    ],
)
@pytest.mark.parametrize("suffix", ["png", "cls"])
def test_few_bytes_that_stand_for_many_are_counted_and_left_out(tmp_path, records, suffix):
    sparse = pax(*records) + member(f"2.{suffix}".encode(), padded(b"1\n0\n3\n") + b"png")
    (tmp_path / "t.tar").write_bytes(GOOD + sparse + END)
    ignored = Counter[str]()
    assert [row.label for row in list_rows(str(tmp_path / "t.tar"), ignored, Counter())] == ["a"]
    assert ignored == {"links and other entries in tar files that are not files": 1}


def test_a_large_file_in_a_tar_is_refused_by_its_size_and_its_neighbours_are_read(tmp_path: Path):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for k, size in enumerate((3, 4 << 20, 5)):
            (tmp_path / "some").write_bytes(bytes(size))
            archive.add(tmp_path / "some", f"{k}.png")
    path = str(tmp_path / "t.tar")
    assert [len(data) for _, data in read_rows(path, range(3))] == [3, 4 << 20, 5]
    found = {k: (data, reason) for k, data, reason in read_pictures([(path, k) for k in range(3)], 1000)}
    assert found[0][0] == bytes(3)
    assert found[2][0] == bytes(5)
    assert "it has 4,194,304 bytes, above 1,000" in found[1][1]


def test_a_hole_behind_the_end_is_not_gone_through(tmp_path: Path):
    """Of a terabyte it would take minutes."""
    path = tmp_path / "t.tar"
    path.write_bytes(GOOD)
    os.truncate(path, 1 << 40)
    assert [row.label for row in list_rows(str(path), Counter(), Counter())] == ["a"]


@pytest.mark.slow
def test_very_many_empty_files_are_refused_before_all_are_gone_through(tmp_path: Path):
    (tmp_path / "t.tar").write_bytes(header(b"1.png", 0) * 140_000 + END)
    with pytest.raises(DataError, match=r"t\.tar: 131,07\d files in 67,1\d\d,\d\d\d bytes, most of them empty"):
        count_rows(str(tmp_path / "t.tar"))


def test_attributes_that_nothing_asks_for_are_not_kept(tmp_path: Path):
    many = pax(*((f"comment{k}", "x" * 20) for k in range(1200)))
    (tmp_path / "t.tar").write_bytes(b"".join(many + member(b"%d.png" % k) for k in range(20)) + END)
    with tarfile.open(tmp_path / "t.tar", tarinfo=Member) as archive:
        tracemalloc.start()
        images = images_of(archive, "t.tar", Counter())
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert len(images) == 20
    assert held < 1 << 19


@pytest.mark.timeout(20)
def test_a_file_of_many_images_is_read_in_parts_as_soon_as_at_once_and_anew_once_it_changes(tmp_path: Path):
    path, count = tmp_path / "t.tar", 10_000
    path.write_bytes(b"".join(member(b"%d.png" % k, b"%d" % k) for k in range(count)) + END)
    read = [found for first in range(0, count, 50) for found in read_rows(str(path), range(first, first + 50))]
    assert read == [(k, b"%d" % k) for k in range(count)]
    path.write_bytes(member(b"note.txt", b"first") + member(b"a.png", b"other") + END)
    assert list(read_rows(str(path), [0])) == [(0, b"other")]


@pytest.mark.parametrize("kind", ["pax 1.0", "old GNU"])
def test_the_map_of_a_sparse_file_is_not_read_however_long_it_is(tmp_path: Path, kind):
    count = 200_000
    if kind == "pax 1.0":
        whole = pax(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"))
        whole += member(b"2.png", b"%d\n" % count + b"1\n1\n" * count)
    else:
        more = b"00000000001\0" * 42 + b"\1" + bytes(7)
        first = bytearray(header(b"2.png", 3, b"S"))
        first[482] = 1
        first[148:156] = b" " * 8
        first[148:156] = b"%06o\0 " % sum(first)
        whole = bytes(first) + more * (count // 21) + bytes(512) + padded(b"png")
    (tmp_path / "t.tar").write_bytes(whole + GOOD + END)
    ignored = Counter[str]()
    tracemalloc.start()
    try:
        assert [row.label for row in list_rows(str(tmp_path / "t.tar"), ignored, Counter())] == ["a"]
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert ignored == {"links and other entries in tar files that are not files": 1}


def test_lists_beside_images_are_read_without_looking_for_cycles(tmp_path: Path):
    runs = []

    def count(phase: str, info: dict[str, int]) -> None:
        runs.append(phase)

    parts = {}
    for k in range(40):
        parts[f"{k}.png"] = b"png"
        parts[f"{k}.json"] = b'{"label": "a", "x": [' + b"[]," * 20_000 + b"1]}"
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, data in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    gc.callbacks.append(count)
    try:
        rows = list(list_rows(str(tmp_path / "s.tar"), Counter(), Counter()))
    finally:
        gc.callbacks.remove(count)
    assert [row.label for row in rows] == ["a"] * 40
    assert gc.isenabled()
    assert len(runs) < 200

"""What is wrong with one picture is the reason of its own refusal, whatever it is; what is wrong with the machine ends
the command."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from raydistill.config import Images
from raydistill.data.decode import decode
from raydistill.data.sources import reading
from raydistill.data.sources.listing import list_images
from raydistill.data.sources.reading import read_pictures
from raydistill.errors import DataError, StorageError
from tests.image_files import picture, write_table, write_tar

MOST = 100_000


def reasons(places: list[tuple[str, int | None]]) -> list[str]:
    """Of each, empty for a picture that is read and decodes."""
    found = ["" for _ in places]
    for number, data, reason in read_pictures(places, MOST):
        try:
            assert reason or decode(data or b"", 32, "crop", 10_000)
        except DataError as error:
            reason = str(error)
        found[number] = reason
    return found


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


@pytest.mark.timeout(20)
def test_what_is_no_file_of_a_picture_is_refused_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.png").write_bytes(picture())
    os.mkfifo("pipe.png")
    Path("folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    sparse(Path("sparse.png"), 1 << 40)
    sparse(Path("just.png"), MOST)
    links = {"zero.png": "/dev/zero", "tty.png": "/dev/tty", "maps.png": "/proc/self/maps", "core.png": "/proc/kcore",
             "log.png": "/proc/kmsg", "self.png": "self.png", "nowhere.png": "nowhere"}  # fmt: skip
    for name, target in links.items():
        Path(name).symlink_to(target)
    names = ["pipe.png", "folder.png", "socket.png", "sparse.png", "just.png", *links, "nul\0.png", "half\ud800.png",
             "n" * 300, os.fsdecode(b"caf\xe9.png")]  # fmt: skip
    found = reasons([(str(tmp_path / name), None) for name in ["good.png", *names, "good.png"]])
    assert (found[0], found[-1]) == ("", "")
    assert all(found[1:-1])
    assert found[1:5] == [
        "cannot be read: not a regular file", "cannot be read: Is a directory",
        "cannot be read: No such device or address",
        "cannot be read: it has 1,099,511,627,776 bytes, above 100,000 (images.max_bytes)",
    ]  # fmt: skip
    assert found[5] == "not an image"


def test_a_folder_of_such_files_is_listed_and_each_is_refused(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        (tmp_path / label / "0.png").write_bytes(picture(ord(label)))
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "b" / "zero.jpg").symlink_to("/dev/zero")
    listing = list_images(Images(path=str(tmp_path)))
    found = {Path(e.path).name: reasons([(e.path, None)])[0] for e in listing.entries if "0.png" not in e.path}
    assert found == dict.fromkeys(["pipe.png", "zero.jpg"], "cannot be read: not a regular file")
    assert len(listing.entries) == 4


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_row_of_too_many_bytes_is_refused_alone(tmp_path, kind):
    rows = [picture(0), b"x" * (MOST + 1), picture(2)]
    write_table(tmp_path / "set.parquet", pa.table({"image": rows, "label": ["a", "b", "a"]}))
    write_tar(tmp_path / "set.tar", {f"{k}.png": data for k, data in enumerate(rows)})
    found = reasons([(f"{tmp_path}/set.{kind}", row) for row in range(3)])
    assert found == ["", "cannot be read: it has 100,001 bytes, above 100,000 (images.max_bytes)", ""]


def test_of_a_file_with_a_damaged_row_group_the_others_are_read(tmp_path):
    path = tmp_path / "set.parquet"
    table = pa.table({"image": [picture(k) for k in range(9)], "label": list("abcabcabc")})
    write_table(path, table, 3, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 20] = b"\xff" * 20
    path.write_bytes(data)
    found = reasons([(str(path), row) for row in range(9)])
    assert [bool(reason) for reason in found] == [False] * 3 + [True] * 3 + [False] * 3
    assert all(reason.startswith("cannot be read: ") and "\n" not in reason for reason in found[3:6])


def test_a_file_of_many_that_is_gone_refuses_its_rows(tmp_path):
    found = reasons([(f"{tmp_path}/gone.parquet", 0), (f"{tmp_path}/gone.parquet", 1)])
    assert len(found) == 2
    assert all("gone.parquet" in reason for reason in found)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
def test_rows_that_a_file_has_no_more_are_refused(tmp_path, kind):
    path = tmp_path / f"set.{kind}"
    if kind == "tar":
        write_tar(path, {"0.png": picture()})
    else:
        write_table(path, pa.table({"image": [picture(0), picture(1)], "label": ["a", "b"]}))
    found = reasons([(str(path), row) for row in (0, 7, 8)])
    assert [bool(reason) for reason in found] == [False, True, True]


@pytest.mark.parametrize("name", ["a::b.png", "https:b.png", "~b.png"])
def test_a_name_like_an_address_is_a_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(picture())
    assert reasons([(name, None), (f"{tmp_path}/{name}", None)]) == ["", ""]


class OddError(Exception):
    """As decoders and clients have them."""


@pytest.mark.parametrize("error", [OddError("a\nb"), OddError(), RecursionError("deep"), ZeroDivisionError("by 0")])
def test_any_exception_of_one_picture_is_its_own_refusal(monkeypatch, error):
    def fails(path: str, *_: object) -> bytes:
        if path == "bad":
            raise error
        return picture()

    monkeypatch.setattr(reading, "read_bytes_of", fails)
    found = reasons([("one", None), ("bad", None), ("other", None)])
    assert (found[0], found[2]) == ("", "")
    assert found[1] == f"cannot be read: {' '.join(str(error).split()) or 'OddError'}"


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError(), StorageError("it is away"),
                                   KeyboardInterrupt()])  # fmt: skip
def test_what_tells_of_the_machine_is_no_refusal(monkeypatch, error):
    def fails(path: str, *_: object) -> bytes:
        raise error

    monkeypatch.setattr(reading, "read_bytes_of", fails)
    with pytest.raises(type(error)):
        list(read_pictures([("one", None)], MOST))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", ["a list of classes", "a table", "what stands beside", "a file of many"])
def test_files_that_tell_of_others_are_of_a_size_and_regular(tmp_path, what):
    (tmp_path / "set").mkdir()
    words, large = {"path": str(tmp_path / "set")}, tmp_path / "set" / "large"
    write_table(tmp_path / "set" / "0.parquet", pa.table({"image": [picture(), picture(1)], "label": ["a", "b"]}))
    match what:
        case "a list of classes":
            words["classes"] = str(large)
        case "a table":
            words["path"] = str(large := tmp_path / "large.csv")
        case "what stands beside":
            large = tmp_path / "set" / "dataset_info.json"
        case "a file of many":
            os.mkfifo(tmp_path / "set" / "1.parquet")
    sparse(large, 1 << 40)
    with pytest.raises(DataError, match=r"it has 1,099,511,627,776 bytes|not a regular file"):
        list_images(Images(**words))

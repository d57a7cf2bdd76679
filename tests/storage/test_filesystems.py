"""Storage on this machine and on a server of S3's protocol: what is there, what is not, and what does not answer."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import re
import socket
from pathlib import Path
from unittest.mock import Mock

import boto3
import fsspec
import pytest
from botocore.exceptions import EndpointConnectionError
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from raydistill.errors import ConfigError, StorageError
from raydistill.storage.filesystems import (
    create_file,
    exists,
    open_filesystem,
    read_bytes,
    write_bytes,
    write_file,
)
from raydistill.storage.reachable import refuse_unreachable


def test_what_another_process_wrote_is_seen_at_once(bucket: str) -> None:
    write_bytes(f"{bucket}/w/first", b"1")
    fs, place = open_filesystem(f"{bucket}/w")
    assert fs.names(place) == ["first"]
    assert not exists(f"{bucket}/w/second")
    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).put_object(Bucket="runs", Key="w/second", Body=b"2")
    assert fs.names(place) == ["first", "second"]
    assert exists(f"{bucket}/w/second")
    assert read_bytes(f"{bucket}/w/second") == b"2"


@pytest.mark.parametrize("kind", ["disk", "memory", "bucket"])
def test_the_same_calls_give_the_same_answers_everywhere(kind: str, tmp_path: Path, bucket: str) -> None:
    root = {"disk": str(tmp_path / "w"), "memory": "memory://w", "bucket": f"{bucket}/w"}[kind]
    fs, place = open_filesystem(root)
    assert fs.names(place) == []
    assert fs.read(f"{place}/a") is None
    fs.remove(f"{place}/a")
    fs.make_folder(place)
    write_bytes(f"{root}/a", b"one")
    write_bytes(f"{root}/a", b"two")
    write_file(f"{root}/folder[1]/b", lambda temporary: Path(temporary).write_bytes(b"three"))
    write_bytes(f"{root}/folder1/b", b"four")
    assert fs.names(place) == ["a", "folder1", "folder[1]"]
    assert fs.read(f"{place}/a") == b"two"
    fs.remove(f"{place}/folder[1]")
    assert fs.names(place) == ["a", "folder1"]
    assert pickle.loads(pickle.dumps(fs)).read(f"{place}/a") == b"two"


def test_a_bucket_that_does_not_exist_is_named_and_not_made(bucket: str) -> None:
    with pytest.raises(ConfigError, match="workspace=s3://rums/w: there is no bucket 'rums'"):
        refuse_unreachable("s3://rums/w", "workspace")
    with pytest.raises(StorageError, match="there is no bucket 'rums'"):
        write_bytes("s3://rums/w/a", b"1")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    assert [b["Name"] for b in client.list_buckets()["Buckets"]] == ["runs"]
    refuse_unreachable(f"{bucket}/not/there/yet", "workspace")


def test_an_address_where_nothing_listens_is_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    LocalFileSystem.clear_instance_cache()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ConfigError, match=f"workspace={bucket}/w: .*does not answer.*127.0.0.1:{port}"):
        refuse_unreachable(f"{bucket}/w", "workspace")
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"gs://a/b: .*pip install 'raydistill\[gcs\]'"):
        open_filesystem("gs://a/b")
    with pytest.raises(ConfigError, match=r"abfs://a/b: .*pip install 'raydistill\[azure\]'"):
        open_filesystem("abfs://a/b")
    with pytest.raises(ConfigError, match=r"s4://a/b: .*s4"):
        open_filesystem("s4://a/b")
    for path in ("s3://", "s3:///x", "s3a://", "gs://", "s3://a b/x", "s3://a!/x", "az:///", "hf://", "s3://*/x"):
        with pytest.raises(ConfigError, match=rf"^{re.escape(path)}: no bucket is named; .*://BUCKET/FOLDER"):
            open_filesystem(path)
    for address in ("s3://key:se/cret@bucket/x", "gs://key:secret@bucket", "s3://:secret@bucket"):
        with pytest.raises(ConfigError, match=r"^\w+://\*\*\*@bucket\S*: do not put keys into a bucket"):
            open_filesystem(address)
    # Two that open a connection or a file at once.
    with pytest.raises(ConfigError, match=r"^ftp://127\.0\.0\.1:9/a: .*refused"):
        open_filesystem("ftp://127.0.0.1:9/a")
    with pytest.raises(ConfigError, match=r"^zip://a::/nowhere\.zip: .*No such file"):
        open_filesystem("zip://a::/nowhere.zip")


class InParts(AbstractBufferedFile):
    """Read part by part, as files of buckets are."""

    def _fetch_range(self, start, end):
        return self.fs.cat_file(self.path, start, end)


class Hiccups(MemoryFileSystem):
    """Fails a few times, then answers."""

    protocol = "hiccups"
    store: dict = {}  # noqa: RUF012 - fsspec's own way
    left: list[Exception] = []  # noqa: RUF012

    def cat_file(self, path, start=None, end=None, **kwargs):
        if self.left:
            raise self.left.pop(0)
        return super().cat_file(path, start, end, **kwargs)

    def _open(self, path, mode="rb", **kwargs):
        return InParts(self, path, block_size=2) if mode == "rb" else super()._open(path, mode, **kwargs)


@pytest.fixture
def hiccups(monkeypatch: pytest.MonkeyPatch) -> type[Hiccups]:
    fsspec.register_implementation("hiccups", Hiccups, clobber=True)
    write_bytes("hiccups://a", b"here")
    monkeypatch.setattr(Hiccups, "left", [])
    return Hiccups


PASSING = [
    OSError(errno.EBUSY, "SlowDown"),
    OSError(errno.EREMOTEIO, "We encountered an internal error"),
    ConnectionResetError("by peer"),
    TimeoutError(),
    EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_storage_that_hiccups_is_asked_again_and_it_is_said(error, hiccups, caplog) -> None:
    hiccups.left = [error, error]
    with caplog.at_level(logging.WARNING, "raydistill"):
        assert read_bytes("hiccups://a") == b"here"
    assert [record.message.count("does not answer") for record in caplog.records] == [1]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_storage_that_hiccups_within_a_file_is_asked_again(error, hiccups) -> None:
    fs, place = open_filesystem("hiccups://a", patience=0.3)
    with fs.open(place) as file:
        first = file.read(1)
        hiccups.left = [error]
        assert first + file.read() == b"here"
    hiccups.left = [error] * 9
    with fs.open(place) as file, pytest.raises(StorageError, match="/a: storage does not answer"):
        file.read()


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_storage_that_stays_away_ends_in_one_sentence(error, hiccups) -> None:
    hiccups.left = [error] * 9
    fs, place = open_filesystem("hiccups://a", patience=0.1)
    with pytest.raises(StorageError, match="/a: storage does not answer"):
        fs.cat_file(place)


def test_what_will_not_change_is_not_asked_again(hiccups) -> None:
    for error in (FileNotFoundError("a"), OSError(errno.EINVAL, "412"), ValueError("no")):
        hiccups.left = [error]
        with pytest.raises(type(error)) as raised:
            read_bytes("hiccups://a")
        assert raised.value is error
    hiccups.left = [PermissionError("AccessDenied")]
    with pytest.raises(PermissionError, match="refuses access \\(AccessDenied\\); check this process's keys"):
        read_bytes("hiccups://a")


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_is_made_where_there_is_none(tmp_path, monkeypatch, has_links) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", Mock(side_effect=PermissionError(errno.EPERM, "as exFAT says")))
    create_file(str(tmp_path / "a"), b"one")
    with pytest.raises(FileExistsError):
        create_file(str(tmp_path / "a"), b"two")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"one"]


def test_a_disk_that_is_mounted_from_elsewhere_is_asked_again(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a").write_bytes(b"here")
    answers = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error"), b"here"]
    monkeypatch.setattr(LocalFileSystem, "cat_file", Mock(side_effect=answers))
    assert read_bytes(str(tmp_path / "a")) == b"here"


@pytest.mark.parametrize("name", ["a::b", "file:x", "local:x", "memory:x", "~x", "c:\\d", "a b", "http:x"])
def test_a_folder_of_any_name_is_a_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "one").write_text("here")
    for path in (name, f"./{name}/", str(tmp_path / name)):
        fs, place = open_filesystem(path)
        assert fs.cat_file(f"{place}/one") == b"here", path


def test_a_web_server_that_is_down_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, and nobody listens
        with pytest.raises(ConfigError, match=r"images\.path=http://.*no server answers there"):
            refuse_unreachable(f"http://127.0.0.1:{free.getsockname()[1]}/x.csv", "images.path")

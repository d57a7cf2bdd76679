"""What a bucket is asked: how many requests of each kind, what its refusals become, and how large files get there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import boto3
import numpy as np
import pytest

from raydistill.config import Images, RunConfig
from raydistill.data.reuse import find_known
from raydistill.data.sources.listing import list_images
from raydistill.data.sources.reading import read_pictures
from raydistill.data.targets import encode_targets
from raydistill.engine.checkpoints import drop_checkpoints
from raydistill.engine.records import drop_epochs_after, read_epochs, write_epoch
from raydistill.errors import ConfigError, StorageError
from raydistill.storage.directory import StageDirectory, check_writable
from raydistill.storage.filesystems import exists, open_filesystem, read_bytes, write_bytes, write_file
from raydistill.storage.lease import held
from raydistill.storage.reachable import refuse_unreachable
from tests.buckets import Line

PICTURES = {f"{name}/{k}.png": b"a picture" for name in ("cat", "dog") for k in range(20)}


@pytest.fixture
def counted(s3_line: Line) -> Callable[[Callable[[], object]], Counter[str]]:
    def count(call: Callable[[], object]) -> Counter[str]:
        s3_line.requests.clear()
        call()
        return s3_line.kinds()

    return count


@pytest.fixture
def client(bucket: str):
    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


def test_a_question_about_one_file_is_one_request(bucket: str, counted) -> None:
    write_bytes(f"{bucket}/w/a", b"1")
    write_bytes(f"{bucket}/w/empty", b"")
    fs, place = open_filesystem(f"{bucket}/w")
    assert counted(lambda: exists(f"{bucket}/w/a")) == {"GET": 1}
    assert counted(lambda: exists(f"{bucket}/w/b")) == {"GET": 1}
    assert counted(lambda: read_bytes(f"{bucket}/w/a")) == {"GET": 1}
    assert counted(lambda: refuse_unreachable(f"{bucket}/w", "workspace")) == {"GET": 1}
    assert counted(lambda: fs.remove_file(f"{place}/a")) == {"DELETE": 1}
    fs.remove_file(f"{place}/a")
    assert (exists(f"{bucket}/w/a"), exists(f"{bucket}/w/empty"), exists(f"{bucket}/w")) == (False, True, False)
    assert fs.read(f"{place}/empty") == b""
    write_bytes(f"{bucket}/w/c", b"123")
    with pytest.raises(OSError, match="above 2"):
        fs.read_at_most(f"{place}/c", 2)
    assert fs.read_at_most(f"{place}/c", 3) == b"123"


def test_images_are_listed_once_and_each_is_asked_for_once(bucket: str, counted) -> None:
    for name, data in PICTURES.items():
        write_bytes(f"{bucket}/images/{name}", data)
    listing = list_images(Images(path=f"{bucket}/images"))
    assert counted(lambda: list_images(Images(path=f"{bucket}/images"))) == {"GET": 1, "LIST": 1}
    places = [(entry.path, None) for entry in listing.entries]
    assert counted(lambda: list(read_pictures(places, 1 << 20, f"{bucket}/images"))) == {"GET": len(PICTURES)}
    assert [data for _, data, _ in read_pictures(places, 1 << 20, f"{bucket}/images")] == [b"a picture"] * len(PICTURES)
    # A table costs a listing of each folder that it names.
    rows = "".join(f"images/{name},{name.partition('/')[0]}\n" for name in PICTURES)
    write_bytes(f"{bucket}/table.csv", f"path,label\n{rows}images/cat/gone.png,cat\n".encode())
    table = Images(path=f"{bucket}/table.csv")
    first = list_images(table).fingerprint
    assert counted(lambda: list_images(table))["HEAD"] < 5
    assert counted(lambda: list_images(table))["LIST"] <= 3, "two folders, and the missing picture"
    assert list_images(table).fingerprint == first
    write_bytes(f"{bucket}/images/dog/7.png", b"another picture")
    assert list_images(table).fingerprint != first


def test_a_stage_s_directory_is_not_listed(bucket: str, counted) -> None:
    directory = StageDirectory(f"{bucket}/teach-0123456789ab", "teach", "{}")

    def stage() -> None:
        with held(directory, print) as is_to_do:
            assert is_to_do
            assert directory.begin() == frozenset()
            directory.finish({"path": directory.path})

    assert counted(stage)["LIST"] == 0
    write_bytes(f"{directory.path}/train-00000.safetensors", b"")
    assert "train-00000.safetensors" in directory.begin(), "but where a command has begun before, once"
    for epoch in (1, 2, 3):
        write_epoch(directory.path, {"epoch": epoch, "step": 4.0 * epoch})
    assert counted(lambda: drop_epochs_after(directory.path, 8)) == {"GET": 4, "DELETE": 1}
    assert len(read_epochs(directory.path)) == 2
    for step, file in [(4, "state.pt"), (8, "state.pt"), (8, "checkpoint.json"), (8, "mine.txt")]:
        write_bytes(f"{directory.path}/checkpoints/step-{step:09d}/{file}", b"x")
    names = ["step-000000008", "step-000000004"]
    assert counted(lambda: drop_checkpoints(directory.path, names[:1], names))["LIST"] == 0
    assert counted(lambda: drop_checkpoints(directory.path))["LIST"] == 1
    fs, place = open_filesystem(f"{directory.path}/checkpoints")
    assert fs.find(place) == [f"{place}/step-000000008/mine.txt"]


def test_soft_targets_in_a_bucket_are_known_again(bucket: str) -> None:
    ids = ["0" * 32, "1" * 32]
    write_bytes(f"{bucket}/a.safetensors", encode_targets(ids, np.zeros((1, 2, 3))))
    assert find_known([f"{bucket}/a.safetensors"]).find(ids[1:]) == {f"{bucket}/a.safetensors": [(0, 1)]}


def job(bucket: str) -> RunConfig:
    return RunConfig.model_validate({"workspace": f"{bucket}/w", "images": {"path": "unused"}})


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("ExpiredToken", "refuses access .The server says ExpiredToken.*; renew this process's token"),
        ("RequestTimeTooSkewed", "refuses access .*TooSkewed.*; set this machine's clock"),
        ("AccessDenied", "refuses access .*AccessDenied.*; check this process's keys"),
        ("InvalidAccessKeyId", "refuses access .*InvalidAccessKeyId.*; check this process's keys"),
        ("SignatureDoesNotMatch", "refuses access .*SignatureDoesNotMatch.*; check this process's keys"),
        ("PermanentRedirect", "PermanentRedirect"),
    ],
)
def test_what_is_refused_is_named_at_once(bucket: str, s3_line: Line, code: str, words: str) -> None:
    s3_line.refuse = lambda kind, key: code
    with pytest.raises(ConfigError, match=f"^workspace={bucket}/w: .*{words}"):
        refuse_unreachable(f"{bucket}/w", "workspace")
    assert len(s3_line.requests) <= 2, "asked again, though the answer will be the same"


@pytest.mark.parametrize(("code", "words"), [("AccessDenied", "AccessDenied"), ("QuotaExceeded", "bucket is full")])
def test_a_bucket_that_takes_nothing_is_named_at_once(bucket: str, s3_line: Line, code: str, words: str) -> None:
    s3_line.refuse = lambda kind, key: code if kind == "PUT" else None
    with pytest.raises(ConfigError, match=f"^workspace={bucket}/w: cannot be written .*{words}"):
        check_writable(job(bucket))
    if code == "QuotaExceeded":
        with pytest.raises(StorageError, match=r"runs/w/a: the bucket is full .*make room there"):
            write_bytes(f"{bucket}/w/a", b"1")
    assert s3_line.kinds()["PUT"] <= 2, "asked again, though the answer will be the same"


def test_large_files_go_in_parts_and_one_that_is_cut_off_leaves_nothing(bucket, s3_line, counted, client, tmp_path):
    size = 101 << 20  # s3fs's parts have 50 MiB

    def write(place: str) -> None:
        with open(place, "wb") as file:
            file.truncate(size)

    assert counted(lambda: write_file(f"{bucket}/w/weights", write)) == {"POST": 2, "PUT": 3}
    assert client.head_object(Bucket="runs", Key="w/weights")["ContentLength"] == size
    parts = []
    s3_line.refuse = lambda kind, key: (
        "QuotaExceeded" if kind == "PUT" and (parts.append(key) or len(parts) > 2) else None
    )
    with pytest.raises(StorageError, match="the bucket is full"):
        write_file(f"{bucket}/w/more", write)
    s3_line.refuse = lambda kind, key: None
    assert not exists(f"{bucket}/w/more")
    assert not client.list_multipart_uploads(Bucket="runs").get("Uploads"), "parts cost money too"
    assert not list(Path(tmp_path).iterdir())

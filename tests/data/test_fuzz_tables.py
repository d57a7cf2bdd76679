"""Mutated tables, archives and lists: each is read or refused in one sentence, soon, and no signal ends the process."""

from __future__ import annotations

import io
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from raydistill.config import Images
from raydistill.data.images import list_images
from raydistill.data.many import count_rows, list_rows, read_rows
from raydistill.errors import CheckpointError, DataError
from raydistill.storage.tables import read_table
from tests.data.test_fuzz import mutated

MOST_SECONDS, RNG = 10, np.random.default_rng(0)
PLAIN = pa.table({
    "image": [RNG.bytes(40) for _ in range(30)], "label": ["a", "b"] * 15, "split": ["train"] * 30, "n": range(30),
})  # fmt: skip
STRUCTS = pa.table({
    "image": [{"bytes": RNG.bytes(40), "path": "x"} for _ in range(30)],
    "label": pa.array(["a", "b"] * 15).dictionary_encode(),
})  # fmt: skip


def parquet(table: pa.Table, **options: object) -> bytes:
    pq.write_table(table, sink := io.BytesIO(), row_group_size=10, **options)
    return sink.getvalue()


def arrow(table: pa.Table, make: Callable, compression: str | None = None) -> bytes:
    with make(sink := io.BytesIO(), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=10)
    return sink.getvalue()


def tar(kind: int) -> bytes:
    with tarfile.open(fileobj=(sink := io.BytesIO()), mode="w", format=kind) as archive:
        for name, data in (
            pair for k in range(5) for pair in ((f"{k}.png", RNG.bytes(50)), (f"{k}" * 120 + ".cls", b"a"))
        ):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), {"comment": "é" * 20}
            archive.addfile(member, io.BytesIO(data))
    return sink.getvalue()


ORIGINALS = {
    "parquet": [
        parquet(PLAIN), parquet(STRUCTS), parquet(PLAIN, compression="zstd", data_page_version="2.0"),
        parquet(PLAIN, use_dictionary=False, column_encoding={"label": "DELTA_BYTE_ARRAY"}),
    ],
    "arrow": [
        arrow(PLAIN, pa.ipc.new_stream), arrow(STRUCTS, pa.ipc.new_file), arrow(PLAIN, pa.ipc.new_file, "lz4"),
        arrow(STRUCTS, pa.ipc.new_stream, "zstd"),
    ],
    "tar": [tar(tarfile.PAX_FORMAT), tar(tarfile.GNU_FORMAT)],
    "csv": [
        b"path,label,split\r\n" + b'a.png,x,train\r\n"b, ""c"".png",y,\r\nhttps://a/b,x,\r\n' * 20,
        b"label,path\n" + b"a,b\nc,d\n" * 30,
    ],
    "jsonl": [
        b'{"path": "a.png", "more": ["%s", {"b": null}], "label": "x"}\n' % (b"z" * 500)
        + b'{"path": "b.png", "label": 3}\n',
    ],
}  # fmt: skip


def readers(path: str) -> list[Callable[[], object]]:
    if path.endswith(("csv", "jsonl")):
        return [lambda: list_images(Images(path=path))]
    many: list[Callable[[], object]] = [
        lambda: list(list_rows(path, Counter(), Counter())),
        lambda: list(read_rows(path, range(5))),
        lambda: count_rows(path),
    ]
    own = pa.schema([("image", pa.binary()), ("label", pa.string()), ("n", pa.int64())])
    return [*many, lambda: read_table(path, own)] if path.endswith("parquet") else many


def fuzz(path: Path, count: int, seed: int) -> tuple[int, int]:
    """How often something was read, and how often refused."""
    originals, rng = ORIGINALS[path.suffix[1:]], np.random.default_rng(seed)
    read = refused = 0
    for _ in range(count):
        data = mutated(originals[int(rng.integers(0, len(originals)))], originals, rng)
        path.write_bytes(data)
        for reader in readers(str(path)):
            started = time.monotonic()
            try:
                reader()
            except (DataError, CheckpointError) as error:
                refused += 1
                if "\n" in str(error):
                    raise AssertionError(f"{error} of {data.hex()}") from error
            except BaseException as error:
                raise AssertionError(f"{type(error).__name__} of {data.hex()}") from error
            else:
                read += 1
            assert time.monotonic() - started < MOST_SECONDS, data.hex()
    return read, refused


@pytest.mark.parametrize("kind", ORIGINALS)
def test_what_is_mutated_can_be_read(tmp_path, kind):
    for k, data in enumerate(ORIGINALS[kind]):
        (tmp_path / f"{k}.{kind}").write_bytes(data)
        assert all(reader() for reader in readers(str(tmp_path / f"{k}.{kind}"))[:3])


@pytest.mark.parametrize("kind", ORIGINALS)
def test_mutated_tables_are_read_or_refused(tmp_path, kind):
    assert min(fuzz(tmp_path / f"t.{kind}", 40, seed=1)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ORIGINALS)
def test_two_thousand_mutated_tables(tmp_path, kind):
    seed = int(time.time())
    print(f"seed {seed}")
    assert min(fuzz(tmp_path / f"t.{kind}", 2000, seed)) > 0

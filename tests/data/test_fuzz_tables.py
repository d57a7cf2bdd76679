"""Mutated tables, archives and lists: each is read or refused in one sentence, soon, and no signal ends the process."""

from __future__ import annotations

import copy
import io
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from raydistill.config import Images
from raydistill.data.sources.containers import count_rows, list_rows, read_rows
from raydistill.data.sources.listing import list_images
from raydistill.storage.tables import read_table
from tests.data.test_fuzz import is_accepted, mutated
from tests.image_files import tar_of

RNG = np.random.default_rng(0)
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


MEMBERS = {name: data for k in range(5) for name, data in ((f"{k}.png", RNG.bytes(50)), (f"{k}" * 120 + ".cls", b"a"))}


ORIGINALS = {
    "parquet": [
        parquet(PLAIN), parquet(STRUCTS), parquet(PLAIN, compression="zstd", data_page_version="2.0"),
        parquet(PLAIN, use_dictionary=False, column_encoding={"label": "DELTA_BYTE_ARRAY"}),
    ],
    "arrow": [
        arrow(PLAIN, pa.ipc.new_stream), arrow(STRUCTS, pa.ipc.new_file), arrow(PLAIN, pa.ipc.new_file, "lz4"),
        arrow(STRUCTS, pa.ipc.new_stream, "zstd"),
    ],
    "tar": [tar_of(MEMBERS, "é" * 20, kind) for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)],
    "csv": [
        b"path,label,split\r\n" + b'a.png,x,train\r\n"b, ""c"".png",y,\r\nhttps://a/b,x,\r\n' * 20,
        b"label,path\n" + b"a,b\nc,d\n" * 30,
    ],
    "jsonl": [
        b'{"path": "a.png", "more": ["%s", {"b": null}], "label": "x"}\n' % (b"z" * 500)
        + b'{"path": "b.png", "label": 3}\n',
    ],
}  # fmt: skip


def number_of(stream: io.BytesIO) -> int:
    value = shift = 0
    while (byte := stream.read(1)[0]) > 127:
        value, shift = value | (byte & 127) << shift, shift + 7
    return value | byte << shift


def signed(value: int) -> int:
    return value >> 1 ^ -(value & 1)


def bytes_of(value: int, is_signed: bool = True) -> bytes:
    value = abs(value) * 2 - (value < 0) if is_signed else value
    return (bytes([value & 127 | 128]) + bytes_of(value >> 7, False)) if value > 127 else bytes([value])


def parsed(stream: io.BytesIO, kind: int) -> Any:
    """A value of Thrift's compact protocol: of a list its elements' kind and they, of a struct its fields, each with
    number and kind."""
    if kind in (4, 5, 6):
        return signed(number_of(stream))
    if kind in (3, 7):
        return stream.read(1 if kind == 3 else 8)
    if kind == 8:
        return stream.read(number_of(stream))
    if kind == 9:
        head = stream.read(1)[0]
        count = head >> 4 if head >> 4 < 15 else number_of(stream)
        return [head & 15, [parsed(stream, head & 15) for _ in range(count)]]
    fields, number = [], 0
    while kind == 12 and (head := stream.read(1)[0]):
        number = number + (head >> 4) if head >> 4 else signed(number_of(stream))
        fields.append([number, head & 15, parsed(stream, head & 15)])
    return fields


def unparsed(kind: int, value: Any) -> bytes:
    if kind in (4, 5, 6):
        return bytes_of(value)
    if kind in (3, 7):
        return bytes(value)
    if kind == 8:
        return bytes_of(len(value), False) + value
    if kind == 9:
        inner = b"".join(unparsed(value[0], v) for v in value[1])
        return bytes([240 | value[0]]) + bytes_of(len(value[1]), False) + inner
    return b"".join(bytes([own]) + bytes_of(n) + unparsed(own, v) for n, own, v in value) + b"\0" * (kind == 12)


def places(kind: int, value: Any) -> Iterator[tuple[int, list[Any]]]:
    """Kinds of the values in a value, and the lists whose last element each is."""
    for part in value if kind == 12 else ():
        yield part[1], part
        yield from places(part[1], part[2])
    for element in value[1] if kind == 9 else ():
        yield from places(value[0], element)


def mutated_footer(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """A parquet file with other numbers, names, lists and fields in its footer, which still reads as one."""
    length = int.from_bytes(data[-8:-4], "little")
    footer = parsed(io.BytesIO(data[-8 - length : -8]), 12)
    for _ in range(int(rng.integers(1, 4))):
        found = list(places(12, footer))
        kind, part = found[int(rng.integers(0, len(found)))]
        value, other = part[-1], found[int(rng.integers(0, len(found)))]
        change = rng.random()
        if change < 0.05:
            part[0] += int(rng.integers(-3, 4))  # another field
        elif change < 0.1:
            part[1:] = other[0], copy.deepcopy(other[1][-1])  # another kind
        elif kind in (4, 5, 6):
            step = int(rng.integers(-2, 3))
            extremes = [0, -1, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, -(2**63), 2**70, len(data), value * 1000]
            part[-1] = value + step if step else extremes[int(rng.integers(0, len(extremes)))]
        elif kind == 8:
            texts = [b"", value[:-1], value * 2, value * 100, b"\xff\0", rng.bytes(len(value))]
            part[-1] = texts[int(rng.integers(0, len(texts)))]
        elif kind == 9 and value[1]:
            at = int(rng.integers(0, len(value[1])))
            value[1][at : at + 1] = [copy.deepcopy(value[1][at]) for _ in range(int(rng.choice([0, 2, 2, 1000])))]
        elif kind == 12 and value:
            del value[int(rng.integers(0, len(value)))]
    new = unparsed(12, footer)
    return data[: -8 - length] + new + len(new).to_bytes(4, "little") + b"PAR1"


KINDS = {**dict.fromkeys(ORIGINALS, mutated), "footer": mutated_footer}


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


def fuzz(folder: Path, kind: str, count: int, seed: int) -> tuple[int, int]:
    """How often something was read, and how often refused."""
    path = folder / f"t.{kind.replace('footer', 'parquet')}"
    originals, rng = ORIGINALS[path.suffix[1:]], np.random.default_rng(seed)
    counts = [0, 0]
    for _ in range(count):
        data = KINDS[kind](originals[int(rng.integers(0, len(originals)))], originals, rng)
        path.write_bytes(data)
        for reader in readers(str(path)):
            counts[is_accepted(data, reader, 10)] += 1
    return counts[1], counts[0]


@pytest.mark.parametrize("kind", ORIGINALS)
def test_what_is_mutated_can_be_read(tmp_path, kind):
    for k, data in enumerate(ORIGINALS[kind]):
        (tmp_path / f"{k}.{kind}").write_bytes(data)
        assert all(reader() for reader in readers(str(tmp_path / f"{k}.{kind}"))[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_tables_are_read_or_refused(tmp_path, kind):
    assert min(fuzz(tmp_path, kind, 40, seed=1)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_mutated_tables(tmp_path, kind):
    seed = int(time.time())
    print(f"seed {seed}")
    assert min(fuzz(tmp_path, kind, 2000, seed)) > 0

"""What Arrow would read otherwise than our reader of headers is refused. The tests' own codec changes the files."""

import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from raydistill.data.sources.containers import list_rows, read_rows
from raydistill.errors import DataError

I32, I64, BINARY, LIST, SET, STRUCT = 5, 6, 8, 9, 10, 12


class Thrift:
    """Structs of the compact protocol as lists of [number, type, value], and a list's value as [type, items]."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        byte = self.take(1)[0]
        return byte if byte < 128 else byte - 128 + (self.varint() << 7)

    def value(self, kind: int) -> Any:
        if kind == STRUCT:
            fields, number = [], 0
            while head := self.take(1)[0]:
                number = number + (head >> 4) if head >> 4 else (self.varint() >> 1)
                fields.append([number, head & 15, self.value(head & 15)])
            return fields
        if kind in (LIST, SET):
            head = self.take(1)[0]
            count = head >> 4 if head >> 4 < 15 else self.varint()
            return [head & 15, [self.value(head & 15) for _ in range(count)]]
        if kind in (I32, I64):
            value = self.varint()
            return value >> 1 ^ -(value & 1)
        return self.take(self.varint()) if kind == BINARY else self.take({3: 1, 7: 8}.get(kind, 0))


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def encoded(kind: int, value: Any) -> bytes:
    if kind == STRUCT:
        return b"".join(bytes([k]) + varint(n << 1) + encoded(k, v) for n, k, v in value) + b"\0"
    if kind in (LIST, SET):
        return bytes([0xF0 | value[0]]) + varint(len(value[1])) + b"".join(encoded(value[0], v) for v in value[1])
    if kind in (I32, I64):
        return varint(value << 1 if value >= 0 else (-value << 1) - 1)
    return varint(len(value)) + value if kind == BINARY else value


def fields(struct: list, *path: int) -> list:
    """The fields of the struct at the end of a path; of a list's first struct."""
    for number in path:
        value = next(field[2] for field in struct if field[0] == number)
        struct = value if not value or isinstance(value[0], list) else value[1][0]
    return struct


def of(struct: list, *path: int) -> list:
    return next(field for field in fields(struct, *path[:-1]) if field[0] == path[-1])


def rewritten(data: bytes, on_page: Callable, on_footer: Callable) -> bytes:
    """A parquet file with each page's header and the footer changed, at the places to which these move."""
    footer = Thrift(data[-8 - int.from_bytes(data[-8:-4], "little") : -8]).value(STRUCT)
    body = b"PAR1"
    for chunk in (chunk for group in of(footer, 4)[2][1] for chunk in of(group, 1)[2][1]):
        column = of(chunk, 3)[2]
        places = {field[0]: field[2] for field in column if field[0] in (9, 11)}
        at, start = min(places.values()), len(body)
        end = at + of(column, 7)[2]
        while at < end:
            for number, place in places.items():
                if place == at:
                    of(column, number)[2] = len(body)
            page = Thrift(data[at:end])
            header = page.value(STRUCT)
            content = page.take(of(header, 3)[2])
            at += page.at
            on_page(header)
            body += encoded(STRUCT, header) + content
        of(column, 7)[2] = len(body) - start
    on_footer(footer)
    end = encoded(STRUCT, footer)
    return body + end + len(end).to_bytes(4, "little") + b"PAR1"


def honest(**options: Any) -> bytes:
    table = pa.table({"image": [b"%d" % k for k in range(40)], "label": ["a", "b"] * 20, "split": ["train"] * 40})
    pq.write_table(table, file := io.BytesIO(), row_group_size=20, store_schema=False, **options)
    return file.getvalue()


def unchanged(struct: list) -> None:
    pass


def again(*path: int, kind: int, value: Any = 7) -> Callable:
    """A second field of that number, of another type, which Thrift skips."""
    return lambda struct: fields(struct, *path[:-1]).append([path[-1], kind, value])


def instead(*path: int, kind: int) -> Callable:
    """Such a field, and the true one under a number that Thrift cuts down to the field's."""

    def change(struct: list) -> None:
        field = of(struct, *path)
        fields(struct, *path[:-1]).append([65536 + path[-1], *field[1:]])
        field[1:] = [kind, 7]

    return change


def longer(amount: int, *path: int) -> Callable:
    """A number that Thrift cuts down to the true one."""

    def change(struct: list) -> None:
        of(struct, *path)[2] += amount

    return change


def one_place(footer: list) -> None:
    groups = of(footer, 4)[2]
    groups[1] = [groups[1][0]] * 2


def of_bytes(footer: list) -> None:
    """Encodings take a byte each, so that Thrift, which asks for no type, reads them as the numbers that they are."""
    encodings = of(footer, *COLUMN, 2)[2]
    encodings[:] = [3, [bytes([2 * item]) for item in encodings[1]]]


def before_the_pages(footer: list) -> None:
    """Columns end with their dictionaries, and Arrow reads a hundred bytes further."""
    of(footer, 6)[2] = b"parquet-mr version 1.2.8"
    for group in of(footer, 4)[2][1]:
        for column in (of(chunk, 3)[2] for chunk in of(group, 1)[2][1]):
            of(column, 7)[2] = of(column, 9)[2] - of(column, 11)[2]


COLUMN = (4, 1, 3)
# A change of each page's header or of the footer, and what is said. Arrow reads each as the honest file.
CHANGES = {
    "page: a second size": (again(2, kind=I64), unchanged, "repeated"),
    "page: a second packed size": (again(3, kind=I64), unchanged, "repeated"),
    "page: a second kind": (again(1, kind=I64), unchanged, "repeated"),
    "page: a far number": (instead(2, kind=I64), unchanged, "another type"),
    "page: a long size": (longer(1 << 32, 2), unchanged, "too long"),
    "page: a long packed size": (longer(1 << 32, 3), unchanged, "too long"),
    "column: a second size": (unchanged, again(*COLUMN, 6, kind=I32), "repeated"),
    "column: a second packed size": (unchanged, again(*COLUMN, 7, kind=I32), "repeated"),
    "column: a second place": (unchanged, again(*COLUMN, 9, kind=I32), "repeated"),
    "column: a far number": (unchanged, instead(*COLUMN, 11, kind=I32), "another type"),
    "column: a long size": (unchanged, longer(1 << 64, *COLUMN, 6), "too long"),
    "column: encodings of another type": (unchanged, of_bytes, "a list of another kind"),
    "column: a second one": (unchanged, again(4, 1, 3, kind=LIST, value=[STRUCT, []]), "repeated"),
    "group: second rows": (unchanged, again(4, 3, kind=I32), "repeated"),
    "group: a set of columns": (unchanged, again(4, 1, kind=SET, value=[STRUCT, []]), "repeated"),
    "footer: a set of groups": (unchanged, again(4, kind=SET, value=[STRUCT, []]), "repeated"),
    "footer: a set of elements": (unchanged, again(2, kind=SET, value=[STRUCT, []]), "repeated"),
    "footer: one place for two groups": (unchanged, one_place, "overlap"),
    "footer: pages behind the column": (unchanged, before_the_pages, "does not end with its pages"),
}


def rows(path: Path) -> list[tuple]:
    pictures = dict(read_rows(str(path), range(40)))
    return [(row.label, row.split, pictures[row.number]) for row in list_rows(str(path), Counter(), Counter())]


def test_the_codec_of_these_tests_changes_nothing(tmp_path):
    (tmp_path / "t.parquet").write_bytes(rewritten(honest(), unchanged, unchanged))
    assert rows(tmp_path / "t.parquet") == [("ab"[k % 2], "train", b"%d" % k) for k in range(40)]


OPTIONS = {
    "1.0": {"version": "1.0", "compression": "none"},
    "2.6, with all that describes it": {
        "data_page_version": "2.0", "write_page_index": True, "write_page_checksum": True, "compression": "brotli",
        "sorting_columns": [pq.SortingColumn(0)], "data_page_size": 10,
    },
    "no dictionary": {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY", "compression": "lz4"},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_honest_headers_of_each_form_are_read(tmp_path, name):
    (tmp_path / "t.parquet").write_bytes(honest(**OPTIONS[name]))
    assert rows(tmp_path / "t.parquet") == [("ab"[k % 2], "train", b"%d" % k) for k in range(40)]


def test_a_column_is_found_by_its_place_whatever_path_it_states(tmp_path):
    """As Arrow finds it."""

    def elsewhere(footer: list) -> None:
        of(footer, 4, 1, 3, 3)[2][1] = [b"elsewhere"]

    table = pa.table({"image": [bytes(70 << 20)], "label": ["a"]})
    pq.write_table(table, file := io.BytesIO(), compression="zstd", use_dictionary=False, write_statistics=False)
    for change in (unchanged, elsewhere):
        (tmp_path / "t.parquet").write_bytes(rewritten(file.getvalue(), unchanged, change))
        with pytest.raises(DataError, match=r"t\.parquet: .*the column image.*: a decompression bomb"):
            list(read_rows(str(tmp_path / "t.parquet"), [0]))


@pytest.mark.parametrize("name", CHANGES)
def test_headers_that_arrow_reads_otherwise_are_refused(tmp_path, name):
    on_page, on_footer, reason = CHANGES[name]
    data = rewritten(honest(), on_page, on_footer)
    assert pq.read_table(io.BytesIO(data)).num_rows == 40
    (tmp_path / "t.parquet").write_bytes(data)
    with pytest.raises(DataError, match=rf"t\.parquet: not a parquet file, or a damaged one \(.*{re.escape(reason)}"):
        rows(tmp_path / "t.parquet")

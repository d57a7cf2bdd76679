"""Tables of paths: .csv, .tsv and .jsonl with the columns `path`, `label` and maybe `split`."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from raydistill.data.labels import label_of, refuse_many_classes
from raydistill.errors import DataError
from raydistill.escaping import quoted, shortened
from raydistill.storage.filesystems import FileSystem
from raydistill.storage.tables import named, refuse_few_bytes
from raydistill.yaml_files import KeyTwiceError, no_key_twice

SUFFIXES = (".csv", ".tsv", ".jsonl")
_MOST_BYTES, _LONGEST_LINE = 1 << 30, 1 << 24
_COLUMNS = ("path", "label", "split")
_NO_OBJECT = "is not a JSON object; write one on each line, and no comma or list around them"
_ADVICE = "`path` and `label` are required, `split` is optional"


class PathRow(NamedTuple):
    """Path and split as the table writes them; `number` is the line number."""

    path: str
    label: str | None
    split: object
    table: str
    number: int

    @property
    def where(self) -> str:
        return f"{self.table}: line {self.number}"


def read_path_table(fs: FileSystem, table: str, notes: Counter[str]) -> Iterator[PathRow]:
    """Raises DataError with the line: a row that does not fit, a column that is missing or there twice, or another
    encoding or delimiter."""
    shown, is_json = quoted(table), table.lower().endswith(".jsonl")
    lines = _lines(fs, table, shown, "\n" if is_json else "")
    plain = dict[str, str]()  # labels that are read as they look: most rows repeat one
    for number, row in _json_rows(shown, lines) if is_json else _csv_rows(shown, lines):
        if "path" not in row or "label" not in row:
            found = ", ".join(named(str(name)) for name in list(row)[:5])
            raise DataError(f"{shown}: line {number} ({found}) lacks a column{_near(row)}; {_ADVICE}")
        path, value = row["path"], row["label"]
        if not path:
            raise DataError(f"{shown}: line {number} has no path")
        if not isinstance(path, str):
            raise DataError(f"{shown}: line {number}: the path is not text but {shortened(repr(path))}")
        if "\0" in path:
            raise DataError(f"{shown}: line {number}: the path holds a NUL, which no file name can hold")
        label = plain.get(value) if isinstance(value, str) else None
        if label is None:
            label = label_of(value, f"{shown}: line {number}", notes)
            if label is not None and label == value:
                plain[label] = label
                refuse_many_classes(len(plain), shown)
        yield PathRow(path, label, row.get("split"), shown, number)


def _lines(fs: FileSystem, table: str, shown: str, newline: str) -> Iterator[str]:
    """One by one: a table may be very large, and a line endless."""
    try:
        with fs.open(table) as file:
            if (size := file.seek(0, 2)) > _MOST_BYTES:
                raise DataError(f"{shown}: it has {size:,} bytes, above {_MOST_BYTES:,}; make several tables of it")
            file.seek(0)
            head = file.read(4)
            if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:  # a NUL: UTF-16 or UTF-32 without a mark
                raise DataError(f"{shown}: not UTF-8, but UTF-16, UTF-32 or not text; save it as UTF-8")
            file.seek(0)
            text = io.TextIOWrapper(file, "utf-8-sig", newline=newline)
            try:
                length = 0
                for number, line in enumerate(iter(partial(text.readline, _LONGEST_LINE), ""), 1):
                    if len(line) == _LONGEST_LINE:
                        raise DataError(f"{shown}: line {number} has more than {_LONGEST_LINE:,} characters")
                    refuse_few_bytes(number, length := length + len(line), shown)
                    yield line
            except UnicodeDecodeError:
                raise DataError(f"{shown}: line {_undecodable(file)} is not UTF-8; save the table as UTF-8") from None
    except OSError as error:
        raise DataError(f"{shown}: cannot be read: {error.strerror or error}") from None


def _undecodable(file: Any) -> int:
    """The number of the line. The text wrapper decodes in blocks, so its position is further on."""
    file.seek(0)
    for number, line in enumerate(iter(partial(file.readline, _LONGEST_LINE), b""), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return 0


def _csv_rows(shown: str, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    delimiter = "\t" if shown.lower().rstrip("'").endswith(".tsv") else ","
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    try:
        for cells in rows:
            if not any(cells):
                continue
            if columns is None:
                columns = [cell.strip() for cell in cells]
                _check_header(columns, f"{shown}: line {rows.line_num}", delimiter)
            elif len(cells := _fitted(cells, columns)) != len(columns):
                raise DataError(
                    f"{shown}: line {rows.line_num} has {len(cells)} fields and the header {len(columns)}; put a label "
                    'with a comma in quotes ("a, b"), and write empty fields too'
                )
            else:
                yield rows.line_num, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{shown}: line {rows.line_num}: {error}; is a quote not closed?") from None


def _fitted(cells: list[str], columns: list[str]) -> list[str]:
    """Without empty cells after the header's columns, and with empty ones for columns without a name: in some tables a
    comma ends each line."""
    if not any(columns[len(cells) :]):
        cells = cells + [""] * (len(columns) - len(cells))
    return cells if any(cells[len(columns) :]) else cells[: len(columns)]


def _check_header(columns: list[str], where: str, delimiter: str) -> None:
    if twice := [name for name in _COLUMNS if columns.count(name) > 1]:
        raise DataError(f"{where} has several columns {twice[0]}; keep one")
    if {"path", "label"} <= set(columns):
        return
    found = ", ".join(quoted(name[:40]) for name in columns[:5])
    other = next((sign for sign in (";", "\t", "|", ",") if sign != delimiter and sign in columns[0]), None)
    if len(columns) == 1 and other is not None:
        name = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}[other]
        right = "commas" if delimiter == "," else "tabs, or as .csv"
        raise DataError(f"{where} ({found}): the fields are separated by {name}; save it with {right}")
    raise DataError(f"{where} ({found}) does not name the columns{_near(dict.fromkeys(columns))}; {_ADVICE}")


def _near(row: dict[str, Any]) -> str:
    """Advice if a name is right except for case, quotes or invisible characters around it."""
    meant = {name: name.strip(" \t\xa0\u200b\ufeff'\"").casefold() for name in map(str, row) if name not in _COLUMNS}
    near = [f"{quoted(name)} as {right}" for name, right in meant.items() if right in _COLUMNS]
    return f": write {', '.join(near)}" if near else ""


def _json_rows(shown: str, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    decoder = json.JSONDecoder(object_pairs_hook=no_key_twice)
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = decoder.decode(line)
            except KeyTwiceError as error:
                raise DataError(f"{shown}: line {number}: {error}; keep one") from None
            except (ValueError, RecursionError):
                raise DataError(f"{shown}: line {number} {_NO_OBJECT}") from None
            if not isinstance(row, dict):
                raise DataError(f"{shown}: line {number} {_NO_OBJECT}")
            yield number, row

"""Answers of `predict`, and the files that hold them.

Shapes: C classes.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from raydistill.errors import ConfigError
from raydistill.escaping import quoted
from raydistill.storage.filesystems import write_file

OUTPUTS = (".csv", ".json", ".jsonl", ".parquet")
Rows = Iterator[tuple["Answer", list[tuple[str, int, float]]]]
_ROWS_AT_ONCE = 4096  # of a parquet file


@dataclass(frozen=True)
class Answer:
    """The student's answer for one picture: the probability of each class in their order, or an error."""

    name: str
    probabilities_C: np.ndarray | None
    error: str = ""


def best(answer: Answer, classes: Sequence[str], top: int) -> list[tuple[str, int, float]]:
    """Name, number and probability of the `top` classes of highest probability, in descending order; 0: all. The number
    of a class is its index in the export's classes and in the logits."""
    if answer.probabilities_C is None:
        return []
    order = np.argsort(-answer.probabilities_C, kind="stable")[: top or None]
    return [(classes[k], int(k), float(answer.probabilities_C[k])) for k in order]


def check_output(path: str, inputs: Iterable[str] = ()) -> None:
    """Raises ConfigError: no format has this ending, or it is one of the inputs, by whatever name."""
    if Path(path).suffix.lower() not in OUTPUTS:
        raise ConfigError(f"--out {path}: use a name that ends in {', '.join(OUTPUTS)}")
    with contextlib.suppress(FileNotFoundError):
        own = os.stat(path)
        for one in inputs:
            if os.path.exists(one) and os.path.samestat(own, os.stat(one)):
                raise ConfigError(f"--out {path}: it is {quoted(one)}, which is read; write to another file")


def write_predictions(answers: Iterable[Answer], classes: Sequence[str], top: int, path: str) -> None:
    """Write CSV, JSON, JSON lines or parquet, by the ending of the path, row by row. If an exception or an interruption
    ends the answers, the file keeps the earlier ones, and the exception is raised again.

    Raises ConfigError: no format has this ending; StageError: the file cannot be written.
    """
    check_output(path)
    suffix = Path(path).suffix.lower()
    count, every, ends = min(top, len(classes)) or len(classes), iter(answers), list[BaseException]()
    first = list(itertools.islice(every, 1))  # without an answer there is no file

    def rows() -> Rows:
        try:
            for answer in itertools.chain(first, every):
                yield answer, best(answer, classes, top)
        except BaseException as error:
            ends.append(error)

    if suffix == ".csv":
        write_file(path, lambda file: _write_csv(rows(), count, file))
    elif suffix == ".parquet":
        write_file(path, lambda file: _write_parquet(rows(), file))
    else:
        write_file(path, lambda file: _write_json(rows(), suffix, file))
    if ends:
        raise ends[0]


def _write_csv(rows: Rows, count: int, file: str) -> None:
    columns, places = ("class", "number", "probability"), range(1, count + 1)
    titles = [f"{what}{'' if k == 1 else f'_{k}'}" for k in places for what in columns]
    with open(file, "w", newline="", encoding="utf-8") as sink:
        writer = csv.writer(sink)
        writer.writerow(["picture", *titles, "error"])
        for answer, found in rows:
            cells = [cell for name, k, p in found for cell in (name, k, f"{p:.6f}")] or [""] * len(titles)
            writer.writerow([answer.name, *cells, answer.error])


def _write_json(rows: Rows, suffix: str, file: str) -> None:
    """One list or, as `.jsonl`, one line for each picture."""
    before, between, after = ("[\n", ",\n", "\n]\n") if suffix == ".json" else ("", "\n", "\n")
    with open(file, "w", encoding="utf-8") as sink:
        for number, (answer, found) in enumerate(rows):
            classes = [{"class": name, "number": k, "probability": round(p, 6)} for name, k, p in found]
            row = {"picture": answer.name, **({"error": answer.error} if answer.error else {"classes": classes})}
            sink.write((between if number else before) + json.dumps(row, ensure_ascii=False))
        sink.write(after)


def _write_parquet(rows: Rows, file: str) -> None:
    item = pa.struct([("class", pa.string()), ("number", pa.int32()), ("probability", pa.float32())])
    schema = pa.schema([("picture", pa.string()), ("classes", pa.list_(item)), ("error", pa.string())])
    with pq.ParquetWriter(file, schema) as writer:
        for part in chunks(rows, _ROWS_AT_ONCE):
            names, errors = zip(*((answer.name, answer.error or None) for answer, _ in part), strict=True)
            classes = [
                [dict(zip(("class", "number", "probability"), one, strict=True)) for one in found] for _, found in part
            ]
            writer.write_table(pa.table([names, classes, errors], schema=schema))


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk

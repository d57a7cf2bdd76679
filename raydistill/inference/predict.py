"""predict: an exported student names the class of pictures, from exactly the pixels that it was trained to see.

Shapes: B images, H working pixels on a side, C classes.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet as pq
from scipy.special import softmax

from raydistill.data.decode import decode
from raydistill.data.images import is_hidden
from raydistill.data.many import EXTENSIONS, SUFFIXES, count_rows, read_rows
from raydistill.data.views import Preprocessing
from raydistill.errors import ConfigError, DataError
from raydistill.models.formats import ABOUT_FILE, load_from_library, network_inputs, onnx_run, torch_run
from raydistill.storage.filesystems import write_file

Engine = Literal["onnx", "torch"]
Unit = tuple[str, int, int]  # a file; or, of a file of many images, the first of its rows and how many
# More pictures than this go through a pool of actors, which takes some ten seconds to start.
LARGE = 10_000
_TOGETHER = 64
# What an export has to say of itself, section by section.
_ABOUT = {
    "": {"model", "library", "classes", "preprocessing", "image", "input"},
    "image": {"size", "fit", "max_pixels"},
    "preprocessing": {"size", "mean", "std", "interpolation"},
}
OUTPUTS = (".csv", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Answer:
    """What the student says of one picture: the probability of each class in their order, or why it says nothing."""

    name: str
    probabilities_C: np.ndarray | None
    error: str = ""


class Predictor:
    """An exported student, loaded. Raises ConfigError where the folder is none, or lacks the engine's file."""

    def __init__(self, folder: str, engine: Engine = "onnx", threads: int = 0) -> None:
        about = read_about(folder)
        wanted, self._image = about["preprocessing"], about["image"]
        self.classes: tuple[str, ...] = tuple(about["classes"])
        self._preprocessing = Preprocessing(
            wanted["size"], tuple(wanted["mean"]), tuple(wanted["std"]), wanted["interpolation"]
        )
        self._from_pixels = engine == "onnx" and about["input"] == "pixels"
        if engine == "torch":
            self._run = torch_run(load_from_library(Path(folder), about["library"] == "timm"))
        elif Path(folder, "model.onnx").is_file():
            self._run = onnx_run(Path(folder, "model.onnx"), threads)
        else:
            raise ConfigError(f"{folder} has no model.onnx; use --engine torch, or export with onnx in export.formats")

    def working_image(self, data: bytes) -> np.ndarray:
        """(H, H, 3) uint8, as `prepare` makes it. Raises DataError."""
        image = self._image
        return np.asarray(decode(data, image["size"], image["fit"], image["max_pixels"]))

    def probabilities(self, images_BHH3: np.ndarray) -> np.ndarray:
        """(B, C) float32 of working images."""
        logits_BC = self._run(network_inputs(images_BHH3, self._preprocessing, self._from_pixels))
        probabilities_BC: np.ndarray = softmax(logits_BC, axis=1)
        return probabilities_BC

    def answer(self, units: Sequence[Unit]) -> Iterator[Answer]:
        """One for each picture, in order; one that cannot be read takes no other along."""
        with ThreadPoolExecutor() as pool:
            for part in _chunks((picture for unit in _merged(units) for picture in _read(unit)), _TOGETHER):
                decoded = list(pool.map(self._decoded, part))
                images = [image for _, image, _ in decoded if image is not None]
                found = iter(self.probabilities(np.stack(images)) if images else ())
                for name, image, reason in decoded:
                    yield Answer(name, None if image is None else next(found), reason)

    def _decoded(self, picture: tuple[str, bytes | None, str]) -> tuple[str, np.ndarray | None, str]:
        name, data, reason = picture
        if data is None:
            return name, None, reason
        try:
            return name, self.working_image(data), ""
        except DataError as error:
            return name, None, str(error)


def read_about(folder: str) -> dict[str, Any]:
    """What `export` says of its files. Raises ConfigError."""
    try:
        about: dict[str, Any] = json.loads(Path(folder, ABOUT_FILE).read_text(encoding="utf-8"))
        for section, keys in _ABOUT.items():
            if lacking := keys - (about[section] if section else about).keys():
                raise ConfigError(
                    f"{folder}/{ABOUT_FILE} does not say {', '.join(sorted(lacking))}; export the student again"
                )
    except (OSError, ValueError, AttributeError):
        raise ConfigError(
            f"{folder} is no exported student: it has no {ABOUT_FILE} that can be read; `raydistill export` names the "
            "folder that it writes"
        ) from None
    return about


def find_units(paths: Sequence[str]) -> list[Unit]:
    """Files as they are named, and every picture below folders; hidden and system files are left out.

    Raises DataError where there is nothing at a path, or no picture, or a table without the column `image`.
    """
    found: list[Unit] = []
    for path in paths:
        if Path(path).is_dir():
            inside = (p for p in Path(path).rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            pictures = sorted(str(p) for p in inside if not is_hidden(p.relative_to(path).parts))
            if not pictures:
                raise DataError(f"{path}: no pictures found in this folder")
            found += [(picture, 0, 1) for picture in pictures]
        elif not Path(path).exists():
            raise DataError(f"{path}: there is nothing at this path")
        elif PurePosixPath(path).suffix.lower() in SUFFIXES:
            num_rows = count_rows(path)
            found += [(path, first, min(_TOGETHER, num_rows - first)) for first in range(0, num_rows, _TOGETHER)]
        else:
            found.append((path, 0, 1))
    return found


def predict_locally(folder: str, engine: Engine, units: Sequence[Unit]) -> Iterator[Answer]:
    return Predictor(folder, engine).answer(units)


def predict_on_ray(folder: str, engine: Engine, units: Sequence[Unit]) -> Iterator[Answer]:
    """Through a pool of one-CPU actors, as many as there are CPUs, on the Ray that has been joined; in order. Every
    node sees the same paths."""
    import ray.data
    from ray.data import ActorPoolStrategy

    from raydistill.infra.restarts import new_tries

    parts = [{"units": json.dumps(part)} for part in _chunks(units, _TOGETHER)]
    most = max(1, min(int(ray.cluster_resources().get("CPU", 1)), len(parts)))
    answered = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        _PredictActor, fn_constructor_args=(folder, engine, new_tries()), batch_size=1, batch_format="numpy",
        num_cpus=1, compute=ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
    )  # fmt: skip
    for row in answered.iter_rows():
        yield Answer(row["name"], None if row["error"] else np.asarray(row["probabilities"], np.float32), row["error"])


class _PredictActor:
    def __init__(self, folder: str, engine: Engine, tries: Any) -> None:
        torch.set_num_threads(1)
        self._tries = tries
        self._predictor = Predictor(folder, engine, threads=1)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        from raydistill.infra.restarts import trying

        units = [tuple(unit) for unit in json.loads(str(batch["units"][0]))]
        with trying(self._tries, f"{len(units)} pictures, {units[0][0]} the first"):
            answers = list(self._predictor.answer(units))
        nothing: list[float] = []
        return pa.table(
            {
                "name": [answer.name for answer in answers],
                "error": [answer.error for answer in answers],
                "probabilities": pa.array(
                    [nothing if a.probabilities_C is None else a.probabilities_C for a in answers],
                    pa.list_(pa.float32()),
                ),
            }
        )


def best(answer: Answer, classes: Sequence[str], top: int) -> list[tuple[str, int, float]]:
    """Name, number and probability of the `top` likeliest classes, the likeliest first; 0: all of them. A class's
    number is its place in the export's list, and the graphs' logits."""
    if answer.probabilities_C is None:
        return []
    order = np.argsort(-answer.probabilities_C, kind="stable")[: top or None]
    return [(classes[k], int(k), float(answer.probabilities_C[k])) for k in order]


def write_answers(answers: Iterable[Answer], classes: Sequence[str], top: int, path: str) -> None:
    """As CSV, JSON, JSON lines or parquet, by the path's ending, row by row, and whole or not at all.

    Raises ConfigError where the ending is another.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in OUTPUTS:
        raise ConfigError(f"--out {path}: use a name that ends in {', '.join(OUTPUTS)}")
    rows = ((answer, best(answer, classes, top)) for answer in answers)
    count = min(top, len(classes)) or len(classes)
    writers: dict[str, Callable[[str], None]] = {
        ".csv": lambda file: _write_csv(rows, count, file),
        ".json": lambda file: _write_json(rows, file),
        ".jsonl": lambda file: _write_lines(rows, file),
        ".parquet": lambda file: _write_parquet(rows, file),
    }
    write_file(path, writers[suffix])


Rows = Iterator[tuple[Answer, list[tuple[str, int, float]]]]


def _write_csv(rows: Rows, count: int, file: str) -> None:
    columns, places = ("class", "number", "probability"), range(1, count + 1)
    titles = [f"{what}{'' if k == 1 else f'_{k}'}" for k in places for what in columns]
    with open(file, "w", newline="", encoding="utf-8") as sink:
        writer = csv.writer(sink)
        writer.writerow(["picture", *titles, "error"])
        for answer, found in rows:
            cells = [cell for name, k, p in found for cell in (name, k, f"{p:.6f}")] or [""] * len(titles)
            writer.writerow([answer.name, *cells, answer.error])


def _as_json(answer: Answer, found: list[tuple[str, int, float]]) -> str:
    row: dict[str, Any] = {"picture": answer.name}
    if answer.error:
        row["error"] = answer.error
    else:
        row["classes"] = [{"class": name, "number": k, "probability": round(p, 6)} for name, k, p in found]
    return json.dumps(row, ensure_ascii=False)


def _write_json(rows: Rows, file: str) -> None:
    with open(file, "w", encoding="utf-8") as sink:
        for number, row in enumerate(rows):
            sink.write(f"{',' if number else '['}\n{_as_json(*row)}")
        sink.write("\n]\n")


def _write_lines(rows: Rows, file: str) -> None:
    with open(file, "w", encoding="utf-8") as sink:
        sink.writelines(f"{_as_json(*row)}\n" for row in rows)


def _write_parquet(rows: Rows, file: str) -> None:
    item = pa.struct([("class", pa.string()), ("number", pa.int32()), ("probability", pa.float32())])
    schema = pa.schema([("picture", pa.string()), ("classes", pa.list_(item)), ("error", pa.string())])
    with pq.ParquetWriter(file, schema) as writer:
        for part in _chunks(rows, 4096):
            items = [
                {
                    "picture": answer.name,
                    "classes": [{"class": name, "number": k, "probability": p} for name, k, p in found],
                    "error": answer.error or None,
                }
                for answer, found in part
            ]
            writer.write_table(pa.Table.from_pylist(items, schema))


def _merged(units: Sequence[Unit]) -> list[Unit]:
    """Neighbouring rows of one file as one unit, so that what lies together is read once."""
    merged: list[Unit] = []
    for path, first, count in units:
        if merged and merged[-1][0] == path and sum(merged[-1][1:]) == first:
            merged[-1] = (path, merged[-1][1], merged[-1][2] + count)
        else:
            merged.append((path, first, count))
    return merged


def _read(unit: Unit) -> Iterator[tuple[str, bytes | None, str]]:
    """(name, bytes, "") or (name, None, why)."""
    path, first, count = unit
    if PurePosixPath(path).suffix.lower() not in SUFFIXES:
        try:
            yield path, Path(path).read_bytes(), ""
        except OSError as error:
            yield path, None, f"cannot be read: {error.strerror or error}"
        return
    for row, data in read_rows(path, range(first, first + count)):
        yield f"{path} row {row}", data, "" if data is not None else "no image in this row"


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk

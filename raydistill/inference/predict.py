"""predict: classify pictures with an exported student, from the same pixels as in training.

Shapes: B images, H working pixels on a side, C classes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy.special import softmax

from raydistill.data.decode import working_images
from raydistill.data.isolation import map_isolated, run_isolated
from raydistill.data.sources.containers import EXTENSIONS, SUFFIXES, count_rows
from raydistill.data.sources.entries import is_hidden
from raydistill.data.sources.folders import files_below
from raydistill.data.sources.reading import read_pictures
from raydistill.data.views import Preprocessing
from raydistill.errors import ConfigError, DataError, reason_of
from raydistill.escaping import most_common, quoted
from raydistill.inference.predictions import Answer, chunks
from raydistill.models.formats import load_from_library, network_inputs, torch_run, try_onnx
from raydistill.models.metadata import Engine, check_export
from raydistill.models.onnx_files import onnx_run
from raydistill.runtime.cgroups import num_cores

Unit = tuple[str, int, int]  # a file; or, for a file of many images, the first row and the number of rows
# More pictures than this go through a pool of actors, which takes some ten seconds to start.
LARGE = 10_000
_TOGETHER, _HELD_BYTES, _ANSWER_BYTES = 64, 64 << 20, 512 << 20


class Predictor:
    """A loaded student. It decodes in `decoders` processes, by default one for each core.

    Raises ConfigError: the folder is not an exported student, or lacks the engine's file.
    """

    def __init__(self, folder: str, engine: Engine = "onnx", threads: int = 0, decoders: int | None = None) -> None:
        self._folder, about = folder, check_export(folder, engine)
        wanted, self._image = about["preprocessing"], about["image"]
        self._decode = partial(working_images, **{key: self._image[key] for key in ("size", "fit", "max_pixels")})
        self.classes: tuple[str, ...] = tuple(about["classes"])
        self.preprocessing = Preprocessing(
            wanted["size"], tuple(wanted["mean"]), tuple(wanted["std"]), wanted["interpolation"]
        )
        self.working_size: int = self._image["size"]
        self.most_bytes: int = self._image["max_bytes"]
        side = max(wanted["size"], self._image["size"])
        # Pictures that go through the network as one batch, each held as bytes and as numbers.
        self.most_together = max(1, min(_TOGETHER, _HELD_BYTES // (15 * side**2)))
        self._decoders = decoders or num_cores()
        self._from_pixels = engine == "onnx" and about["input"] == "pixels"
        if engine == "torch":
            self.network = load_from_library(Path(folder), about["library"] == "timm")
            self._run = torch_run(self.network)
        else:
            file, size = Path(folder, "model.onnx"), self._image["size"]
            blank = network_inputs(np.zeros((1, size, size, 3), np.uint8), self.preprocessing, self._from_pixels)
            taken = try_onnx(file, blank)
            self.most_together = max(1, min(self.most_together, _ANSWER_BYTES // max(1, taken)))
            self._run = onnx_run(file, threads)

    def working_image(self, data: bytes, most_pixels: int | None = None) -> np.ndarray:
        """(H, H, 3) uint8, as `prepare` makes it, of no more pixels than training allowed; made in an isolated process.
        Raises DataError."""
        limit = min(self._image["max_pixels"], most_pixels or self._image["max_pixels"])
        (image,) = run_isolated(partial(self._decode, max_pixels=limit), [data])
        if isinstance(image, str):
            raise DataError(image)
        return image

    def probabilities(self, images_BHH3: np.ndarray) -> np.ndarray:
        """(B, C) float32 of working images. Raises ConfigError: the network fails, or gives no logits."""
        inputs = network_inputs(images_BHH3, self.preprocessing, self._from_pixels)
        try:
            logits_BC = np.asarray(self._run(inputs))
            found = f"{logits_BC.dtype} of {logits_BC.shape}" if np.isfinite(logits_BC).all() else "numbers not finite"
        except ConfigError:
            raise
        except Exception as error:  # untrusted settings make a network fail in any way
            raise ConfigError(
                f"{self._folder}: its network cannot answer a picture ({reason_of(error)}); export the student again"
            ) from None
        wanted = f"float32 of {(len(images_BHH3), len(self.classes))}"
        if found != wanted:
            raise ConfigError(f"{self._folder}: its network gives {found}, not {wanted}; export the student again")
        probabilities_BC: np.ndarray = softmax(logits_BC, axis=1)
        return probabilities_BC

    def answer(self, units: Sequence[Unit]) -> Iterator[Answer]:
        """One answer for each picture, in order. A picture that cannot be read, or kills its decoding process, harms no
        other."""
        return self.answer_bytes(read_units(units, self.most_bytes))

    def answer_bytes(self, pictures: Iterable[tuple[str, bytes | None, str]]) -> Iterator[Answer]:
        """Answers for (name, bytes, "") or (name, None, reason) of each picture."""
        for part in _together(pictures, self.most_together):
            files = chunks((data or b"" for _, data, _ in part), max(1, len(part) // (4 * self._decoders)))
            made = [image for _, some in map_isolated(self._decode, files, self._decoders) for image in some]
            images = [image for image in made if not isinstance(image, str)]
            found = iter(self.probabilities(np.stack(images)) if images else ())
            for (name, _, reason), image in zip(part, made, strict=True):
                yield Answer(name, None, reason or image) if isinstance(image, str) else Answer(name, next(found))


def read_units(units: Sequence[Unit], most_bytes: int) -> Iterator[tuple[str, bytes | None, str]]:
    """(name, bytes, "") or (name, None, reason) of each picture."""
    return (picture for unit in _merged(units) for picture in _read(unit, most_bytes))


def find_units(paths: Sequence[str], ignored: Counter[str] | None = None) -> list[Unit]:
    """The named files, and every picture below the named folders. `ignored` counts other files by reason.

    Raises DataError: a path does not exist or holds no picture, or a table has no column `image`.
    """
    found, ignored = list[Unit](), Counter[str]() if ignored is None else ignored
    if away := next((path for path in paths if "://" in path), None):
        raise DataError(f"{quoted(away)}: predict reads local files only; copy the pictures here")
    for path in map(str, map(Path, paths)):
        if os.path.isdir(path):
            pictures = list(_pictures_below(path, ignored))
            if not pictures:
                raise DataError(f"{quoted(path)}: no pictures found in this folder{_describe(ignored)}")
            found += [(picture, 0, 1) for picture in pictures]
        elif not os.path.exists(path):
            raise DataError(f"{quoted(path)}: no such file or folder")
        elif PurePosixPath(path).suffix.lower() in SUFFIXES:
            num_rows = count_rows(path)
            found += [(path, first, min(_TOGETHER, num_rows - first)) for first in range(0, num_rows, _TOGETHER)]
        else:
            found.append((path, 0, 1))
    return found


def _pictures_below(folder: str, ignored: Counter[str]) -> Iterator[str]:
    for path in files_below(folder, ignored):
        suffix = PurePosixPath(path).suffix.lower()
        if is_hidden(PurePosixPath(path).relative_to(folder).parts):
            ignored["hidden and system files"] += 1
        elif suffix in EXTENSIONS:
            yield path
        else:
            ignored[f"files ending in {quoted(suffix) or 'nothing'}"] += 1


def _describe(ignored: Counter[str]) -> str:
    return f" ({', '.join(f'{count} {what}' for what, count in most_common(ignored, 10).items())})" if ignored else ""


def without_first(units: Sequence[Unit], count: int) -> list[Unit]:
    """The units after the first `count` pictures. Raises ConfigError: none is left."""
    left = []
    for path, first, number in units:
        passed = min(count, number)
        count -= passed
        if number > passed:
            left.append((path, first + passed, number - passed))
    if not left:
        raise ConfigError("--skip leaves no picture; lower it")
    return left


def predict_locally(folder: str, engine: Engine, units: Sequence[Unit]) -> Iterator[Answer]:
    return Predictor(folder, engine).answer(units)


def predict_on_ray(folder: str, engine: Engine, units: Sequence[Unit]) -> Iterator[Answer]:
    """Answers in order from a pool of one-CPU actors, one for each CPU of the joined Ray cluster. Every node has to see
    the same paths."""
    import ray.data
    from ray.data import ActorPoolStrategy

    from raydistill.cluster.restarts import new_tries

    parts = [{"units": json.dumps(part)} for part in chunks(units, _TOGETHER)]
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
        self._predictor = Predictor(folder, engine, threads=1, decoders=1)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        from raydistill.cluster.restarts import trying

        units = [tuple(unit) for unit in json.loads(str(batch["units"][0]))]
        with trying(self._tries, f"{len(units)} pictures, {quoted(units[0][0])} the first"):
            answers = list(self._predictor.answer(units))
        nothing: list[float] = []
        probabilities = [nothing if a.probabilities_C is None else a.probabilities_C for a in answers]
        return pa.table({
            "name": [answer.name for answer in answers], "error": [answer.error for answer in answers],
            "probabilities": pa.array(probabilities, pa.list_(pa.float32())),
        })  # fmt: skip


def _merged(units: Sequence[Unit]) -> list[Unit]:
    """Adjacent rows of one file as one unit, so that each file is read once."""
    merged: list[Unit] = []
    for path, first, count in units:
        if merged and merged[-1][0] == path and sum(merged[-1][1:]) == first:
            merged[-1] = (path, merged[-1][1], merged[-1][2] + count)
        else:
            merged.append((path, first, count))
    return merged


def _read(unit: Unit, most_bytes: int) -> Iterator[tuple[str, bytes | None, str]]:
    """(name, bytes, "") or (name, None, reason)."""
    path, first, count = unit
    is_many = PurePosixPath(path).suffix.lower() in SUFFIXES
    rows = range(first, first + count) if is_many else [None]
    for number, data, reason in read_pictures([(path, row) for row in rows], most_bytes):
        yield f"{quoted(path)} row {first + number}" if is_many else quoted(path), data, reason


def _together(
    pictures: Iterable[tuple[str, bytes | None, str]], most: int
) -> Iterator[list[tuple[str, bytes | None, str]]]:
    """Lists of up to `most` pictures, within the limit of bytes in memory."""
    part, held = [], 0
    for picture in pictures:
        part.append(picture)
        held += len(picture[1] or b"")
        if len(part) == most or held > _HELD_BYTES:
            yield part
            part, held = [], 0
    if part:
        yield part

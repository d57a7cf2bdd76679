"""The open format of soft targets: a folder of parquet files and one JSON file. docs/soft_targets.md describes it.

Whoever made a folder may be a stranger, so all of it is read with limits, and refused unless it is what the page says.

Shapes: V rows, one a view; P parameters of a view, C classes, D features.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, Field, NonNegativeInt

from raydistill.errors import DataError
from raydistill.escaping import one_line, quoted, shortened
from raydistill.storage.filesystems import open_filesystem
from raydistill.storage.state import MOST_BYTES, parsed
from raydistill.storage.tables import read_foreign_table, values

NUM_PARAMETERS = {1: 8, 2: 17}  # of a view, by version, in the order of `data.views`
SETTINGS_FILE, HEAD_FILE = "soft_targets.json", "head.parquet"
FORMAT = "soft targets of views"
_MOST_FILE = 1 << 30  # bytes
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.parquet")
# Bounds of the parameters after the first 8.
_LEAST = np.array([-180, -0.5, 0, 0, 0, 0, 0, 0, 0])
_MOST = np.array([180, 0.5, 8, 1, 0.009, 1, 1, 1, 1])
_ID = re.compile(r"[0-9a-f]{32}")


def _plain(name: str) -> str:
    if not _PLAIN_NAME.fullmatch(name):
        raise ValueError(f"{name!r:.60} is not the plain name of a parquet file")
    return name


@dataclass(frozen=True)
class TargetFile:
    """One parquet file of a folder, which its hash pins."""

    name: Annotated[str, AfterValidator(_plain)]
    rows: NonNegativeInt
    sha256: str


@dataclass(frozen=True)
class FeatureColumns:
    """A feature is `value * scale * unit`: float16 values have neither scale nor unit."""

    width: Annotated[int, Field(ge=1, le=1 << 16)]
    type: Literal["float16", "int8"]
    unit: list[float] | None
    head: TargetFile


@dataclass(frozen=True)
class TargetSettings:
    """What `soft_targets.json` holds."""

    format: str
    version: int
    made_by: str
    teacher: dict[str, Any]  # its name, weights, precision and head, in words of the maker
    images: dict[str, Any]  # `size`, `fit`: the working images that views are cut from
    views: dict[str, Any]  # `per_image`, and how the maker drew them
    classes: list[str]
    features: FeatureColumns | None
    num_images: NonNegativeInt
    licence: str | None
    files: list[TargetFile]
    fingerprint: str  # of classes, files and head

    @property
    def num_views(self) -> int:
        return int(self.views["per_image"])

    @property
    def num_parameters(self) -> int:
        return NUM_PARAMETERS[self.version]

    @property
    def schema(self) -> pa.Schema:
        numbers = pa.list_(pa.float32()), pa.list_(pa.float16())
        fields = [("sample_id", pa.string()), ("view", pa.int32()), ("parameters", numbers[0]), ("logits", numbers[1])]
        if self.features is not None:
            fields.append(("features", numbers[1] if self.features.type == "float16" else pa.list_(pa.int8())))
        if self.features is not None and self.features.type == "int8":
            fields.append(("scale", pa.float32()))
        return pa.schema(fields)


def fingerprint_of(classes: list[str], files: list[TargetFile], features: FeatureColumns | None) -> str:
    parts = [*classes, *(file.sha256 for file in files)]
    if features is not None:
        parts += [features.head.sha256, repr(features.unit)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class ViewRows:
    """Rows of one file."""

    sample_ids: list[str]
    views_V: np.ndarray
    parameters_VP: np.ndarray  # float32
    logits_VC: np.ndarray  # float16
    features_VD: np.ndarray | None  # int8 or float16
    scale_V: np.ndarray | None  # float32, of int8 features

    def teacher_values(self, settings: TargetSettings) -> np.ndarray:
        """(V, D) float16 features or, without any, logits. Raises DataError: a feature is beyond float16."""
        if settings.features is None or self.features_VD is None:
            return self.logits_VC
        if self.scale_V is None:
            return self.features_VD
        unit_D = np.array(settings.features.unit, np.float32)
        with np.errstate(over="ignore"):
            features_VD = (self.features_VD * self.scale_V[:, None] * unit_D).astype(np.float16)
        if not np.isfinite(features_VD).all():
            raise DataError("a feature of the stored soft targets is beyond float16; check scale and unit")
        return features_VD

    def encode(self) -> bytes:
        """Parquet bytes."""
        columns: dict[str, pa.Array] = {"sample_id": pa.array(self.sample_ids, pa.string())}
        columns["view"] = pa.array(self.views_V, pa.int32())
        columns |= {"parameters": _lists(self.parameters_VP), "logits": _lists(self.logits_VC)}
        if self.features_VD is not None:
            columns["features"] = _lists(self.features_VD)
        if self.scale_V is not None:
            columns["scale"] = pa.array(self.scale_V, pa.float32())
        return _parquet(pa.table(columns), ["sample_id", "view"])


def encode_head_table(classes: list[str], weight_CD: np.ndarray, bias_C: np.ndarray) -> bytes:
    columns = {"class": pa.array(classes), "weight": _lists(weight_CD.astype(np.float32))}
    return _parquet(pa.table(columns | {"bias": pa.array(bias_C, pa.float32())}), ["class"])


def _lists(values_VN: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values_VN).ravel()), values_VN.shape[1])


def _parquet(table: pa.Table, repeated: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=repeated, write_statistics=False)
    return sink.getvalue().to_pybytes()


def read_settings(folder: str) -> TargetSettings:
    """Raises DataError with what is wrong: there is no such file, or it is not of this format and version."""
    shown = quoted(f"{folder}/{SETTINGS_FILE}")
    fs, place = open_filesystem(f"{folder}/{SETTINGS_FILE}")
    try:
        data = fs.read(place, MOST_BYTES)
        if data is None:
            raise DataError(f"{shown}: no such file; name a folder that `raydistill teach JOB --out FOLDER` wrote")
        stated = parsed(data, dict[str, Any])
        if stated.get("format") != FORMAT or stated.get("version") not in (*NUM_PARAMETERS,):
            found = shortened(one_line(f"{stated.get('format')}, version {stated.get('version')}"))
            raise ValueError(f"it is {found}; this version reads {FORMAT}, version 1 or 2")
        settings = parsed(data, TargetSettings)
        features = settings.features
        if not isinstance(settings.views.get("per_image"), int) or not 1 <= settings.num_views <= 1 << 16:
            raise ValueError("views.per_image is not a count")
        if features is not None and features.type == "int8" and len(features.unit or ()) != features.width:
            raise ValueError(f"features.unit does not have {features.width:,} numbers")
        if settings.fingerprint != fingerprint_of(settings.classes, settings.files, features):
            raise ValueError("its fingerprint is not that of its classes and files; it was changed by hand, or cut off")
    except ValueError as error:
        raise DataError(f"{shown}: {error}") from None
    return settings


def read_rows(folder: str, settings: TargetSettings, file: TargetFile) -> ViewRows:
    """All rows of a file. Raises DataError: it is not the file that the settings pin, or holds what no view has."""
    path, classes, features = f"{folder}/{file.name}", len(settings.classes), settings.features
    table = read_foreign_table(path, settings.schema, _pinned(path, file))
    try:
        if table.num_rows != file.rows or any(column.null_count for column in table.columns):
            raise ValueError(f"it has {table.num_rows:,} rows, some of them empty, instead of {file.rows:,} whole ones")
        ids = values(table["sample_id"])
        if odd := next((name for name in ids if not _ID.fullmatch(name)), None):
            raise ValueError(f"{shortened(quoted(odd))} is not a sample id: 32 hex digits")
        views_V = table["view"].to_numpy()
        if ((views_V < 0) | (views_V >= settings.num_views)).any():
            raise ValueError(f"a view is none of 0 to {settings.num_views - 1}")
        parameters_VP = _matrix(table["parameters"], settings.num_parameters)
        _refuse_odd_views(parameters_VP)
        features_VD = None if features is None else _matrix(table["features"], features.width)
        scale_V = table["scale"].to_numpy() if "scale" in table.schema.names else None
        if scale_V is not None and not np.isfinite(scale_V).all():
            raise ValueError("a scale is not finite")
        return ViewRows(ids, views_V, parameters_VP, _matrix(table["logits"], classes), features_VD, scale_V)
    except ValueError as error:
        raise DataError(f"{quoted(path)}: {error}") from None


def read_head_table(folder: str, settings: TargetSettings) -> tuple[np.ndarray, np.ndarray]:
    """(C, D) weights and (C,) biases of the head for the features. Raises DataError."""
    assert settings.features is not None
    path, head = f"{folder}/{settings.features.head.name}", settings.features.head
    schema = pa.schema([("class", pa.string()), ("weight", pa.list_(pa.float32())), ("bias", pa.float32())])
    table = read_foreign_table(path, schema, _pinned(path, head))
    try:
        if values(table["class"]) != settings.classes or any(column.null_count for column in table.columns):
            raise ValueError(f"its rows are not the classes of {SETTINGS_FILE}")
        bias_C = table["bias"].to_numpy()
        if not np.isfinite(bias_C).all():
            raise ValueError("a bias is not finite")
        return _matrix(table["weight"], settings.features.width), bias_C
    except ValueError as error:
        raise DataError(f"{quoted(path)}: {error}") from None


def _pinned(path: str, file: TargetFile) -> bytes:
    fs, place = open_filesystem(path)
    try:
        data = fs.read_at_most(place, _MOST_FILE)
    except OSError as error:
        raise DataError(f"{quoted(path)}: cannot be read ({error.strerror or error})") from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DataError(
            f"{quoted(path)}: not the file that {SETTINGS_FILE} names (another SHA-256); copy the folder again"
        )
    return data


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """(V, width) finite numbers of a column of lists. Raises ValueError."""
    lists = column.combine_chunks()
    if len(lists) and (np.diff(lists.offsets.to_numpy()) != width).any():
        raise ValueError(f"a row does not have {width:,} numbers where it should")
    values = lists.flatten()
    found = values.to_numpy(zero_copy_only=False).reshape(len(lists), width)
    if values.null_count or not np.isfinite(found).all():
        raise ValueError("a number is missing or not finite")
    return found


def _refuse_odd_views(parameters_VP: np.ndarray) -> None:
    """Raises ValueError unless crops lie in the image, flips are 0 or 1, colour factors are small, and so are the
    numbers that version 2 adds."""
    left_top, sides, flip, colour, more = np.split(parameters_VP, [2, 4, 5, 8], axis=1)
    inside = (left_top >= 0).all() and (sides > 0).all() and (left_top + sides <= 1 + 1e-4).all()
    if not inside or not np.isin(flip, (0, 1)).all() or (colour < 0).any() or (colour > 10).any():
        raise ValueError("the parameters of a view are not those of a crop in the image, a flip and three factors")
    if more.shape[1]:
        inside = (more[:, 5:7] + more[:, 7:9] <= 1 + 1e-4).all()
        if (more < _LEAST).any() or (more > _MOST).any() or (more[:, 2] % 1).any() or not inside:
            raise ValueError("the parameters of a view after the first 8 are beyond the bounds of the format")


def all_rows(folder: str, settings: TargetSettings) -> Iterator[ViewRows]:
    return (read_rows(folder, settings, file) for file in settings.files)

"""Files that hold one image or many, as the tests of readers need them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import feather
from pyarrow import parquet as pq


def picture(seed: int = 0, side: int = 8) -> bytes:
    """A PNG of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(sink := io.BytesIO(), "PNG")
    return sink.getvalue()


Members = Mapping[str, bytes] | Iterable[tuple[str, bytes]]


def tar_of(files: Members, comment: str = "", kind: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar file with these members in their order; names may come twice."""
    with tarfile.open(fileobj=(sink := io.BytesIO()), mode="w", format=kind) as archive:
        for name, data in files.items() if isinstance(files, Mapping) else files:
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), {"comment": comment} if comment else {}
            archive.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def write_tar(path: Path, files: Members, comment: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(files, comment))
    return path


def write_table(path: Path, table: pa.Table, rows: int | None = None, **options: object) -> Path:
    """By its ending: parquet, feather, or an Arrow stream; a name that begins with `file` is an Arrow IPC file. `rows`
    are those of a row group or a batch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows, **options)
    elif path.suffix == ".feather" and not path.name.startswith("file"):
        feather.write_feather(table, path)
    else:
        make = pa.ipc.new_file if path.name.startswith("file") else pa.ipc.new_stream
        with (
            pa.OSFile(str(path), "wb") as sink,
            make(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer,
        ):
            writer.write_table(table, max_chunksize=rows)
    return path

"""An object store on a local folder: objects appear whole, all that is asked is noted, and it fails when told to.

`$CHAOS_FOLDER` is where everything lies: the objects under `store/`, the notes in `notes.log`, and the file `failing`,
which holds an errno for as long as the store is to fail with it.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


class FaultyFiles(DirFileSystem):
    protocol = "faulty"

    def __init__(self, **options: Any) -> None:
        self.folder = Path(os.environ["CHAOS_FOLDER"])
        (self.folder / "store").mkdir(parents=True, exist_ok=True)
        super().__init__(path=str(self.folder / "store"), fs=LocalFileSystem(auto_mkdir=True), **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("faulty://").strip("/")

    def _asked(self, what: str, path: str) -> None:
        failing = self.folder / "failing"
        if failing.exists():
            number = int(failing.read_text())
            raise OSError(number, os.strerror(number), path)
        with open(self.folder / "notes.log", "ab") as notes:
            notes.write(f"{os.getpid()} {what} {self._strip_protocol(path)}\n".encode())

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self._asked("read" if "r" in mode else "write", path)
        return super()._open(path, mode, **options)

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> bytes:
        self._asked("read", path)
        return bytes(super().cat_file(path, *arguments, **options))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._asked("write", path)
        target = self.folder / "store" / self._strip_protocol(path)
        if mode == "create" and target.exists():
            raise FileExistsError(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"part-{uuid.uuid4().hex}"
        part.write_bytes(value)
        os.replace(part, target)

    def put_file(self, lpath: str, rpath: str, *arguments: Any, **options: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def exists(self, path: str, **options: Any) -> bool:
        self._asked("look", path)
        return bool(super().exists(path, **options))

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._asked("look", path)
        return super().ls(path, detail=detail, **options)

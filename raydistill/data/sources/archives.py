"""WebDataset tar files: which members are images, and which label belongs to each."""

from __future__ import annotations

import gc
import json
import re
import tarfile
from collections import Counter, defaultdict
from typing import Any, NamedTuple

from raydistill.data.labels import MOST_BYTES, label_of
from raydistill.errors import DataError
from raydistill.escaping import quoted

# Of pictures, in folders and in tar files. The content decides the format.
EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".avif", ".jp2", ".tga", ".ico",
})  # fmt: skip
_LABELS = (".cls", ".json", ".txt")
_COMPRESSED = {b"\x1f\x8b": "gzip (gunzip", b"\x28\xb5\x2f\xfd": "zstd (unzstd", b"BZh": "bzip2 (bunzip2",
               b"\xfd7zXZ": "xz (unxz"}  # fmt: skip

_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_MOST_EXTENDED = 65536  # bytes of a header with a name or attributes
_MOST_SHARED = 100  # attributes of all members; each member has a copy
# Files that an archive may always have, and bytes for each further one: a header and its content.
_ALWAYS_FILES, _FEWEST_BYTES = 1 << 16, 1024
_MOST_BEHIND = 64 << 20  # bytes after an archive's end that may hold a second archive
_DIGITS = re.compile(rb"\d{1000}")  # longer than a name


class File(NamedTuple):
    """A member, and the offset of its bytes in the archive."""

    name: str
    start: int
    size: int


Image = tuple[File, dict[str, File]]  # and the files beside it that may give its label


class Member(tarfile.TarInfo):
    """A member whose headers are known to be short, and to lead forwards, before tarfile reads them.

    It overrides a private method, as of Python 3.11; the tests of damaged headers fail if tarfile no longer calls it.
    """

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0:
            raise tarfile.ReadError("a member of less than no bytes")
        file: Any = archive.fileobj
        if self.type in _PAX + _LONG_NAMES:
            if self.size > _MOST_EXTENDED:
                raise tarfile.ReadError(f"a header of {self.size:,} bytes")
            start = file.tell()
            if self.type in _PAX and _DIGITS.search(file.read(self.size)):  # tarfile's time grows with their square
                raise tarfile.ReadError("a header with a number that is too long")
            file.seek(start)
        found: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        if len(archive.pax_headers) > _MOST_SHARED:
            raise tarfile.ReadError(f"more than {_MOST_SHARED} attributes of all its members")
        # Nothing reads the others, and they would stay in memory while the archive is open.
        found.pax_headers = {key: value for key, value in found.pax_headers.items() if key.startswith("GNU.sparse")}
        if found.size < 0 or archive.offset <= self.offset:
            raise tarfile.ReadError("a member of less than no bytes")
        if _is_whole(found) and found.offset_data + found.size > archive.offset:
            raise tarfile.ReadError(f"a member of {found.size:,} bytes, some of them not its own")
        return found

    def _proc_gnusparse_10(self, *_: Any) -> None:
        """Do not read the map of a sparse file: it may be as long as the archive, and the file is left out."""

    def _proc_sparse(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        file: Any = archive.fileobj
        _, has_more, _ = self._sparse_structs  # type: ignore[attr-defined]
        while has_more:
            has_more = any(file.read(tarfile.BLOCKSIZE)[504:505])
        self.offset_data, self.sparse = file.tell(), []  # type: ignore[assignment]
        archive.offset = self.offset_data + self._block(self.size)  # type: ignore[attr-defined]
        return self


def _is_whole(member: tarfile.TarInfo) -> bool:
    """Whether the bytes of the file are in the archive as they are. A sparse file expands few bytes to many."""
    is_sparse = member.issparse() or any(key.startswith("GNU.sparse") for key in member.pax_headers)
    return member.isreg() and not is_sparse


def refuse_compressed(head: bytes, shown: str) -> None:
    """Raises DataError with the way out. Rows are read in any order, which a compressed archive does not allow."""
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"{shown}: compressed with {name} unpacks it once); only plain .tar files are read")


def images_of(archive: tarfile.TarFile, shown: str, ignored: Counter[str]) -> list[Image]:
    """Every image in the archive's order, with the label files of its key, at any place in the archive.

    An image's key is its name without the last ending (`v1.2_001` of `v1.2_001.png`). If no label has that key, the key
    is the whole name (`001.png.json`) or WebDataset's, the name up to its first dot (`001` of `001.input.png`). Other
    images that only begin with the key of an image (`001.mask.png`) are left out and counted.

    Raises DataError: two images of one key, or an archive that is cut off or has another one after its end.
    """
    images, count = list[tuple[File, str]](), 0
    beside = defaultdict[str, dict[str, File]](dict)
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all headers
        file = File(member.name, member.offset_data, member.size)
        name = member.name.rpartition("/")[2]
        before, _, ending = name.rpartition(".")
        suffix = f".{ending}".lower() if before and ending else ""
        count += 1
        if count > _ALWAYS_FILES + archive.offset // _FEWEST_BYTES:
            raise DataError(
                f"{shown}: {count:,} files in {archive.offset:,} bytes, most of them empty; leave these out"
            )
        if member.isdir():
            continue
        if name.startswith(".") or "__MACOSX" in member.name:
            ignored["hidden and system files in tar files"] += 1
        elif not _is_whole(member):
            ignored["links and other entries in tar files that are not files"] += 1
        elif suffix in EXTENSIONS:
            images.append((file, member.name[: -len(suffix)]))
        elif suffix in _LABELS:
            key = member.name[: -len(suffix)]
            if suffix in beside[key]:
                raise DataError(f"{shown}: {quoted(member.name)} is there twice; keep one")
            beside[key][suffix] = file
        else:
            ignored[f"files ending in {quoted(suffix) or 'nothing'} in tar files"] += 1
    _refuse_cut(archive, shown)
    own = {stem for _, stem in images}
    found = dict[str, File]()
    kept = list[Image]()
    for file, stem in images:
        key = stem if stem in beside or file.name not in beside else file.name
        if key not in beside and (first := _up_to_first_dot(stem)) != stem:
            if first in own:
                ignored["images in tar files beside the image of their key, such as masks"] += 1
                continue
            key = first if first in beside else stem
        if key in found:
            both = f"{quoted(found[key].name)} and {quoted(file.name)}"
            raise DataError(f"{shown}: {both} have one key; leave only the image")
        found[key] = file
        kept.append((file, beside.get(key, {})))
    if alone := len(beside.keys() - found.keys()):
        ignored["labels in tar files without an image"] += alone
    return kept


def _refuse_cut(archive: tarfile.TarFile, shown: str) -> None:
    """For an archive that was read to its end. tarfile stops silently at half a header, at bytes that are not a header,
    and before a second archive."""
    file: Any = archive.fileobj
    file.seek(archive.offset)
    if any(head := file.read(tarfile.BLOCKSIZE)) or 0 < len(head) < tarfile.BLOCKSIZE:
        raise DataError(f"{shown}: truncated or damaged at byte {archive.offset:,}; fetch it or pack it again")
    for _ in range(_MOST_BEHIND >> 20):
        if any(file.read(1 << 20)):
            raise DataError(
                f"{shown}: data follows after its end, as in tar files joined by `cat`, and would not be read; keep "
                "them apart, or join them with `tar --concatenate`"
            )


def _up_to_first_dot(stem: str) -> str:
    folder, slash, name = stem.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"


def label_in(archive: Any, beside: dict[str, File], shown: str, notes: Counter[str]) -> str | None:
    """From `KEY.cls`, from `label` or `class` in `KEY.json`, or from `KEY.txt`: the first that has one."""
    for suffix in (suffix for suffix in _LABELS if suffix in beside):
        member = beside[suffix]
        where = f"{shown}: {quoted(member.name)}"
        if member.size > MOST_BYTES:
            raise DataError(f"{where} has {member.size:,} bytes, too many for a label")
        archive.seek(member.start)
        data = archive.read(member.size)
        try:
            value: object = data.decode("utf-8-sig")
            if suffix == ".json":
                tree = _parsed(data)
                value = tree.get("label", tree.get("class")) if isinstance(tree, dict) else tree
                if isinstance(tree, dict) and not {"label", "class"} & set(tree):
                    notes["JSON files in tar files without `label` and `class`"] += 1
        except (ValueError, RecursionError):
            raise DataError(f"{where} cannot be read as text{' or JSON' if suffix == '.json' else ''}") from None
        if (label := label_of(value, where, notes)) is not None:
            return label
    return None


def _parsed(data: bytes) -> Any:
    """JSON's value. Without this Python looks for reference cycles many times while it makes very many lists."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return json.loads(data)
    finally:
        if was_on:
            gc.enable()

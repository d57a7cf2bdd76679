"""From a file's bytes to the square, upright RGB picture that every later stage reads. It handles every problem with
pixels.

Rules: the content decides, not the extension. EXIF orientation is applied. CMYK, grey and palette become RGB. Values of
more than 8 bits keep the upper 8 bits of the scale that the file states. Transparency is put on white. Of an animation
the first frame counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import logging
import os
import re
import struct
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from raydistill.errors import DataError, reason_of

_ORIENTATION, _ROWS_PER_STRIP, _TILE_SIDES = 0x0112, 278, (322, 323)  # EXIF's tag, and TIFF's
BACKGROUND = (255, 255, 255)
# A picture with more pixels is processed in strips, and may have at most this many pixels for each byte: a blank black
# and white page has 8,256, as PNG.
_LARGE, _PIXELS_PER_BYTE = 1 << 24, 10_000
_MOST_BYTES, _ALONE_BYTES = 1 << 30, 1 << 29  # of memory for one picture; a larger picture is decoded alone
# Reads of a file besides one for every 64 bytes, and bytes of the formats that Python decodes: more would take minutes.
# Scans that a progressive JPEG may always have.
_MOST_STEPS, _MOST_PLAIN, _MOST_SCANS, _ALWAYS_RUNS = 100_000, 16 << 20, 100, 1 << 16
# Tiles that a JPEG 2000 may always have, and pixels for each further one; bytes that a decoder keeps for each tile, and
# for each of its channels.
_ALWAYS_TILES, _FEWEST_PIXELS, _TILE_BYTES, _CHANNEL_BYTES = 1024, 4096, 12 << 10, 2 << 10
_SIZ = re.compile(rb"\xff\x51(?=[\0-\xc0].{35}[\0-\x40].)", re.DOTALL)  # the segment that states a JPEG 2000's tiles
# The formats that Pillow may try. Some others start a program (Ghostscript for EPS), which no file may do here.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")

# The reason of a refusal says what is wrong in a file. Pillow also logs it, and libtiff writes up to hundreds of lines
# a file to stderr. (Builds of Pillow that contain libtiff do not let us stop that.)
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError, OSError):
    _pillow = ctypes.CDLL(Image.core.__file__)
    _pillow.TIFFSetErrorHandler(None)
    _pillow.TIFFSetWarningHandler(None)


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about a file: its format by content, its stored pixels, and those of `NOTES` that apply: what its owner may
    not expect."""

    form: str
    width: int
    height: int
    notes: tuple[str, ...]


NOTES = (
    "turned upright by its EXIF orientation", "CMYK, turned into RGB", "grey, read as RGB",
    "16 bits a channel, of which the upper 8 are read", "transparent, laid on white",
    "animated, its first frame is read",
)  # fmt: skip


def decode(data: bytes, size: int, fit: Literal["crop", "pad"], max_pixels: int) -> Image.Image:
    """An RGB picture of `size` x `size` pixels. Raises DataError with the reason, which does not name the file."""
    return decode_with_facts(data, size, fit, max_pixels)[0]


def decode_with_facts(
    data: bytes, size: int, fit: Literal["crop", "pad"], max_pixels: int
) -> tuple[Image.Image, Facts]:
    """Like `decode`, and the facts about the file."""
    if not data:
        raise DataError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about odd metadata
            with contextlib.ExitStack() as held:
                if early := _bytes_to_open(data, max_pixels):
                    held.enter_context(_memory.of(early))
                file = _Steps(data) if len(data) > _MOST_STEPS else io.BytesIO(data)
                image = Image.open(file, formats=FORMATS)
                _refuse_pixels(image.width, image.height, max_pixels)
                facts, scale = _facts(image), _scale(image)
                image.draft("RGB", (2 * size, 2 * size))  # a JPEG decodes at a fraction of its size if that is enough
                if image.format == "JPEG2000" and image.width * image.height > _LARGE:
                    image.reduce = _wavelet_levels(image, data, 2 * size)  # type: ignore[assignment,method-assign]
                if not early:
                    held.enter_context(_memory.of(wanted := _bytes_to_decode(image, facts, data)))
                    if image.format == "AVIF":
                        held.enter_context(_no_more_than(2 * wanted))
                if _pnm_decoder(image) == "ppm":
                    image = Image.open(io.BytesIO(_common_pnm(image, data)), formats=("PPM",))
                if isinstance(file, _Steps) and image.format in ("BMP", "DIB"):  # read byte by byte
                    file.count = False
                image.load()
                return _square(_rgb(image, scale, size, fit), size, fit), facts
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError(_no_image(data)) from None
    except Image.DecompressionBombError as error:
        raise DataError(str(error)) from None
    except MemoryError:
        raise DataError("too large to decode in the available memory") from None
    except Exception as error:  # Pillow's plugins raise nearly every error on damaged files
        raise DataError(f"cannot be decoded: {reason_of(error)}") from None


def working_images(
    files: Iterable[bytes], size: int, fit: Literal["crop", "pad"], max_pixels: int
) -> Iterator[np.ndarray | str]:
    """(size, size, 3) uint8 of each file's bytes, or the reason why there is none."""
    for data in files:
        try:
            yield np.array(decode(data, size, fit, max_pixels))  # torch needs a writable array
        except DataError as error:
            yield str(error)


class _Steps(io.BytesIO):
    """A file that refuses to be read in tiny steps, as Pillow reads empty blocks or an endless header."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.count, self._left = True, _MOST_STEPS + len(data) // 64

    def read(self, size: int | None = -1) -> bytes:
        self._left -= self.count
        if self._left < 0:
            raise DataError("cannot be decoded: it is cut into too many small pieces")
        return super().read(size)


class _Memory:
    """A limit on the memory of this process's decoders. Large pictures of all processes of this user on this machine
    are decoded one at a time, so that the result for one depends only on its own size."""

    def __init__(self, most: int) -> None:
        self.most, self._held, self._changed = most, 0, threading.Condition()

    @contextlib.contextmanager
    def of(self, size: int) -> Iterator[None]:
        if size > self.most:
            with _alone():
                yield
        else:
            with self._changed:
                self._changed.wait_for(lambda: self._held + size <= self.most)
                self._held += size
            try:
                yield
            finally:
                with self._changed:
                    self._held -= size
                    self._changed.notify_all()
        if size > 1 << 26:  # glibc keeps memory that threads have freed until it is asked to trim
            with contextlib.suppress(AttributeError, OSError):
                ctypes.CDLL(None).malloc_trim(0)


_memory, _thread = _Memory(_ALONE_BYTES), threading.local()
_most_bytes = _MOST_BYTES
is_isolated = False  # whether this process only decodes and needs no other memory


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    with contextlib.ExitStack() as held:
        with contextlib.suppress(ImportError, OSError):  # on systems without such locks nothing waits
            import fcntl

            if not getattr(_thread, "is_alone", False):
                flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
                lock = os.open(f"{tempfile.gettempdir()}/raydistill-{os.getuid()}.lock", flags, 0o600)
                held.callback(os.close, lock)
                if os.fstat(lock).st_uid == os.getuid():  # another user might hold the lock forever
                    fcntl.flock(lock, fcntl.LOCK_EX)
                _thread.is_alone = True
                held.callback(setattr, _thread, "is_alone", False)
        yield


@contextlib.contextmanager
def large_alone(size: int) -> Iterator[None]:
    """Wraps the reading and decoding of a file of that many bytes, which stay in memory while it is decoded. During a
    large file, no other large file is read and no large picture decoded."""
    with _alone() if size > _memory.most // 4 else contextlib.nullcontext():
        yield


def limit_memory(total: int, processes: int) -> None:
    """Let that many decoding processes use half of the `total` bytes of this machine or container."""
    global _most_bytes
    _most_bytes = min(_MOST_BYTES, total // 4)
    _memory.most = min(_ALONE_BYTES, total // 4 // processes)


@contextlib.contextmanager
def _no_more_than(size: int) -> Iterator[None]:
    """Let a decoder allocate that many bytes and its threads' stacks, and no more. libavif follows the picture's own
    size even if its header states a smaller one."""
    if not is_isolated or sys.platform != "linux":
        yield
        return
    import resource

    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) for line in lines if line.startswith("VmData")) << 10
    stacks = (16 << 20) * (os.cpu_count() or 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [used + size + stacks, *(one for one in (soft, hard) if one != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _refuse_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise DataError(f"{width}x{height} pixels, above images.max_pixels={most}")


def _bytes_to_decode(image: Image.Image, facts: Facts, data: bytes) -> int:
    """An upper bound, from the header only. Raises DataError as `_upper_bytes` does."""
    pixels, form, more = image.width * image.height, image.format, 0
    each = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}.get(image.mode, 4)
    if form == "AVIF":  # planes of colour, and a copy for Pillow
        each, more = 16, 2 * len(data)
    elif form == "JPEG2000":
        each += 4 * len(image.getbands())
        more = _tile_bytes(data, facts.width, facts.height)
    elif form in ("JPEG", "MPO") and image.info.get("progressive"):  # all coefficients, however small the draft
        parts = [across * down for _, across, down, _ in image.layer]  # type: ignore[attr-defined]
        more = 2 * facts.width * facts.height * sum(parts) // max(parts)
        scans = data.count(b"\xff\xda")
        if scans > _MOST_SCANS and scans * facts.width * facts.height > _MOST_SCANS * _LARGE:
            raise DataError(f"{facts.width}x{facts.height} pixels in {scans} scans: a decompression bomb")
    elif form == "TIFF":  # and one strip, which may be the whole picture, or one tile, which may be larger
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        rows, across, down = (int(np.ravel(tags.get(tag, 0))[0]) for tag in (_ROWS_PER_STRIP, *_TILE_SIDES))
        more = max(min(rows or image.height, image.height) * image.width, across * down) * each + 2 * len(data)
    elif form in ("BMP", "DIB") and image.tile and image.tile[0].codec_name == "bmp_rle":  # type: ignore[attr-defined]
        if len(data) > _MOST_PLAIN or len(data) > _ALWAYS_RUNS + 8 * pixels:
            raise DataError(f"{facts.width}x{facts.height} pixels in {len(data):,} bytes of runs; save it without RLE")
    elif form == "PPM" and _pnm_decoder(image) == "ppm_plain":
        if len(data) > _MOST_PLAIN or data.count(b"#") > _MOST_PLAIN >> 10:
            raise DataError(f"{len(data):,} bytes of numbers as text, or of notes between them; save it as binary")
    return _upper_bytes(image.mode, (facts.width, facts.height), len(data), pixels, pixels * each + more)


def _upper_bytes(mode: str, size: tuple[int, int], length: int, pixels: int, total: int) -> int:
    """For a picture of that size in a file of `length` bytes, whose pixels are decoded in `total` bytes. Raises
    DataError if that is too much, or a decompression bomb."""
    words = f"{size[0]}x{size[1]} pixels"
    if pixels > _LARGE and pixels > _PIXELS_PER_BYTE * length * (8 if mode == "1" else 1):
        raise DataError(f"{words} from {length} bytes: a decompression bomb")
    if total > _most_bytes:
        raise DataError(f"{words} would take {total >> 20:,} MiB to decode, above {_most_bytes >> 20:,} MiB")
    # After decoding, a large picture is processed in strips, and a small one is copied, in NumPy's wide types.
    return total + min(pixels, _LARGE) * (40 if mode.startswith(("I", "F")) else 16)


def _bytes_to_open(data: bytes, max_pixels: int) -> int | None:
    """The same for a WebP or an ICO, from their own bytes: Pillow takes memory when it opens them. None for other
    files, and for truncated ones, which Pillow refuses."""
    sizes = []
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        if data[12:16] == b"VP8X":
            sizes = [(1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little"))]
        elif data[12:16] == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            sizes = [(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))]
        elif data[12:16] == b"VP8 ":
            sizes = [(data[26] | (data[27] & 0x3F) << 8, data[28] | (data[29] & 0x3F) << 8)]
    elif data[:4] == b"\0\0\1\0":  # an icon's directory has one byte for a side, and each picture in it states its own
        for number in range(int.from_bytes(data[4:6], "little")):
            at = int.from_bytes(data[18 + 16 * number : 22 + 16 * number], "little")
            form = ">8x8xII" if data[at : at + 4] == b"\x89PNG" else "<4xii"
            with contextlib.suppress(struct.error):
                width, height = struct.unpack_from(form, data, at)
                sizes.append((width, abs(height) // (1 if form[0] == ">" else 2)))  # it includes the mask
    if not sizes:
        return None
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    _refuse_pixels(width, height, max_pixels)
    return _upper_bytes("", (width, height), len(data), width * height, 16 * width * height + 2 * len(data))


def _tile_bytes(data: bytes, width: int, height: int) -> int:
    """The memory that a decoder keeps for the tiles of a JPEG 2000, however few bytes they have. It takes the largest
    number that any part of the file states, because other parts may look like its header."""
    most = 0
    for number, found in enumerate(_SIZ.finditer(data)):
        length, *sides, channels = struct.unpack_from(">H2x8IH", data, found.end())
        if number == _MOST_STEPS:
            raise DataError("cannot be decoded: it is cut into too many small pieces")
        if length != 38 + 3 * channels or not sides[4] or not sides[5]:
            continue
        tiles = max(0, -(-(sides[0] - sides[6]) // sides[4])) * max(0, -(-(sides[1] - sides[7]) // sides[5]))
        if _ALWAYS_TILES + width * height // _FEWEST_PIXELS < tiles:
            raise DataError(f"{width}x{height} pixels in {tiles:,} tiles: a decompression bomb")
        most = max(most, tiles * (_TILE_BYTES + channels * _CHANNEL_BYTES))
    return most


def _pnm_decoder(image: Image.Image) -> str:
    return image.tile[0].codec_name if image.format == "PPM" and image.tile else ""  # type: ignore[attr-defined]


def _common_pnm(image: Image.Image, data: bytes) -> bytes:
    """The same PGM or PPM on the scale to which Pillow would convert it value by value, which takes minutes for a large
    one."""
    tile: Any = image.tile[0]  # type: ignore[attr-defined]
    most, top = tile.args[-1], 65535 if image.mode == "I" else 255
    values = np.frombuffer(data, ">u2" if most > 255 else "u1", offset=tile.offset)
    values = values[: image.width * image.height * len(image.getbands())]
    parts = [f"P{6 if image.mode == 'RGB' else 5} {image.width} {image.height} {top}\n".encode()]
    for first in range(0, len(values), _LARGE // 16):
        levels = np.rint(values[first : first + _LARGE // 16] / most * top).clip(0, top)
        parts.append(levels.astype(">u2" if top > 255 else "u1").tobytes())
    return b"".join(parts)


def _wavelet_levels(image: Image.Image, data: bytes, side: int) -> int:
    """How often a JPEG 2000 may be halved down to `side`. Its COD segment states its levels. Pillow fails if it rounds
    a size differently from the decoder."""
    at = data.find(b"\xff\x52", max(0, data.find(b"\xff\x4f\xff\x51")))
    most = data[at + 9] if 0 <= at < len(data) - 9 else 0
    fits = [
        k for k in range(1, min(most, 10) + 1)
        if min(image.size) >> k >= side and all((x + (1 << k >> 1)) >> k == -(-x >> k) for x in image.size)
    ]  # fmt: skip
    return max(fits, default=0)


def _rgb(image: Image.Image, scale: _Scale | None, size: int, fit: Literal["crop", "pad"]) -> Image.Image:
    """Upright, 8 bits a channel. A large picture is first shrunk by a whole number, in strips, so that it is never
    copied; `_square` shrinks others by the same rule."""
    side = min(image.size) if fit == "crop" else max(image.size)
    factor = side // (3 * size)
    if image.width * image.height <= _LARGE or factor < 2:
        return _eight_bits(_upright(image), scale)
    rows = factor * max(1, _LARGE // 4 // (factor * image.width))
    tops = range(0, image.height, rows)
    boxes = [(0, top, image.width, min(top + rows, image.height)) for top in tops]
    if scale is not None and image.mode == "I":  # the whole shows whether it has only one shade, a strip does not
        _levels(Image.fromarray(np.array([image.getextrema()], np.int32)), scale)
        scale = dataclasses.replace(scale, is_stated=True)
    strips = [_eight_bits(image.crop(box), scale).reduce(factor) for box in boxes]
    whole = Image.new(strips[0].mode, (strips[0].width, sum(strip.height for strip in strips)))
    for top, strip in zip(tops, strips, strict=True):
        whole.paste(strip, (0, top // factor))
    whole.getexif()[_ORIENTATION] = _orientation(image)
    return _upright(whole)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block rotates nothing
        return 1


def _facts(image: Image.Image) -> Facts:
    orientation = _orientation(image)
    found = (
        orientation in range(2, 9), image.mode == "CMYK", image.mode in ("1", "L", "LA", "La", "I", "I;16", "I;16B"),
        image.mode.startswith("I"), _is_transparent(image), bool(getattr(image, "is_animated", False)),
    )  # fmt: skip
    notes = tuple(note for note, holds in zip(NOTES, found, strict=True) if holds)
    return Facts(image.format or "", image.width, image.height, notes)


def encode(image: Image.Image) -> bytes:
    """A PNG: for pages and generated pictures."""
    sink = io.BytesIO()
    image.save(sink, format="PNG", compress_level=3)
    return sink.getvalue()


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block is not a reason to lose the picture
        return image


@dataclass(frozen=True, slots=True)
class _Scale:
    """A file's grey values of black (`low`) and white, or of white and black if `is_inverted`. `is_stated`: a tag gives
    them, not the type of the values."""

    low: float
    high: float
    is_inverted: bool = False
    is_stated: bool = False
    is_unsigned: bool = True


def _scale(image: Image.Image) -> _Scale | None:
    """For an image with one channel of more than 8 bits, or of signed values; None if Pillow's values have 8 bits.

    Pillow converts PNG, PGM and JPEG 2000 to 16 bits and keeps TIFF's values: their range is that of BitsPerSample and
    SampleFormat, unless SMinSampleValue and SMaxSampleValue state another (TIFF 6.0, section 19). Raises DataError: the
    range is unknown, or Pillow does not keep it.
    """
    if image.format != "TIFF":
        return _Scale(0, 65535) if image.mode.startswith("I") else None
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    bits, form = int(np.ravel(tags.get(258, 1))[0]), int(np.ravel(tags.get(339, 1))[0])
    stated = [float(np.ravel(tags[tag])[pick]) for tag, pick in ((340, 0), (341, -1)) if tag in tags]
    is_stated = len(stated) == 2 and stated[0] < stated[1]
    if image.mode in ("1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"):
        if bits > 8 and is_stated and tuple(stated) != (0, 2**bits - 1):
            raise DataError("16 bits a channel on a scale of its own; save it with 8 bits a channel")
        return _Scale(-128, 127, is_unsigned=False) if (bits, form) == (8, 2) else None
    if form == 3 and not is_stated:
        raise DataError("32-bit float pixels on no stated scale; save it with 8 or 16 bits a channel")
    low: float
    high: float
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if form == 2 else (0, 2**bits - 1)
    if is_stated:
        low, high = (value if form == 3 else int(value) for value in stated)
    return _Scale(low, high, int(tags.get(262, 1)) == 0, is_stated, form == 1)


def _eight_bits(image: Image.Image, scale: _Scale | None) -> Image.Image:
    """RGB, or RGBA if the file has any kind of transparency."""
    if scale is not None:
        hidden = image.info.get("transparency")
        image, values = _levels(image, scale)
        if hidden is not None:
            image.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return image.convert("RGBA" if _is_transparent(image) else "RGB")


def _levels(image: Image.Image, scale: _Scale) -> tuple[Image.Image, np.ndarray]:
    """The upper 8 bits of the scale as an image, and the values as they were stored."""
    values: np.ndarray
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise DataError("float pixels, some of them not finite")
        levels = np.floor((values - scale.low) / (scale.high - scale.low) * 256)
    else:
        values = np.asarray(image).astype(np.int64)
        if image.mode == "L":  # signed bytes, which Pillow reads as unsigned
            values = values.astype(np.int8).astype(np.int64)
        elif scale.is_unsigned:  # Pillow reads them as signed
            values = values & 0xFFFFFFFF
        levels = (values - int(scale.low)) * 256 // (int(scale.high) - int(scale.low) + 1)
    levels = levels.clip(0, 255).astype(np.uint8)
    if scale.high - scale.low >= 2**24 and not scale.is_stated and levels.min() == levels.max():
        raise DataError(
            f"32-bit integer pixels from {values.min()} to {values.max()}, one shade on the scale of their type; save "
            "them with 8 or 16 bits a channel, or state SMaxSampleValue"
        )
    return Image.fromarray(255 - levels if scale.is_inverted else levels), values


_OTHERS = {
    b"<": "a web page or another text", b"%PDF": "a PDF file", b"PK\x03\x04": "a ZIP archive", b"{": "JSON",
    b"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` fetches what it stands for",
    b"\x1f\x8b": "compressed with gzip", b"\x89HDF": "an HDF5 file", b"\x93NUMPY": "an array of NumPy",
    b"8BPS": "a PSD file", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"%!PS": "PostScript",
}  # fmt: skip


def _no_image(data: bytes) -> str:
    """The kind of file, as far as the first bytes show it."""
    if data[4:8] == b"ftyp":
        kind = "HEIC" if data[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc") else "a film"
        if b"avif" in data[8:64] or data[8:12] == b"avis":
            return "cannot be decoded: a damaged AVIF"
        return f"not an image: it is {kind}, which is not read; convert it to JPEG or PNG"
    for start, what in _OTHERS.items():
        if data.lstrip()[: len(start)] == start or data.startswith(start):
            return f"not an image: it is {what}"
    return "not an image"


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _square(image: Image.Image, size: int, fit: Literal["crop", "pad"]) -> Image.Image:
    """Resized with an antialiasing bicubic filter. Pillow weighs colours by alpha, so hidden colours do not bleed."""
    width, height = image.size
    side = min(width, height) if fit == "crop" else max(width, height)
    if fit == "crop":
        left, top = (width - side) / 2, (height - side) / 2
        box, shape = (left, top, left + side, top + side), (size, size)
    else:
        box = (0, 0, width, height)
        shape = (max(1, round(size * width / side)), max(1, round(size * height / side)))
    image = image.resize(shape, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    canvas = Image.new("RGB", (size, size), BACKGROUND)
    mask = image.getchannel("A") if image.mode == "RGBA" else None
    canvas.paste(image.convert("RGB"), ((size - shape[0]) // 2, (size - shape[1]) // 2), mask)
    return canvas

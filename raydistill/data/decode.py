"""From a file's bytes to the square, upright RGB picture that every later stage reads. All pixel trouble ends here.

Rules: content decides, not the extension; EXIF orientation is applied; CMYK, grey and palette become RGB; values of
more than 8 bits keep the upper 8 of the scale that the file states; transparency is laid on white; of an animation the
first frame counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from raydistill.errors import DataError

_ORIENTATION = 0x0112  # EXIF's tag
BACKGROUND = (255, 255, 255)
# What Pillow may try. Of its other formats some start a program (Ghostscript for EPS), which no image file may do here.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")

# Of what is wrong in a file the reason of its refusal speaks. Pillow logs some of it as well, and libtiff writes it to
# stderr, up to hundreds of lines a file. (Builds of Pillow that have libtiff inside them give no way to it.)
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError, OSError):
    _pillow = ctypes.CDLL(Image.core.__file__)
    _pillow.TIFFSetErrorHandler(None)
    _pillow.TIFFSetWarningHandler(None)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file held: its format by content, pixels as they were stored, and what was done to it that its owner may
    not expect, in words of `NOTES`."""

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
    """An RGB picture of `size` x `size` pixels. Raises DataError with the reason, which names no file."""
    return decode_with_facts(data, size, fit, max_pixels)[0]


def decode_with_facts(
    data: bytes, size: int, fit: Literal["crop", "pad"], max_pixels: int
) -> tuple[Image.Image, Facts]:
    """The same, and what the file held."""
    if not data:
        raise DataError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's notes on odd metadata; what matters is whether it decodes
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > max_pixels:
                raise DataError(f"{image.width}x{image.height} pixels, above images.max_pixels={max_pixels}")
            facts, scale = _facts(image), _scale(image)
            image.draft("RGB", (2 * size, 2 * size))  # JPEG decodes at a fraction of its size where that is enough
            image.load()
            return _square(_eight_bits(_upright(image), scale), size, fit), facts
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError(_no_image(data)) from None
    except Image.DecompressionBombError as error:
        raise DataError(str(error)) from None
    except MemoryError:
        raise DataError("too large to decode in the memory there is") from None
    except Exception as error:  # Pillow's plugins raise nearly everything on damaged files; the reason is kept
        raise DataError(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None


def _facts(image: Image.Image) -> Facts:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block, which turns nothing
        orientation = 1
    found = (
        orientation in range(2, 9), image.mode == "CMYK", image.mode in ("1", "L", "LA", "La", "I", "I;16", "I;16B"),
        image.mode.startswith("I"), _is_transparent(image), bool(getattr(image, "is_animated", False)),
    )  # fmt: skip
    notes = tuple(note for note, holds in zip(NOTES, found, strict=True) if holds)
    return Facts(image.format or "", image.width, image.height, notes)


def encode(image: Image.Image) -> bytes:
    """Lossless, so that what trains is bit for bit what is predicted on later."""
    sink = io.BytesIO()
    image.save(sink, format="PNG", compress_level=3)
    return sink.getvalue()


def pixels(encoded: bytes) -> np.ndarray:
    """The (H, W, 3) uint8 array of a working image."""
    return np.asarray(Image.open(io.BytesIO(encoded)))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return image


@dataclass(frozen=True, slots=True)
class _Scale:
    """What black and white are in a file's grey values, and which of both is the lower. `is_stated`: by a tag of its
    own, and not by the values' type."""

    low: float
    high: float
    is_inverted: bool = False
    is_stated: bool = False
    is_unsigned: bool = True


def _scale(image: Image.Image) -> _Scale | None:
    """Of an image with one channel of more than 8 bits, or of signed ones; None where Pillow's values are of 8 already.

    Pillow brings PNG, PGM and JPEG 2000 to 16 bits and leaves TIFF's values as they are stored: their range is that of
    BitsPerSample and SampleFormat, unless SMinSampleValue and SMaxSampleValue state another (TIFF 6.0, section 19).
    Raises DataError: a range that is not known, or that Pillow would not keep.
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
    """RGB, or RGBA where the file has any kind of transparency."""
    if scale is not None:
        hidden = image.info.get("transparency")
        image, values = _levels(image, scale)
        if hidden is not None:
            image.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    if _is_transparent(image):
        return image.convert("RGBA")
    return image.convert("RGB")


def _levels(image: Image.Image, scale: _Scale) -> tuple[Image.Image, np.ndarray]:
    """The upper 8 bits of the scale, and the values as they were stored."""
    values: np.ndarray
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise DataError("float pixels of which some are not finite")
        levels = np.floor((values - scale.low) / (scale.high - scale.low) * 256)
    else:
        values = np.asarray(image).astype(np.int64)
        if image.mode == "L":  # signed bytes, which Pillow takes for unsigned ones
            values = values.astype(np.int8).astype(np.int64)
        elif scale.is_unsigned:
            values = values & 0xFFFFFFFF  # which Pillow takes for signed ones
        levels = (values - int(scale.low)) * 256 // (int(scale.high) - int(scale.low) + 1)
    levels = levels.clip(0, 255).astype(np.uint8)
    if scale.high - scale.low >= 2**24 and not scale.is_stated and levels.min() == levels.max():
        raise DataError(
            f"32-bit integer pixels from {values.min()} to {values.max()}, one shade on the scale of their type; save "
            "it with 8 or 16 bits a channel, or state its SMaxSampleValue"
        )
    return Image.fromarray(255 - levels if scale.is_inverted else levels), values


_OTHERS = {
    b"<": "a web page or another text", b"%PDF": "a PDF file", b"PK\x03\x04": "a ZIP archive", b"{": "JSON",
    b"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` fetches what it stands for",
    b"\x1f\x8b": "compressed with gzip", b"\x89HDF": "an HDF5 file", b"\x93NUMPY": "an array of NumPy",
    b"8BPS": "a PSD file", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"%!PS": "PostScript",
}  # fmt: skip


def _no_image(data: bytes) -> str:
    """Why, as far as the first bytes tell."""
    if data[4:8] == b"ftyp":
        kind = "HEIC" if data[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc") else "a film"
        return f"not an image: it is {kind}, which is not read; convert it to JPEG or PNG"
    for start, what in _OTHERS.items():
        if data.lstrip()[: len(start)] == start or data.startswith(start):
            return f"not an image: it is {what}"
    return "not an image"


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _square(image: Image.Image, size: int, fit: Literal["crop", "pad"]) -> Image.Image:
    """Resized with an antialiasing bicubic filter; Pillow weighs colours by alpha, so hidden colours do not bleed."""
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

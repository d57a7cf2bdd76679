"""From a file's bytes to the square, upright RGB picture that every later stage reads. All pixel trouble ends here.

Rules: content decides, not the extension; EXIF orientation is applied; CMYK, grey and palette become RGB; 16 bits
become 8 by dropping the lower half; transparency is laid on white; of an animation the first frame counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import warnings
from dataclasses import dataclass
from typing import Literal

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
            facts = _facts(image)
            image.draft("RGB", (2 * size, 2 * size))  # JPEG decodes at a fraction of its size where that is enough
            image.load()
            return _square(_eight_bits(_upright(image)), size, fit), facts
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError("not an image") from None
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


def _eight_bits(image: Image.Image) -> Image.Image:
    """RGB, or RGBA where the file has any kind of transparency."""
    if image.mode == "F":
        raise DataError("32-bit float pixels; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip to white
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError("32-bit integer pixels; save it with 8 or 16 bits a channel")
        hidden = image.info.get("transparency")
        image = Image.fromarray((values >> 8).astype(np.uint8))
        if hidden is not None:
            image.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    if _is_transparent(image):
        return image.convert("RGBA")
    return image.convert("RGB")


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

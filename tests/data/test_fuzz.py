"""Mutated pictures of every format: each decodes to a working image or is refused with a reason, and soon."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from PIL import Image, features

from raydistill.data.decode import decode_with_facts
from raydistill.errors import CheckpointError, DataError

FORMS = {
    "JPEG": ["RGB", "L", "CMYK"], "PNG": ["RGB", "RGBA", "P", "I;16", "1"], "GIF": ["P"], "WEBP": ["RGB", "RGBA"],
    "BMP": ["RGB"], "TIFF": ["RGB", "CMYK", "I;16"], "PPM": ["RGB"], "TGA": ["RGBA"], "ICO": ["RGBA"],
    "JPEG2000": ["RGB"], "AVIF": ["RGB"],
}  # fmt: skip


def originals() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 4), np.uint8)
    picture = Image.fromarray(noise).resize((40, 30), Image.Resampling.BICUBIC)
    found = []
    for form, modes in FORMS.items():
        if form == "AVIF" and not features.check("avif"):
            continue
        for mode in modes:
            if mode == "I;16":
                image = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
            else:
                image = picture.convert("RGB" if mode in ("CMYK", "P") else mode).convert(mode)
            sink, options = io.BytesIO(), {}
            if form == "GIF":
                options = {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}
            elif form == "TIFF" and mode == "RGB":
                options = {"compression": "tiff_lzw"}
            elif form in ("JPEG", "PNG", "WEBP"):
                exif = Image.Exif()
                exif[0x0112] = 6
                options = {"exif": exif}
            image.save(sink, form, **options)
            found.append(sink.getvalue())
    return found


def mutated(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    array = np.frombuffer(data, np.uint8).copy()
    for _ in range(int(rng.integers(1, 6))):
        if not len(array):
            break
        # Headers are short and decide most, so half of the changes fall into the first hundred bytes.
        at = int(rng.integers(0, min(len(array), 100) if rng.random() < 0.5 else len(array)))
        kind, length = int(rng.integers(0, 6)), int(rng.integers(1, 9))
        if kind == 0:
            array[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            array[at : at + length] = rng.choice([0, 1, 127, 128, 255])
        elif kind == 2:
            array[at : at + length] = rng.integers(0, 256, len(array[at : at + length]), np.uint8)
        elif kind == 3:
            array = array[:at]
        elif kind == 4:
            array = np.concatenate([array[: at + length], array[at:]])
        else:
            other = np.frombuffer(others[int(rng.integers(0, len(others)))], np.uint8)
            array = np.concatenate([array[:at], other[at : at + 64], array[at + length :]])
    return array.tobytes()


def is_accepted(data: bytes, use: Callable[[], object], most_seconds: float = 20) -> bool:
    """Whether these bytes are used, or refused in one sentence; soon, on a machine that is busy as well."""
    started = time.monotonic()
    try:
        use()
    except (DataError, CheckpointError) as error:
        if "\n" not in str(error):
            return False
        raise AssertionError(f"{error} of {data.hex()}") from error
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__} of {data.hex()}") from error
    finally:
        assert time.monotonic() - started < most_seconds, data.hex()
    return True


def fuzz(seconds: float, seed: int) -> tuple[int, int]:
    """How many decoded, and how many were refused."""
    rng, files, counts = np.random.default_rng(seed), originals(), [0, 0]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutated(files[int(rng.integers(0, len(files)))], files, rng)
        fit = "crop" if rng.random() < 0.5 else "pad"
        counts[is_accepted(data, partial(decode_fully, data, fit))] += 1
    return counts[1], counts[0]


def decode_fully(data: bytes, fit: str) -> None:
    image, facts = decode_with_facts(data, 32, fit, 10**6)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert 0 < facts.width * facts.height <= 10**6


def test_what_is_mutated_are_good_pictures() -> None:
    for data in originals():
        assert is_accepted(data, partial(decode_fully, data, "crop"))


def test_mutated_pictures_decode_or_are_refused() -> None:
    decoded, refused = fuzz(10, seed=1)
    assert decoded > 50
    assert refused > 50


@pytest.mark.slow
@pytest.mark.short
def test_mutated_pictures_for_a_minute() -> None:
    seed = int(time.time())
    print(f"seed {seed}")
    assert min(fuzz(60, seed)) > 50

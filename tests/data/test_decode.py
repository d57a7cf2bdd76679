"""From bytes to the square RGB picture: damaged files are refused with a reason (case C01), orientation, colour and
transparency come out right (case C04), and the square is cut or padded where it should be."""

import functools
import io
import json
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from raydistill.data import decode as decode_module
from raydistill.data.decode import decode
from raydistill.errors import DataError

WHITE, RED, GREEN, BLUE = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)
LIMIT = 178_956_970
ORIENTATION = 0x0112


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def decoded(data: bytes, size: int = 32, fit: str = "crop", max_pixels: int = LIMIT) -> np.ndarray:
    image = decode(data, size, fit, max_pixels)
    assert image.mode == "RGB"
    assert image.size == (size, size)
    return np.asarray(image).astype(int)


def solid(colour: tuple[int, ...], mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new(mode, size, colour)


def scene(width: int = 64, height: int = 64) -> Image.Image:
    """Smooth, and different in every corner, so that a turn or a mirror shows."""
    down, across = np.mgrid[0:height, 0:width]
    shades = np.stack([255 * across / width, 255 * down / height, 255 * across * down / width / height], axis=-1)
    return Image.fromarray(shades.astype(np.uint8))


def noise(width: int = 200, height: int = 160) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(
    depth: int, colour_type: int, row: bytes, transparent: bytes = b"", rows: int = 64, width: int = 64
) -> bytes:
    """A PNG of equal rows whose tRNS chunk names a transparent colour; Pillow writes none for 16 bits."""
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(b"\0" + row) for _ in range(rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, rows, depth, colour_type, 0, 0, 0)
    hidden = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + hidden + chunk(b"IDAT", body) + chunk(b"IEND", b"")


WHOLE_NOISE = {kind: saved(noise(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}
BAD = {
    **{f"half a {kind}": data[: len(data) // 2] for kind, data in WHOLE_NOISE.items()},
    "empty": b"",
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "a JPEG without its end": WHOLE_NOISE["JPEG"][:-40],
    "the first bytes of a JPEG": WHOLE_NOISE["JPEG"][:20],
    "a decompression bomb": saved(Image.new("1", (20000, 20000))),
    "32-bit floats": saved(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"),
    "32-bit integers": saved(Image.fromarray(np.full((9, 9), 10**6, np.int32)), "TIFF"),
    "negative integers": saved(Image.fromarray(np.full((9, 9), -1, np.int32)), "TIFF"),
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_used_is_refused_with_a_reason(what):
    with pytest.raises(DataError, match=r"^.*\S.*$"):
        decode(BAD[what], 32, "crop", LIMIT)


def test_the_limit_on_pixels_is_exact_and_pillows_own_stays_on():
    data = saved(solid(RED, size=(30, 20)))
    assert decoded(data, max_pixels=600).shape == (32, 32, 3)
    with pytest.raises(DataError, match="30x20"):
        decode(data, 32, "crop", 599)
    assert Image.MAX_IMAGE_PIXELS == LIMIT // 2


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "group4", "tiff_adobe_deflate"])
def test_of_a_damaged_file_nothing_but_the_reason_is_said(capfd: pytest.CaptureFixture[str], compression: str) -> None:
    mode = "1" if compression == "group4" else "RGB"
    data = saved(scene().convert(mode), "TIFF", compression=compression)
    refused = 0
    for at in range(8, len(data), 61):
        for damaged in (data[:at], data[:at] + b"\xff\x7f" + data[at + 2 :]):
            try:
                decode(damaged, 32, "crop", LIMIT)
            except DataError:
                refused += 1
    assert refused
    assert capfd.readouterr() == ("", "")


def test_no_program_is_started_for_a_postscript_file(tmp_path, monkeypatch):
    """Pillow hands such files to Ghostscript, whatever their name."""
    marker, program = tmp_path / "started", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {marker}\necho 10.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DataError):
        decode(page, 32, "crop", LIMIT)
    assert not marker.exists()


LOSSY = {"JPEG": 2, "WEBP": 3, "GIF": 4, "ICO": 0.5}  # format -> mean difference of a smooth picture, of 255
KINDS = [*LOSSY, "PNG", "BMP", "TIFF", "TGA", "PPM", "JPEG2000"]
WHOLE = {kind: saved(scene(40, 30), kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_read_by_its_content(kind):
    """There is no name to go by: a WebP called .jpg is a WebP."""
    difference = np.abs(decoded(WHOLE[kind]) - decoded(saved(scene(40, 30))))
    assert difference.mean() <= LOSSY.get(kind, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_exif_orientation_comes_out_upright(orientation, kind):
    upright = scene(60, 40)
    undo = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"]
    stored = upright.transpose(Image.Transpose[undo[orientation - 2]]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    found = decoded(saved(stored, kind, exif=exif))
    assert np.abs(found - decoded(saved(upright))).mean() < (0.5 if kind == "PNG" else 3)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0" + b"\xff" * 40,
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x06\0\0\0\x1aright\0",  # an orientation in letters
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x2a\0\0\0\0\0\0",  # orientation 42
        b"Exif\0\0",
        b"",
    ],
)
def test_a_broken_exif_block_costs_no_picture(exif):
    found = decoded(saved(scene(60, 40), "JPEG", exif=exif))
    assert np.abs(found - decoded(saved(scene(60, 40)))).mean() < 3


@pytest.mark.parametrize(
    ("mode", "kind", "noise_level"),
    [("CMYK", "JPEG", 0.5), ("CMYK", "TIFF", 0), ("YCbCr", "TIFF", 2), ("RGBA", "PNG", 0), ("P", "PNG", 3)],
)
def test_colour_models_end_in_the_same_picture(mode, kind, noise_level):
    picture = scene().quantize(256) if mode == "P" else scene().convert(mode)
    options = {"quality": 95} if kind == "JPEG" else {}
    assert np.abs(decoded(saved(picture, kind, **options)) - decoded(saved(scene()))).mean() <= noise_level


def test_grey_and_one_bit_become_equal_channels():
    black_and_white = Image.fromarray(np.arange(64 * 64).reshape(64, 64) // 64 % 2 == 1)
    for picture in (ImageOps.grayscale(scene()), black_and_white):
        expected = np.asarray(picture.convert("L"))[..., None].repeat(3, axis=2)
        np.testing.assert_array_equal(decoded(saved(picture), size=64), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_eight(kind):
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    found = decoded(saved(Image.fromarray(values), kind), size=64)
    np.testing.assert_array_equal(found, (values >> 8)[..., None].repeat(3, axis=2))


# The file's own scale


def tiff(values: np.ndarray, bits: int, form: int = 1, photometric: int = 1, stated: tuple = ()) -> bytes:
    """An uncompressed little-endian TIFF of grey values, or of colour for three dimensions, written by hand."""
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    if bits == 12:
        pairs = values.astype(np.uint16).reshape(-1, 2)
        packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
        data = packed.astype(np.uint8).tobytes()
    else:
        data = values.astype(f"<{ {1: 'u', 2: 'i', 3: 'f'}[form] }{bits // 8}".replace(" ", "")).tobytes()
    short, long, double = 3, 4, 12
    tags = [(256, long, [width]), (257, long, [height]), (258, short, [bits] * channels), (259, short, [1]),
            (262, short, [photometric]), (273, long, [8]), (277, short, [channels]), (278, long, [height]),
            (279, long, [len(data)]), (339, short, [form] * channels)]  # fmt: skip
    tags += [(340 + k, double, [value]) for k, value in enumerate(stated)]
    directory, more, place = b"", b"", 8 + len(data)
    for tag, kind, found in tags:
        cell = struct.pack(f"<{len(found)}{ {short: 'H', long: 'I', double: 'd'}[kind] }".replace(" ", ""), *found)
        if len(cell) > 4:
            where = place + 2 + 12 * len(tags) + 4 + len(more)
            more += cell
            cell = struct.pack("<I", where)
        directory += struct.pack("<HHI", tag, kind, len(found)) + cell.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", place) + data + struct.pack("<H", len(tags)) + directory + bytes(4) + more


RAMP = np.arange(64 * 64).reshape(64, 64) / (64 * 64)  # from 0 to just below 1
EXPECTED = (RAMP * 256).astype(int)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(RAMP * 2**8, 8), EXPECTED),
        (tiff(RAMP * 2**12, 12), EXPECTED),
        (tiff(RAMP * 2**16, 16), EXPECTED),
        (tiff(RAMP * 2**32, 32), EXPECTED),
        (tiff(RAMP * 2**8, 8, photometric=0), 255 - EXPECTED),
        (tiff(RAMP * 2**16, 16, photometric=0), 255 - EXPECTED),
        (tiff(np.floor(RAMP * 2**8) - 2**7, 8, 2), EXPECTED),
        (tiff(np.floor(RAMP * 2**16) - 2**15, 16, 2), EXPECTED),
        (tiff(np.floor(RAMP * 2**32) - 2**31, 32, 2), EXPECTED),
        (tiff(RAMP * 2**10, 16, stated=(0, 2**10 - 1)), EXPECTED),
        (tiff(RAMP * 2**8, 32, stated=(0, 255)), EXPECTED),
        (tiff(np.floor(RAMP * 2**12) - 1024, 16, 2, stated=(-1024, 3071)), EXPECTED),
        (tiff(RAMP, 32, 3, stated=(0, 1)), EXPECTED),
        (tiff(RAMP * 300 - 100, 32, 3, photometric=0, stated=(-100, 200)), 255 - EXPECTED),
        (tiff(np.stack([RAMP * 2**16] * 3, -1), 16, photometric=2), EXPECTED),
        (b"P5 64 64 255\n" + (RAMP * 256).astype(np.uint8).tobytes(), EXPECTED),
        (b"P5 64 64 65535\n" + (RAMP * 65536).astype(">u2").tobytes(), EXPECTED),
        (raw_png(16, 4, b"\x80\x12\xff\xff" * 64, b""), np.full((64, 64), 128)),
        (raw_png(16, 2, b"\x80\x12" * 192, b"\0\0\0\0\0\0"), np.full((64, 64), 128)),
    ],
)  # fmt: skip
def test_values_are_read_on_the_scale_that_the_file_states(data, expected):
    found = decoded(data, size=64)
    np.testing.assert_array_equal(found, expected[..., None].repeat(3, axis=2))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(RAMP * 2**8, 32), "from 0 to 255, one shade on the scale of their type"),
        (tiff(RAMP * 2**8, 32, 2), "one shade"),
        (tiff(RAMP, 32, 3), "32-bit float pixels on no stated scale"),
        (tiff(RAMP * np.nan, 32, 3, stated=(0, 1)), "not finite"),
        (tiff(np.stack([RAMP * 2**12] * 3, -1), 16, photometric=2, stated=(0, 4095)), "a scale of its own"),
        (tiff(np.stack([RAMP * 2**12] * 3, -1), 16, 2, photometric=2), "cannot be decoded|not an image"),
        (tiff(RAMP, 64, 3, stated=(0, 1)), "cannot be decoded|not an image"),
    ],
)
def test_what_would_be_bent_is_refused(data, reason):
    with pytest.raises(DataError, match=reason):
        decode(data, 64, "crop", LIMIT)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\0\0\0\x1cftypheic" + bytes(64), "HEIC, which is not read; convert it"),
        (b"\0\0\0\x1cftypisom" + bytes(64), "a film"),
        (b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(64), "HEIC"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"  <html>", "a web page"),
        (b"%PDF-1.7", "a PDF file"),
        (b"\xff\x0a" + bytes(20), "JPEG XL"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(data, what):
    with pytest.raises(DataError, match=f"^not an image: it is .*{what}"):
        decode(data, 64, "crop", LIMIT)


def test_a_damaged_avif_is_no_film():
    data = bytearray(saved(solid(RED), "AVIF"))
    struct.pack_into(">II", data, data.find(b"ispe") + 8, 0, 0)
    with pytest.raises(DataError, match="a damaged AVIF"):
        decode(bytes(data), 32, "crop", LIMIT)


def hidden_green(mode: str) -> Image.Image:
    """The left half opaque red, the right half a green that is fully transparent."""
    image = Image.new("RGBA", (64, 64), (*RED, 255))
    image.paste((*GREEN, 0), (32, 0, 64, 64))
    return image if mode == "RGBA" else image.quantize(8)


@pytest.mark.parametrize("kind", ["PNG", "palette PNG", "WEBP", "TIFF", "TGA", "GIF"])
@pytest.mark.parametrize("size", [64, 16, 200])
def test_a_hidden_colour_stays_hidden_and_white_shows(kind, size):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    picture = hidden_green("P" if kind.startswith("palette") else "RGBA")
    found = decoded(saved(picture, kind.removeprefix("palette "), **options), size=size)
    margin = max(1, size // 8)
    assert (np.abs(found[:, : size // 2 - margin] - RED) <= 1).all()
    assert (found[:, size // 2 + margin :] == WHITE).all()
    # Red and white make pink along the border: no green that was hidden may show, so red is everywhere the strongest.
    assert (found[..., 0] >= 254).all()
    assert (np.abs(found[..., 1] - found[..., 2]) <= 1).all()


TRANSPARENT = {
    "LA": saved(solid((90, 0), "LA")), "RGB with a key": raw_png(8, 2, bytes(GREEN) * 64, struct.pack(">3H", *GREEN)),
    "grey with a key": raw_png(8, 0, bytes([90]) * 64, struct.pack(">H", 90)),
    "16-bit grey": raw_png(16, 0, b"\x12\x34" * 64, b"\x12\x34"), "1 bit": raw_png(1, 0, bytes(8), b"\0\0"),
}  # fmt: skip


@pytest.mark.parametrize("what", TRANSPARENT)
def test_what_is_wholly_transparent_is_white(what):
    assert (decoded(TRANSPARENT[what]) == WHITE).all()


def test_half_transparency_is_laid_on_white():
    alpha = 102
    found = decoded(saved(solid((10, 100, 200, alpha), "RGBA")))
    expected = [alpha / 255 * value + (1 - alpha / 255) * 255 for value in (10, 100, 200)]
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=0, atol=1.5)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(solid(RED), kind, save_all=True, append_images=[solid(BLUE), solid(GREEN)], **options)
    assert (np.abs(decoded(data) - RED) <= 1).all()


def test_a_wide_picture_is_cut_to_its_centre():
    strip = Image.fromarray(np.repeat([[RED, GREEN, BLUE]], 20, axis=0).repeat(20, axis=1).astype(np.uint8))
    assert (decoded(saved(strip), size=20) == GREEN).all()
    assert (decoded(saved(strip.transpose(Image.Transpose.ROTATE_90)), size=20) == GREEN).all()


def test_a_wide_picture_is_padded_with_white_above_and_below():
    found = decoded(saved(solid(RED, size=(80, 40))), size=40, fit="pad")
    assert (found[:10] == WHITE).all()
    assert (found[10:30] == RED).all()
    assert (found[30:] == WHITE).all()
    tall = decoded(saved(solid(RED, size=(40, 80))), size=40, fit="pad")
    np.testing.assert_array_equal(tall, found.transpose(1, 0, 2))


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_square_of_the_right_size_is_left_as_it_is(fit):
    np.testing.assert_array_equal(decoded(saved(noise(48, 48)), size=48, fit=fit), np.asarray(noise(48, 48)))


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 3000), (3, 3), (31, 33)])
def test_tiny_and_extreme_shapes_are_pictures_too(shape, fit):
    found = decoded(saved(solid((9, 80, 200), size=shape)), fit=fit)
    is_colour = (np.abs(found - (9, 80, 200)) <= 1).all(axis=-1)
    if fit == "crop":
        assert is_colour.all()
    else:
        narrow = max(1, round(32 * min(shape) / max(shape)))
        assert is_colour.sum() == 32 * narrow
        assert (found[~is_colour] == WHITE).all()


def test_shrinking_averages_and_does_not_alias():
    checks = np.indices((256, 256)).sum(axis=0) % 2 * 255
    found = decoded(saved(Image.fromarray(checks.astype(np.uint8))), size=32)
    inner = found[2:-2, 2:-2]
    assert np.abs(inner - 127.5).max() < 6


@pytest.mark.parametrize("shape", [(1600, 1200), (2400, 300), (300, 1500)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_large_jpeg_is_as_sharp_as_its_lossless_copy(shape, fit):
    """JPEG is decoded at a fraction of its size where that is enough, and only there."""
    across = np.arange(shape[0]) * 16 // min(shape) % 2
    stripes = Image.fromarray(np.broadcast_to(255 * across, shape[::-1]).astype(np.uint8)).convert("RGB")
    from_jpeg = decoded(saved(stripes, "JPEG", quality=95), size=64, fit=fit)
    from_png = decoded(saved(stripes), size=64, fit=fit)
    assert np.abs(from_jpeg - from_png).mean() < 4
    assert from_jpeg.std() == pytest.approx(from_png.std(), rel=0.03)


def blank_png(width: int, height: int, depth: int) -> bytes:
    return raw_png(depth, 0, bytes((width * depth + 7) // 8), rows=height, width=width)


# Decodes the files of a folder by their numbers, in one process whose peak is set back before each. Prints in MB by how
# much the peak and what is held rose and what was set aside for the picture; and why it was refused.
MEASURE = """
import json, re, sys
from pathlib import Path
from raydistill.data import decode
from raydistill.errors import DataError
def megabytes(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000
kept, of = [0], decode._memory.of
decode._memory.of = lambda size: (kept.append(size), of(size))[1]
for number, most_pixels in enumerate(json.loads(sys.argv[2])):
    data, said = Path(sys.argv[1], str(number)).read_bytes(), ""
    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    try:
        decode.decode(data, int(sys.argv[3]), sys.argv[4], most_pixels)
    except DataError as error:
        said = str(error)
    print(json.dumps([megabytes("VmHWM") - before, megabytes("VmRSS") - before, kept[-1] / 1e6, said]))
"""


def measured(folder: Path, files: Sequence[tuple[bytes, int]], size: int, fit: str) -> list[list]:
    for number, (data, _) in enumerate(files):
        (folder / str(number)).write_bytes(data)
    command = [sys.executable, "-c", MEASURE, str(folder), json.dumps([most for _, most in files]), str(size), fit]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(files)
    return found


def bombs() -> dict[str, tuple[bytes, int, int, str]]:
    """File, the most pixels that are allowed, the most memory in MB that it may take, and what is said of it."""
    huge = blank_png(13_370, 13_370, 1)
    canvas = b"GIF89a" + struct.pack("<HH", 13_370, 13_370) + b"\x80\0\0" + bytes(6) + b","
    canvas += struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\2\2D\1\0;"
    webp = bytes.fromhex("524946461c000000574542505650384c0f0000002ffeffa40a0710fd8ffe0722a2ff0100")
    entry = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(huge), 22)
    note = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200 << 20)))
    small = blank_png(64, 64, 8)
    return {
        "178 million pixels of one bit": (huge, LIMIT, 400, ""),
        "the same where a service allows less": (huge, 50_000_000, 20, "above images.max_pixels"),
        "16 bits": (blank_png(5_000, 5_000, 16), LIMIT, 300, ""),
        "a GIF's canvas": (canvas, LIMIT, 50, "bomb"),
        "a WebP's canvas": (webp, LIMIT, 50, "bomb"),
        "in an icon": (entry + huge, 50_000_000, 50, "above images.max_pixels"),
        "a JPEG 2000": (saved(Image.new("L", (4_200, 4_200)), "JPEG2000"), LIMIT, 50, "bomb"),
        "a progressive JPEG": (saved(Image.new("L", (5_000, 5_000)), "JPEG", progressive=True), LIMIT, 150, ""),
        "a note of 100 MB": (small[:33] + note + small[33:], LIMIT, 50, "too large"),
        "one strip": (saved(Image.new("1", (9_000, 9_000)), "TIFF", compression="group4"), LIMIT, 400, ""),
    }


def test_no_bomb_takes_gigabytes_and_none_keeps_them(tmp_path):
    cases = bombs()
    found = measured(tmp_path, [case[:2] for case in cases.values()], 64, "pad")
    for (name, (_, _, most, words)), (peak, kept, _, said) in zip(cases.items(), found, strict=True):
        assert words in said, name
        assert bool(said) == bool(words), (name, said)
        assert peak < most, name
        assert kept < 40, name


def of_runs(side: int, runs: bytes) -> bytes:
    """A BMP of a picture in run lengths."""
    head = struct.pack("<IHHIIiiHHIIiiII", 1078, 0, 0, 1078, 40, side, side, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + head + b"\0\0\xff\0" * 256 + runs


def of_tiles(side: int) -> bytes:
    """A JPEG 2000 of a few bytes whose header states so many times so many tiles."""
    data = bytearray(saved(Image.new("L", (side, side)), "JPEG2000"))
    struct.pack_into(">II", data, data.find(b"\xff\x51") + 22, 1, 1)
    return bytes(data)


def as_mpo(jpeg: bytes) -> bytes:
    """The same picture with the block of a camera that takes several: Pillow calls it by another name."""
    second = {"save_all": True, "append_images": [Image.new("L", (8, 8))]}
    mpo = saved(Image.new("L", (64, 64)), "MPO", **second)
    at = mpo.find(b"\xff\xe2")
    return jpeg[:2] + mpo[at : at + 2 + int.from_bytes(mpo[at + 2 : at + 4], "big")] + jpeg[2:]


@functools.cache
def tiny_steps() -> dict[str, bytes]:
    """Files of some megabytes that Pillow goes through byte by byte, in minutes for the largest that are allowed."""
    png, jpeg = saved(Image.new("L", (64, 64)), "PNG"), saved(Image.new("L", (64, 64)), "JPEG")
    gif = b"GIF89a" + struct.pack("<HH", 64, 64) + b"\x80\0\0" + bytes(6)
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 322: 60_000, 323: 60_000, 324: 8, 325: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    scans = saved(Image.new("L", (4_000, 4_000)), "JPEG", progressive=True)
    last = scans.rfind(b"\xff\xda")
    return {
        "spaces in a header": b"P6 " + b" " * 3_000_000 + b"10 10 255\n" + bytes(300),
        "a note in a header": b"P6 #" + b"x" * 3_000_000 + b"\n10 10 255\n" + bytes(300),
        "notes between numbers": b"P2 200 200 255\n" + b"#\n" * 2_000_000 + b"1 " * 40_000,
        "PNG chunks": png[:33] + chunk(b"quUx", b"") * 300_000 + png[33:],
        "GIF extensions": gif + b"\x21\xfe\x01a\0" * 500_000,
        "JPEG segments": jpeg[:2] + b"\xff\xfe\0\2" * 500_000 + jpeg[2:],
        "JPEG fill bytes": jpeg[:2] + b"\xff" * 2_000_000 + jpeg[2:],
        "JPEG scans": scans[:last] + scans[last:-2] * 500 + scans[-2:],
        "JPEG scans of a camera's file": as_mpo(scans[:last] + scans[last:-2] * 500 + scans[-2:]),
        "JPEG 2000 tiles": of_tiles(255),
        "ends of lines": of_runs(64, bytes(20_000_000)),
        "runs of a large picture": of_runs(5_000, bytes(20_000_000)),
        "a tile larger than its picture": b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4),
    }


@pytest.mark.parametrize("name", tiny_steps())
def test_what_is_gone_through_in_tiny_steps_is_refused_at_once(name):
    began = time.process_time()
    with pytest.raises(DataError, match=r"too many small pieces|save it as binary|without RLE|bomb|above 1,024 MiB"):
        decode(tiny_steps()[name], 32, "crop", LIMIT)
    assert time.process_time() - began < 3


def test_few_tiles_runs_and_scans_are_read():
    assert decode(of_tiles(30), 32, "crop", LIMIT).size == (32, 32)
    assert (decoded(of_runs(64, b"\x40\x07\0\0" * 64 + b"\0\1")) == RED).all()
    scans = as_mpo(saved(solid(RED), "JPEG", progressive=True))
    assert Image.open(io.BytesIO(scans)).format == "MPO"
    assert np.abs(decoded(scans) - RED).max() < 3


@pytest.mark.parametrize(("kind", "most"), [(b"P5", 100), (b"P5", 1000), (b"P6", 31), (b"P6", 4095), (b"P5", 254)])
def test_a_pnm_of_any_scale_is_what_pillow_makes_of_it(kind, most):
    rng, bands = np.random.default_rng(most), 3 if kind == b"P6" else 1
    values = rng.integers(0, most + 9, (20, 20, bands)).astype(">u2" if most > 255 else "u1")
    data = kind + b" 20 20 %d\n" % most + values.tobytes()
    whole = Image.open(io.BytesIO(data))  # decodes value by value
    if whole.mode == "I":
        whole = Image.fromarray(np.asarray(whole).astype(np.uint16))
    np.testing.assert_array_equal(decoded(data, 20), decoded(saved(whole), 20))
    with pytest.raises(DataError):
        decoded(data[:-20], 20)


def large(mode: str) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    coarse = np.random.default_rng(0).integers(0, 255, (150, 200, bands), dtype=np.uint8)
    return Image.fromarray(coarse.repeat(16, 0).repeat(16, 1).squeeze(), mode)


def of_every_format() -> Iterator[tuple[str, bytes]]:
    """7.7 million pixels each, so that those that are handled whole are."""
    grey, rgb, rgba = large("L"), large("RGB"), large("RGBA")
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    palette, more = rgb.quantize(64), {"save_all": True, "append_images": [rgb.rotate(180)]}
    for mode in (grey, rgb, rgba, grey.convert("LA"), grey.convert("1"), palette, wide):
        yield f"PNG {mode.mode}", saved(mode, "PNG", compress_level=1)
    for mode in (grey, rgb, rgb.convert("CMYK")):
        for progressive in (False, True):
            for subsampling in (0, 2):
                yield f"JPEG {mode.mode}", saved(mode, "JPEG", progressive=progressive, subsampling=subsampling)
    for mode in (rgb, rgba):
        yield f"WebP {mode.mode}", saved(mode, "WEBP", method=0)
        yield f"WebP lossless {mode.mode}", saved(mode, "WEBP", method=0, lossless=True)
        yield f"AVIF {mode.mode}", saved(mode, "AVIF", speed=10)
        yield f"AVIF 4:4:4 {mode.mode}", saved(mode, "AVIF", speed=10, subsampling="4:4:4")
    yield "WebP animated", saved(rgb, "WEBP", method=0, **more)
    for mode in (grey, rgb, rgba):
        yield f"JPEG 2000 {mode.mode}", saved(mode, "JPEG2000")
    yield "JPEG 2000 in tiles", saved(rgb, "JPEG2000", tile_size=(512, 512))
    for packing in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "lzma"):
        yield f"TIFF {packing}", saved(rgb, "TIFF", compression=packing)
        yield f"TIFF {packing} in one strip", saved(rgb, "TIFF", compression=packing, tiffinfo={278: rgb.height})
    floats = Image.fromarray(np.asarray(grey).astype(np.float32))
    yield "TIFF of floats", saved(floats, "TIFF", tiffinfo={340: 0.0, 341: 255.0})
    yield "TIFF of 16 bits", saved(wide, "TIFF", compression="tiff_lzw")
    yield "TIFF of 32 bits", saved(Image.fromarray(np.asarray(grey).astype(np.int32) << 23), "TIFF")
    yield "TIFF of one bit", saved(grey.convert("1"), "TIFF", compression="group4")
    yield "GIF", saved(palette, "GIF")
    yield "GIF animated", saved(palette, "GIF", **more)
    for form in ("BMP", "PPM", "TGA"):
        yield form, saved(rgb, form)
    yield "PGM of 16 bits", saved(wide, "PPM")
    yield "PGM of 10 bits", b"P5 3200 2400 1023\n" + (np.asarray(wide) >> 6).astype(">u2").tobytes()
    inner = saved(rgba, "PNG", compress_level=1)
    yield "ICO", struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(inner), 22) + inner


@pytest.mark.slow
def test_no_format_takes_more_memory_than_is_kept_for_it(tmp_path):
    names, files = zip(*of_every_format(), strict=True)
    rows = zip(names, measured(tmp_path, [(data, 10**8) for data in files], 128, "crop"), strict=True)
    assert not [(name, *row) for name, row in rows if row[0] > row[2] + 1 or row[3]]


def test_large_pictures_of_all_processes_are_decoded_one_by_one_and_all_answered(monkeypatch, tmp_path):
    """Another process holds the place until it is told."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(decode_module, "_memory", decode_module._Memory(1 << 28))
    script = """if True:
        from raydistill.data import decode
        with decode._memory.of(decode._memory.most + 1):
            print("holds", flush=True)
            input()
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as other, ThreadPoolExecutor() as pool:
        assert other.stdout.readline() == "holds\n"
        data = blank_png(8_000, 5_000, 8)
        answers = [pool.submit(decode, data, 32, "pad", LIMIT) for _ in range(3)]
        assert decode(saved(scene(64, 64)), 32, "pad", LIMIT).size == (32, 32)  # which waits for nobody
        assert not any(answer.done() for answer in answers)
        other.communicate("\n", timeout=60)
        assert [answer.result(timeout=60).size for answer in answers] == [(32, 32)] * 3


def test_less_memory_means_smaller_pictures_and_says_so(monkeypatch):
    monkeypatch.setattr(decode_module, "_most_bytes", 1 << 30)
    monkeypatch.setattr(decode_module, "_memory", decode_module._Memory(1 << 28))
    data = saved(Image.new("L", (3_000, 3_000)), "PNG", compress_level=0)
    decode_module.limit_memory(1 << 40, 64)
    decode(data, 32, "pad", LIMIT)
    decode_module.limit_memory(32 << 20, 2)
    with pytest.raises(DataError, match=r"3000x3000 pixels would take 8 MiB to decode, above 8 MiB"):
        decode(data, 32, "pad", LIMIT)


def test_a_large_picture_is_what_pillow_makes_of_the_whole():
    """It is shrunk in strips, and turned after that."""
    whole = scene(440, 412).resize((4_400, 4_120), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = saved(whole, compress_level=0, exif=exif)
    flat = whole.transpose(Image.Transpose.ROTATE_270)
    for fit, expected in (("crop", ImageOps.fit(flat, (32, 32))), ("pad", ImageOps.pad(flat, (32, 32), color=WHITE))):
        difference = np.abs(decoded(data, 32, fit) - np.asarray(expected).astype(int))
        assert difference.max() < 20, fit
        assert difference.mean() < 1, fit

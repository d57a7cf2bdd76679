"""Working images as JPEG (`images.store: jpeg`): one decoder for all readers, and nothing decoded that is not ours."""

import hashlib
import io
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from raydistill.config import Images
from raydistill.data.jpeg import decoded, refuse_other_jpegs, stored
from raydistill.data.sample import SCHEMA, SampleSet, encode_shard, sample_id, working_images
from raydistill.data.targets import read_labels, read_samples
from raydistill.errors import CheckpointError
from tests.small_run import painted

SIDE = 40
IMAGES = Images(path="unused", size=SIDE, store="jpeg")


@pytest.fixture
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    smooth = np.mgrid[:SIDE, :SIDE].sum(0)[..., None] * [1, 2, 3]
    return [painted(label, rng, SIDE) for label in range(3)] + [Image.fromarray(smooth.astype(np.uint8))]


@pytest.fixture
def written(tmp_path) -> Callable[[list[bytes]], SampleSet]:
    """Writes a shard that holds these bytes."""

    def write(files: list[bytes]) -> SampleSet:
        columns = {"sample_id": list(map(sample_id, files)), "image": files, "label": [0] * len(files)}
        columns |= {"source": ["real"] * len(files), "split": ["train"] * len(files)}
        (tmp_path / "train-00000.parquet").write_bytes(encode_shard(pa.table(columns)))
        return SampleSet(str(tmp_path), ("a",), SIDE, {"train": (len(files),)}, {"train": 0}, 0, {}, {}, "jpeg")

    return write


def saved(image: Image.Image, **how: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, **({"format": "JPEG", "quality": 95, "subsampling": 0} | how))
    return sink.getvalue()


def test_pixels_come_back_nearly_as_they_were(pictures, written):
    files = [stored(picture.tobytes(), IMAGES) for picture in pictures]
    samples = written(files)
    table = read_samples(samples, "train", 0)
    assert table.schema.equals(SCHEMA)
    found = working_images(table, SIDE)
    for image, file, picture in zip(found, files, pictures, strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(file))))
        assert np.abs(image.astype(int) - np.asarray(picture)).mean() < 5  # with colours at half size: 27
    np.testing.assert_array_equal(working_images(table.take([2, 0]), SIDE), found[[2, 0]])
    assert read_labels(samples, "train", 0).tolist() == [0] * 4


def test_another_process_stores_and_sees_the_same(pictures):
    files = [stored(picture.tobytes(), IMAGES) for picture in pictures]
    code = (
        "import hashlib, sys; from raydistill.config import Images; from raydistill.data.jpeg import decoded, stored\n"
        f"images = Images(path='unused', size={SIDE}, store='jpeg')\n"
        f"data, each = sys.stdin.buffer.read(), 3 * {SIDE}**2\n"
        "files = [stored(data[k : k + each], images) for k in range(0, len(data), each)]\n"
        f"print(hashlib.sha256(b''.join(files) + decoded(files, {SIDE}).tobytes()).hexdigest())"
    )
    pixels = b"".join(picture.tobytes() for picture in pictures)
    found = subprocess.run([sys.executable, "-c", code], input=pixels, capture_output=True, check=True).stdout.decode()
    assert found.strip() == hashlib.sha256(b"".join(files) + decoded(files, SIDE).tobytes()).hexdigest()


def test_without_jpeg_and_for_refused_images_bytes_stay(pictures):
    pixels = pictures[0].tobytes()
    assert stored(pixels, IMAGES.model_copy(update={"store": "pixels"})) is pixels
    assert stored(b"", IMAGES) == b""
    assert decoded([], SIDE).shape == (0, SIDE, SIDE, 3)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:100], ""),
        (lambda data: b"", "an image is no JPEG"),
        (lambda data: bytes(3 * SIDE**2), "an image is no JPEG"),  # pixels
        (lambda data: data[:20] + bytes(200) + data[220:], ""),
    ],
)
def test_a_damaged_image_is_named_with_its_shard(pictures, written, harm, reason):
    files = [stored(picture.tobytes(), IMAGES) for picture in pictures]
    samples = written([*files[:2], harm(files[2]), files[3]])
    with pytest.raises(CheckpointError) as caught:
        read_samples(samples, "train", 0)
    sentence = (
        rf"train images 1 to 4: {re.escape(samples.path)}/train-00000\.parquet is damaged \(.*{reason}.*\); delete "
    )
    assert re.match(sentence + "it and .*/DONE and run the command again", str(caught.value))
    assert "0x" not in str(caught.value)


def test_what_only_the_header_tells_is_refused_before_anything_is_decoded(pictures, written):
    ours = stored(pictures[0].tobytes(), IMAGES)
    at = ours.index(b"\xff\xc0") + 5
    huge = ours[:at] + (9_000).to_bytes(2) * 2 + ours[at + 4 :]  # 240 MB of pixels
    big = pictures[0].resize((SIDE + 1, SIDE))
    for other in (
        huge, saved(big), saved(pictures[0].convert("L"), subsampling=-1), saved(pictures[0], progressive=True),
        saved(pictures[0].convert("CMYK")), saved(pictures[0], format="PNG"),
    ):  # fmt: skip
        words = "is damaged .an image is (not a plain JPEG of 40 x 40 pixels|no JPEG)"
        with pytest.raises(CheckpointError, match=words):
            read_samples(written([ours, other]), "train", 0)
        with pytest.raises(CheckpointError, match="^some file " + words):
            refuse_other_jpegs(pa.table({"image": [ours, other]}), SIDE, "some file")
    refuse_other_jpegs(pa.table({"image": [ours]}), SIDE, "some file")

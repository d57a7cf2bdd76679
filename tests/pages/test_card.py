"""The model card's code, run as people run it: in a process of its own, with no library but those it names."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from raydistill.inference.predict import Predictor
from raydistill.models import preprocess
from raydistill.models.formats import network_inputs
from raydistill.models.student import read_student
from raydistill.pages.card import ALONE, snippets
from tests.models.conftest import classifier
from tests.small_run import painted

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures_of_many_kinds() -> dict[str, bytes]:
    def saved(image: Image.Image, form: str, **options: object) -> bytes:
        sink = io.BytesIO()
        image.save(sink, form, **options)
        return sink.getvalue()

    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    photo, deep = painted(0, rng, 400).crop((0, 0, 400, 210)), np.arange(90 * 120).reshape(90, 120).astype(np.uint16)
    clear = photo.convert("RGBA")
    clear.putalpha(Image.fromarray(np.resize(np.arange(256, dtype=np.uint8), (210, 400))))
    return {
        "16 bits, PNG": saved(Image.fromarray(deep * 6), "PNG"), "16 bits, TIFF": saved(Image.fromarray(deep), "TIFF"),
        "16 bits, clear": saved(Image.fromarray(deep // 900 * 5000), "PNG", transparency=20000),
        "large": saved(photo, "PNG"), "JPEG, turned": saved(photo, "JPEG", exif=exif), "small": saved(
            painted(1, rng, 9), "PNG"), "CMYK": saved(photo.convert("CMYK"), "JPEG"), "clear": saved(clear, "PNG"),
        "grey, clear": saved(clear.convert("LA"), "PNG"), "grey": saved(photo.convert("L"), "WEBP"),
        "long": saved(photo.resize((700, 9)), "PNG"), "high": saved(clear.resize((5, 333)), "PNG"),
        "palette": saved(photo.quantize(50), "PNG", transparency=3), "one bit": saved(photo.convert("1"), "PNG"),
    }  # fmt: skip


_LIBRARIES = ("raydistill", "torch", "timm", "transformers", "onnxruntime")
_RUN = """
import json, sys
code, pictures, hidden = json.load(sys.stdin)
sys.modules.update(dict.fromkeys(hidden))
found, say = {}, print
for picture in pictures:
    names = {"print": lambda answer: None}
    exec(code.replace("picture.jpg", picture), names)
    found[picture] = names["logits"].tolist()[0]
say(json.dumps(found))
"""


def logits_of(code: str, title: str, pictures: list[str]) -> dict[str, list[float]]:
    """By picture, of the code as it stands. Libraries that it does not name cannot be imported."""
    needed = {"torch"} if title == "timm" else {"torch", *title.split(" and ")}
    hidden = [name for name in _LIBRARIES if name not in needed and f"import {name}" not in code]
    ran = subprocess.run(
        [sys.executable, "-I", "-c", _RUN], input=json.dumps([code, pictures, hidden]), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("library", "fit", "from_pixels"),
    [
        ("timm", "pad", False),
        pytest.param("timm", "crop", True, marks=pytest.mark.slow),
        pytest.param("transformers", "pad", False, marks=pytest.mark.slow),
        pytest.param("transformers", "crop", False, marks=pytest.mark.slow),
    ],
)
def test_the_cards_code_gives_the_answers_of_predict(exported, tmp_path, library, fit, from_pixels):
    model, size = "timm:test_resnet", 20
    if library == "transformers":
        classifier("ViT").save_pretrained(tmp_path / "vit")
        model, size = f"hf:{tmp_path / 'vit'}", 32
    result, _ = exported(model, size=size, preprocessing=from_pixels)
    about = _with_fit(result.path, fit)
    pictures = {}
    for name, data in pictures_of_many_kinds().items():
        file = tmp_path / f"{name.replace(', ', '-')}.jpg"  # content decides, not the ending
        file.write_bytes(data)
        pictures[str(file)] = data
    predictor = Predictor(result.path)
    expected = {
        file: predictor.probabilities(np.stack([predictor.working_image(data)]))[0] for file, data in pictures.items()
    }
    codes = snippets(about, result)
    del codes[ALONE]  # which has the shape of before inside, and is for pictures without transparency
    assert {"ONNX Runtime", "torch.export"} < codes.keys()
    assert sum(library in title for title in codes) == (2 if library == "timm" else 1)

    def run(title: str) -> dict[str, list[float]]:
        return logits_of(codes[title].replace("FOLDER", result.path), title, list(pictures))

    with ThreadPoolExecutor(2) as pool:
        for title, found in zip(codes, pool.map(run, codes), strict=True):
            for file, probabilities in expected.items():
                np.testing.assert_allclose(softmax(found[file]), probabilities, atol=1e-5, err_msg=f"{title}, {file}")


def _with_fit(folder: str, fit: str) -> dict:
    file = Path(folder, "raydistill.json")
    about = json.loads(file.read_text())
    about["image"]["fit"] = fit
    file.write_text(json.dumps(about))
    return about


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pictures_are_read_as_predict_reads_them(exported, tmp_path, interpolation):
    """For every kind of picture, in either shape, to the pixel; and what the network sees of it."""

    def change(student) -> None:
        student.preprocessing = type(student.preprocessing)(17, (0.1, 0.3, 0.6), (0.4, 0.2, 0.1), interpolation)

    result, checkpoint = exported(formats=[], change=change, size=17)
    wanted = read_student(checkpoint)[0].preprocessing
    for fit in ("crop", "pad"):
        _with_fit(result.path, fit)
        predictor, ours = Predictor(result.path, "torch"), preprocess.Preprocess(result.path)
        for name, data in pictures_of_many_kinds().items():
            (tmp_path / "picture").write_bytes(data)
            seen = np.stack([predictor.working_image(data)])
            np.testing.assert_array_equal(ours.pixels(str(tmp_path / "picture")), seen, name)
            found = ours.normalised(str(tmp_path / "picture"))
            np.testing.assert_allclose(found, network_inputs(seen, wanted, False), atol=1e-4, err_msg=name)
            assert found.dtype == np.float32


def test_what_is_no_picture_is_said_to_be_none(exported, tmp_path):
    result, _ = exported(formats=[])
    (tmp_path / "notes.jpg").write_text("no picture")
    names: dict = {}
    exec(Path(result.path, "preprocess.py").read_text(), names)
    with pytest.raises(ValueError, match="not an image"):
        names["Preprocess"](result.path).pixels(str(tmp_path / "notes.jpg"))

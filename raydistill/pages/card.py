"""The README.md of an exported student: its use, its measures, its sources, and how to load it."""

from __future__ import annotations

from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData
from pydantic import BaseModel

from raydistill.config import RunConfig
from raydistill.data.sample import SampleSet
from raydistill.escaping import markdown, shortened
from raydistill.majority_baseline import compare_with_majority
from raydistill.models.formats import INT8_FILE, PICTURE_FILE
from raydistill.pages.templates import card
from raydistill.results import Exported, GeneratedImages, Report
from raydistill.storage.state import needed_state

_MOST_NAMES = 50  # of classes


class _Pipeline(BaseModel):
    pipeline: str
    licence: str


class _Generated(BaseModel):
    pipeline: _Pipeline


def model_card(
    config: RunConfig,
    samples: SampleSet,
    report: Report,
    generated: GeneratedImages | None,
    about: dict[str, Any],
    exported: Exported,
) -> str:
    """The card as Markdown, with the front matter that model hubs read."""
    names = ", ".join(markdown(shortened(name, 100)) for name in about["classes"][:_MOST_NAMES])
    pipeline = None
    if generated is not None and config.generate is not None:
        pipeline = needed_state(f"{generated.samples.path}/generate.json", _Generated).pipeline
    return card(
        "card.md.html", config=config, samples=samples, report=report, generated=generated, about=about,
        exported=exported, front_matter=_front_matter(about, report), licence_of=licence_of, pipeline=pipeline,
        warnings=compare_with_majority(report.student).warnings,
        names=names + (" …" if len(about["classes"]) > _MOST_NAMES else ""),
        int8=None if exported.int8 is None else int8_words(exported.int8), snippets=snippets(about, exported),
    )  # fmt: skip


def _front_matter(about: dict[str, Any], report: Report) -> str:
    measured: dict[str, Any] = {}
    if report.student:
        split = "test" if "test" in report.student else "val"
        accuracy = round(report.student[split]["accuracy"], 4)
        result = EvalResult("image-classification", "own", "own data", "accuracy", accuracy, dataset_split=split)
        measured = {"model_name": about["model"], "eval_results": [result]}
    data = ModelCardData(
        library_name=about["library"], pipeline_tag="image-classification", license="other",
        tags=["image-classification", "distillation", "raydistill"], **measured,
    )  # fmt: skip
    return data.to_yaml()


def int8_words(int8: dict[str, float | None]) -> str:
    """What INT8 changed, and whether the file is kept, in a sentence."""
    words = f"`{INT8_FILE}` " + ("gives" if int8["kept"] else "is left out: it gives")
    words += f" the same answer to {int8['agreement']:.1%} of {int8['images']} images"
    if int8["accuracy_before"] is not None and int8["accuracy_after"] is not None:
        words += f"; accuracy on them {int8['accuracy_before']:.3f} before and {int8['accuracy_after']:.3f} after"
    if not int8["kept"]:
        drop = "a drop" if int8["accuracy_before"] is not None else "a share of changed answers"
        words += f", {drop} above export.int8_max_drop={int8['max_drop']:g}; raise that to export it anyway"
    return f"{words}."


def licence_of(model: str) -> str:
    """The licence of a model's weights, if timm knows it."""
    name = model.removeprefix("timm:")
    known = timm.get_pretrained_cfg(name) if model.startswith("timm:") and timm.is_model(name) else None
    return (known.license if known is not None else None) or "not stated"


ALONE = "ONNX Runtime alone, for pictures without transparency"
_PICTURE_SNIPPET = (
    "import json", "", "import numpy as np", "import onnxruntime", "from PIL import Image, ImageOps", "",
    f'session = onnxruntime.InferenceSession("FOLDER/{PICTURE_FILE}")',
    'classes = json.loads(session.get_modelmeta().custom_metadata_map["raydistill"])["classes"]',
    'image = ImageOps.exif_transpose(Image.open("picture.jpg")).convert("RGB")',
    'probabilities = session.run(["probabilities"], {"image": np.asarray(image)})[0][0]',
    "print(classes[int(probabilities.argmax())])",
)  # fmt: skip


def snippets(about: dict[str, Any], exported: Exported) -> dict[str, str]:
    """By library, code that gives the same class for `picture.jpg` as `predict`."""
    in_graph = "pixels" if about["input"] == "pixels" else "normalised"
    found = {}
    if PICTURE_FILE in exported.files:
        found[ALONE] = "\n".join(_PICTURE_SNIPPET)
    if "model.onnx" in exported.files:
        found["ONNX Runtime"] = _snippet(
            ["onnxruntime"], [], 'session = onnxruntime.InferenceSession("FOLDER/model.onnx")',
            [f'logits = session.run(["logits"], {{"images": preprocess.{in_graph}("picture.jpg")}})[0]'],
        )  # fmt: skip
    if about["library"] == "timm":
        found["timm"] = _snippet(
            ["timm", "torch"], [], 'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
            _in_torch('model(torch.from_numpy(preprocess.normalised("picture.jpg")))'),
        )  # fmt: skip
    found["transformers" + (" and timm" if about["library"] == "timm" else "")] = _snippet(
        ["torch"], ["from transformers import AutoModelForImageClassification"],
        'model = AutoModelForImageClassification.from_pretrained("FOLDER").eval()',
        _in_torch('model(pixel_values=torch.from_numpy(preprocess.normalised("picture.jpg"))).logits'),
    )  # fmt: skip
    if "model.pt2" in exported.files:
        found["torch.export"] = _snippet(
            ["torch"], [], 'model = torch.export.load("FOLDER/model.pt2").module()',
            _in_torch(f'model(torch.from_numpy(preprocess.{in_graph}("picture.jpg")))'),
        )  # fmt: skip
    return found


def _in_torch(call: str) -> list[str]:
    return ["with torch.inference_mode():", f"    logits = {call}"]


def _snippet(modules: list[str], names: list[str], load: str, run: list[str]) -> str:
    lines = ["import sys", "", *(f"import {module}" for module in modules), *names, "", 'sys.path.append("FOLDER")']
    lines += ["from preprocess import Preprocess", "", load, 'preprocess = Preprocess("FOLDER")', *run]
    return "\n".join([*lines, "print(preprocess.classes[int(logits[0].argmax())])"])

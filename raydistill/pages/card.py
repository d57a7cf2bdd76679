"""The README.md of an exported student: what it is for, how good it is, what it was made from, and how to load it."""

from __future__ import annotations

import json
from typing import Any

import timm
from pydantic import BaseModel

from raydistill.config import RunConfig
from raydistill.data.sample import SampleSet
from raydistill.models.formats import INT8_FILE
from raydistill.results import Exported, GeneratedImages, Report
from raydistill.secrets import redacted
from raydistill.storage.state import needed_state
from raydistill.strangers import code_span, markdown, shorter
from raydistill.usefulness import usefulness


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
    """Markdown with the front matter that model hubs read."""
    parts = [
        _front_matter(about, report),
        f"# {markdown(about['model'])} for {len(about['classes'])} classes",
        *(f"> **Warning.** {markdown(words)}" for words in usefulness(report.student).warnings),
        _purpose(about),
        _measures(report, exported),
        _origins(config, samples, report, generated),
        _how_to_load(about, exported),
    ]
    return redacted("\n\n".join(parts)) + "\n"


def _front_matter(about: dict[str, Any], report: Report) -> str:
    lines = [
        "---", f"library_name: {about['library']}", "pipeline_tag: image-classification",
        "tags: [image-classification, distillation, raydistill]", "license: other",
    ]  # fmt: skip
    if report.student:
        split = "test" if "test" in report.student else "val"
        lines += [
            "model-index:", f"- name: {json.dumps(about['model'])}", "  results:",
            "  - task: {type: image-classification}",
            f"    dataset: {{name: own data, type: own, split: {split}}}",
            f"    metrics: [{{type: accuracy, value: {report.student[split]['accuracy']:.4f}}}]",
        ]  # fmt: skip
    return "\n".join([*lines, "---"])


def _purpose(about: dict[str, Any]) -> str:
    classes, image = about["classes"], about["image"]
    shape = "cut to its central square" if image["fit"] == "crop" else "padded with white to a square"
    names = ", ".join(markdown(shorter(name, 100)) for name in classes[:50]) + (" …" if len(classes) > 50 else "")
    return (
        f"Names one of {len(classes)} classes for a picture: {names}. "
        "It was distilled for pictures like those of its training data; for others its answers, and how sure it is of "
        "them, mean little. It names one of its classes whatever it is shown.\n\n"
        f"A picture is {shape}, {image['size']} pixels on a side (antialiased bicubic; transparency on white, EXIF "
        f"orientation applied), and the network sees it at {about['preprocessing']['size']}."
    )


def _measures(report: Report, exported: Exported) -> str:
    if not report.student:
        return "## Measures\n\nThere were neither val nor test images, so nothing was measured."
    lines = ["## Measures", "", "| | student | 95 % interval | teacher |", "|---|---|---|---|"]
    for split, of_split in report.student.items():
        low, high = of_split["interval"]
        teacher = f"{report.teacher[split]['accuracy']:.3f}" if report.teacher else ""
        lines.append(
            f"| {split}, {of_split['images']} images: accuracy | {of_split['accuracy']:.3f} | "
            f"{low:.3f} to {high:.3f} | {teacher} |"
        )
        for name, title in (("balanced_accuracy", "balanced accuracy"), ("ece", "expected calibration error")):
            teacher = f"{report.teacher[split][name]:.3f}" if report.teacher else ""
            lines.append(f"| {split}: {title} | {of_split[name]:.3f} | | {teacher} |")
    if exported.int8 is not None:
        lines += ["", int8_words(exported.int8)]
    lines += ["", "| speed on CPUs | one image, median | 95th percentile | most images/s | in batches of |"]
    lines += ["|---|---|---|---|---|"]
    for name, s in exported.speed.items():
        lines.append(
            f"| {name} | {s['p50_milliseconds']:.2f} ms | {s['p95_milliseconds']:.2f} ms | "
            f"{s['images_per_second']:,.0f} | {s['batch_size']} |"
        )
    return "\n".join(lines)


def int8_words(int8: dict[str, float | None]) -> str:
    """What INT8 changed, and whether it was too much, in a sentence."""
    words = f"`{INT8_FILE}` " + ("gives" if int8["kept"] else "is left out: it gives")
    words += f" the same answer to {int8['agreement']:.1%} of {int8['images']} images"
    if int8["accuracy_before"] is not None and int8["accuracy_after"] is not None:
        words += f"; accuracy on them {int8['accuracy_before']:.3f} before and {int8['accuracy_after']:.3f} after"
    if not int8["kept"]:
        drop = "a drop" if int8["accuracy_before"] is not None else "and no label says that its accuracy does not drop"
        words += f", {drop} above export.int8_max_drop={int8['max_drop']:g}; raise that to have it all the same"
    return f"{words}."


def _origins(config: RunConfig, samples: SampleSet, report: Report, generated: GeneratedImages | None) -> str:
    rows, labelled = samples.num_rows("train"), samples.num_labelled["train"]
    lines = [
        "## What it was made from",
        "",
        f"- images: {code_span(config.images.path)}, {rows} for training ({labelled} with labels), set "
        f"`{samples.ids['train']}`. The licence of this model is for you to state: mind those of the images, the "
        "teacher and the generator.",
    ]
    if config.teacher is not None and config.loss.needs_teacher:
        lines.append(
            f"- teacher: {code_span(config.teacher.model)}, weights "
            f"{code_span(config.teacher.weights or 'of its name')}, head {config.teacher.head}; "
            f"licence: {licence_of(config.teacher.model)}"
        )
    begin = (
        "random weights"
        if config.student.init == "random"
        else code_span(config.student.weights or config.student.model)
    )
    lines.append(f"- student: {code_span(config.student.model)}, from {begin}; {report.kept}")
    if generated is not None and config.generate is not None:
        facts = needed_state(f"{generated.samples.path}/generate.json", _Generated).pipeline
        lines.append(
            f"- generated images: {sum(generated.kept.values())} by {code_span(facts.pipeline)}; licence: "
            f"{markdown(facts.licence)}"
        )
    return "\n".join(lines)


def licence_of(model: str) -> str:
    """What timm knows of a model's weights."""
    name = model.removeprefix("timm:")
    known = timm.get_pretrained_cfg(name) if model.startswith("timm:") and timm.is_model(name) else None
    return (known.license if known is not None else None) or "not stated"


def _how_to_load(about: dict[str, Any], exported: Exported) -> str:
    lines = [
        "## How to use it", "", "    raydistill predict FOLDER pictures/", "",
        "or without raydistill, by any of the following, where FOLDER is this folder. `preprocess.py` in it reads a "
        "picture as in training, with Pillow and NumPy alone. The transforms of timm and transformers do not: they "
        "give other answers for pictures with transparency, turned by EXIF, of 16 bits"
        + (", or that are not square." if about["image"]["fit"] == "pad" else "."),
    ]  # fmt: skip
    for title, code in snippets(about, exported).items():
        lines += ["", f"With {title}:", "", "```python", code, "```"]
    return "\n".join(lines)


def snippets(about: dict[str, Any], exported: Exported) -> dict[str, str]:
    """By library, code that names the class of `picture.jpg` as `predict` does."""
    in_graph = "pixels" if about["input"] == "pixels" else "normalised"
    found = {}
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

"""The README.md of an exported student: what it is for, how good it is, what it was made from, and how to load it."""

from __future__ import annotations

import json
from typing import Any

import timm

from raydistill.config import RunConfig
from raydistill.data.sample import SampleSet
from raydistill.models.formats import INT8_FILE
from raydistill.secrets import redacted
from raydistill.stages.evaluate import Report
from raydistill.stages.export import Exported
from raydistill.stages.generate import GeneratedImages
from raydistill.storage.filesystems import read_bytes
from raydistill.strangers import code_span, markdown, shorter


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
        _purpose(about),
        _measures(report, exported),
        _origins(config, samples, generated),
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


def _origins(config: RunConfig, samples: SampleSet, generated: GeneratedImages | None) -> str:
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
    lines.append(f"- student: {code_span(config.student.model)}, from {begin}")
    if generated is not None and config.generate is not None:
        facts = json.loads(read_bytes(f"{generated.samples.path}/generate.json"))["pipeline"]
        lines.append(
            f"- generated images: {sum(generated.kept.values())} by {code_span(facts['pipeline'])}; licence: "
            f"{markdown(str(facts['licence']))}"
        )
    return "\n".join(lines)


def licence_of(model: str) -> str:
    """What timm knows of a model's weights."""
    name = model.removeprefix("timm:")
    known = timm.get_pretrained_cfg(name) if model.startswith("timm:") and timm.is_model(name) else None
    return (known.license if known is not None else None) or "not stated"


def _how_to_load(about: dict[str, Any], exported: Exported) -> str:
    if about["library"] == "timm":
        code = 'import timm\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()'
    else:
        code = (
            "from transformers import AutoModelForImageClassification\n"
            'model = AutoModelForImageClassification.from_pretrained("FOLDER").eval()'
        )
    lines = ["## How to use it", "", "    raydistill predict FOLDER pictures/", "", "or", "", "```python", code, "```"]
    if "model.onnx" in exported.files:
        lines += ["", "or without torch:", "", "```python", onnx_code(about), "```"]
    return "\n".join(lines)


def onnx_code(about: dict[str, Any]) -> str:
    """For ONNX Runtime and Pillow alone. It reads a picture to the same pixels as `decode` does."""
    image, wanted = about["image"], about["preprocessing"]
    side = image["size"]
    if image["fit"] == "crop":
        square = [
            "width, height, short = *picture.size, min(picture.size)",
            "left, top = (width - short) / 2, (height - short) / 2",
            "box, shape = (left, top, left + short, top + short), (side, side)",
        ]
    else:
        square = [
            "box, long = (0, 0, *picture.size), max(picture.size)",
            "shape = tuple(max(1, round(side * n / long)) for n in picture.size)",
        ]
    lines = [
        "import json, numpy as np, onnxruntime",
        "from PIL import Image, ImageOps",
        "",
        'session = onnxruntime.InferenceSession("FOLDER/model.onnx")',
        'classes = json.load(open("FOLDER/raydistill.json", encoding="utf-8"))["classes"]',
        f"side = {side}",
        'picture = Image.open("picture.jpg")',
        'picture.draft("RGB", (2 * side, 2 * side))',
        "picture = ImageOps.exif_transpose(picture)",
        'if picture.mode.startswith("I"):  # 16 bits, of which the upper 8 count',
        '    values, hidden = np.asarray(picture), picture.info.get("transparency")',
        "    picture = Image.fromarray((values >> 8).astype(np.uint8))",
        "    if hidden is not None:",
        "        picture.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))",
        'picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")',
        *square,
        "picture = picture.resize(shape, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)",
        'white = Image.new("RGB", (side, side), "white")',
        "corner = ((side - shape[0]) // 2, (side - shape[1]) // 2)",
        'white.paste(picture, corner, picture if picture.mode == "RGBA" else None)',
    ]
    if about["input"] == "pixels":
        lines += ["images = np.asarray(white)[None]"]
    else:
        small = f"({wanted['size']}, {wanted['size']}), Image.Resampling.{wanted['interpolation'].upper()}"
        lines += [
            f'bands = [band.convert("F").resize({small}) for band in white.split()]',
            "images = np.stack([np.asarray(band) for band in bands], axis=-1).clip(0, 255) / 255",
            f"images = (images - {list(wanted['mean'])}) / {list(wanted['std'])}",
            "images = images.transpose(2, 0, 1)[None].astype(np.float32)",
        ]
    lines += ['logits = session.run(["logits"], {"images": images})[0]', "print(classes[logits[0].argmax()])"]
    return "\n".join(lines)

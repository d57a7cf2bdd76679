"""The formats of an exported student: a folder that timm or transformers loads, ONNX, and a torch.export program.

Shapes: B images, H working pixels on a side, S pixels on a side of what the network sees, C classes.
"""

from __future__ import annotations

import inspect
import io
import json
import subprocess
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import timm
import torch
from PIL import Image
from torch import nn

from raydistill.data import decode
from raydistill.data.isolation import python_apart
from raydistill.data.views import WHOLE_IMAGE, Preprocessing, render, resample, view_filters
from raydistill.errors import ConfigError
from raydistill.models import preprocess
from raydistill.models.from_transformers import load_or_refuse
from raydistill.models.onnx_files import Run, limits
from raydistill.models.state_dicts import sizes_of
from raydistill.models.student import Student, TimmClassifier

PREPROCESS_FILE = "preprocess.py"  # reads pictures for the exported files
PICTURE_FILE, INT8_FILE = "picture.onnx", "model_int8.onnx"


class Shipped(nn.Module):
    """A network that returns only logits (B, C). Its input is normalised images, (B, 3, S, S) float32, or, with
    `from_pixels`, working images, (B, H, H, 3) uint8; then it preprocesses them like `views.render`."""

    def __init__(self, student: Student, working_size: int, from_pixels: bool) -> None:
        super().__init__()
        self.network, self._is_timm = student.network, isinstance(student.body, TimmClassifier)
        self._from_pixels, wanted = from_pixels, student.preprocessing
        whole = torch.from_numpy(WHOLE_IMAGE)[None]
        vertical, _ = view_filters(whole, working_size, working_size, wanted, torch.device("cpu"))
        self.register_buffer("filter_SH", resample(torch.eye(working_size)[None], vertical)[0])
        self.register_buffer("mean", torch.tensor(wanted.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(wanted.std)[:, None, None])
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self._from_pixels:
            images_B3HH = images.permute(0, 3, 1, 2).float()
            images_B3SS = self.filter_SH @ images_B3HH @ self.filter_SH.transpose(-1, -2)
            images = (images_B3SS.div(255).clamp(0, 1) - self.mean) / self.std
        return self.network(images) if self._is_timm else self.network(pixel_values=images).logits


def network_inputs(images_BHH3: np.ndarray, preprocessing: Preprocessing, from_pixels: bool) -> np.ndarray:
    """The input of an exported network from working images (B, H, H, 3) uint8: the same, or (B, 3, S, S) float32, equal
    to training's bit for bit."""
    if from_pixels:
        return images_BHH3
    whole = torch.from_numpy(WHOLE_IMAGE).expand(len(images_BHH3), -1)
    return render(torch.from_numpy(images_BHH3), whole, preprocessing).numpy()


def preprocess_source() -> str:
    """A module that reads pictures like `predict` and does not need raydistill. It is the code of `decode`, so that the
    two cannot differ, and of `preprocess`."""
    lines = [
        '"""Reads pictures as input for the files beside this one. Written by raydistill."""', "",
        "from __future__ import annotations", "", "", "class DataError(ValueError):",
        '    """The file is not a picture."""', "", "",
    ]  # fmt: skip
    for module in (decode, preprocess):
        source = inspect.getsource(module)
        lines += [line for line in source.splitlines() if not line.startswith(("from raydistill.", "from __future__"))]
    return "\n".join(lines) + "\n"


def save_for_library(student: Student, classes: Sequence[str], fit: str, folder: Path) -> None:
    """Write `model.safetensors` and `config.json` for timm's `local-dir:` and `hf-hub:` names or, for a transformers
    model, for `from_pretrained`, with its image processor.

    The transforms of both libraries are only similar to ours: they put no white behind transparency, and pad with the
    mean colour. Only `preprocess_source` gives the same images."""
    wanted, network = student.preprocessing, student.network
    if isinstance(student.body, TimmClassifier):
        seen = {
            "input_size": (3, wanted.size, wanted.size), "mean": wanted.mean, "std": wanted.std,
            "interpolation": wanted.interpolation, "crop_pct": 1.0,
            "crop_mode": "center" if fit == "crop" else "border",
        }  # fmt: skip
        # A transformer is built for one size, so the file has to state the size.
        sized = {"img_size": wanted.size} if network.pretrained_cfg.get("fixed_input_size") else None
        timm.models.save_for_hf(
            network, folder, {"label_names": list(classes)}, sized, safe_serialization=True, data_config=seen
        )
        # timm's config states the number of classes twice, and transformers, which reads this file too, needs both.
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.get("model_args", {}).pop("num_classes", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        return
    network.config.id2label = dict(enumerate(classes))
    network.config.label2id = {name: number for number, name in enumerate(classes)}
    network.save_pretrained(folder, safe_serialization=True)
    processor = {
        "image_processor_type": "CLIPImageProcessor" if fit == "crop" else "LlavaImageProcessor",
        "do_convert_rgb": True, "do_pad": fit == "pad", "do_resize": True, "size": {"shortest_edge": wanted.size},
        "do_center_crop": True, "crop_size": {"height": wanted.size, "width": wanted.size},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "resample": Image.Resampling[wanted.interpolation.upper()].value,
        "image_mean": list(wanted.mean), "image_std": list(wanted.std),
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def load_from_library(folder: Path, is_timm: bool) -> nn.Module:
    """The network as a user without raydistill loads it, in eval mode; it returns only logits. Raises ConfigError."""
    if sizes_of(folder) is None:
        raise ConfigError(f"{folder}: has no model.safetensors")
    if is_timm:
        name = f"local-dir:{folder.absolute()}"
        return load_or_refuse(
            str(folder), lambda *_, **__: timm.create_model(name, pretrained=True), str(folder)
        ).eval()
    import transformers

    loaded = load_or_refuse(str(folder), transformers.AutoModelForImageClassification.from_pretrained, str(folder))
    return _Logits(loaded).eval()


class _Logits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_B3SS: torch.Tensor) -> torch.Tensor:
        return self.network(pixel_values=images_B3SS).logits


def to_onnx(network: nn.Module, example: torch.Tensor, about: dict[str, Any], file: Path) -> None:
    """Write one file with the weights inside, any batch size, and `about` as JSON in its metadata."""
    _write_onnx(network, example, ("images",), ("images", "logits"), about, file)


def to_picture_onnx(network: nn.Module, about: dict[str, Any], file: Path) -> None:
    """The same of a PictureClassifier: an `image` of any height and width, `probabilities`."""
    example = torch.zeros((40, 60, 3), dtype=torch.uint8)
    _write_onnx(network, example, ("height", "width"), ("image", "probabilities"), about, file)


def _write_onnx(
    network: nn.Module, example: torch.Tensor, sides: Sequence[str], ends: tuple[str, str], about: dict[str, Any],
    file: Path,
) -> None:  # fmt: skip
    """`sides`: the names of the input's first dimensions, which may be of any length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notes are for its developers
        program = torch.onnx.export(
            network, (example,), dynamo=True, dynamic_shapes=(dict(enumerate(map(torch.export.Dim, sides))),),
            input_names=[ends[0]], output_names=[ends[1]], verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(str(file), external_data=False)
    model = onnx.load(file)
    onnx.helper.set_model_props(model, {"raydistill": json.dumps(about, ensure_ascii=False)})
    onnx.checker.check_model(model)
    onnx.save(model, file)


def to_program(network: nn.Module, example: torch.Tensor, about: dict[str, Any], file: Path) -> None:
    """Write a file for `torch.export.load`, with `about` in its extra files as `raydistill.json`."""
    program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("images")},))
    sink = io.BytesIO()
    extra = {"raydistill.json": json.dumps(about, ensure_ascii=False)}
    torch.export.save(program, sink, extra_files=extra)
    file.write_bytes(sink.getvalue())


def picture_onnx_run(file: Path) -> Run:
    """(B, C) probabilities of pictures (B, H, W, 3), one after the other."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: np.concatenate([session.run(["probabilities"], {"image": image})[0] for image in images])


def program_run(file: Path) -> Run:
    """A function from inputs to logits, from a file of `to_program`."""
    return torch_run(torch.export.load(file).module())


def try_onnx(file: Path, inputs_1: np.ndarray) -> int:
    """The bytes of memory that an answer takes, by a first look at an untrusted file in a separate process, on one
    blank input of the same shape. Raises ConfigError: it is refused, or takes too much memory or time."""
    statement = "import sys; from raydistill.models.onnx_files import answer_blank; answer_blank(*sys.argv[1:])"
    data, seconds = limits(file)
    words = [file, data, seconds, inputs_1.dtype, *inputs_1.shape]
    done = subprocess.run(**python_apart(statement, *map(str, words)), capture_output=True)
    if done.returncode not in (0, 2):
        raise ConfigError(
            f"{file}: its graph needs more than {data >> 20:,} MiB of memory or {seconds} s of one core for one blank "
            "picture, or it ends its process; a network for pictures does not"
        )
    found = json.loads(done.stdout)
    if isinstance(found, str):
        raise ConfigError(found)
    return int(found)


def torch_run(network: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    @torch.inference_mode()
    def run(inputs: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(inputs)
        weights = next(network.parameters(), None) if isinstance(network, nn.Module) else None
        if weights is not None and tensor.is_floating_point():
            tensor = tensor.to(weights)  # the weights' device and precision
        return network(tensor).float().cpu().numpy()

    return run


def quantise(file: Path, to: Path, calibration: Sequence[np.ndarray] | None) -> None:
    """Quantise the weights to INT8 and, with batches of calibration inputs, the activations too (static)."""
    from onnxruntime import quantization

    ready = to.with_suffix(".ready.onnx")
    quantization.quant_pre_process(str(file), str(ready))
    if calibration is None:
        quantization.quantize_dynamic(str(ready), str(to), weight_type=quantization.QuantType.QInt8)
    else:
        batches = iter(calibration)
        reader = SimpleNamespace(get_next=lambda: next(({"images": batch} for batch in batches), None))
        quantization.quantize_static(
            str(ready), str(to), reader, quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            weight_type=quantization.QuantType.QInt8, activation_type=quantization.QuantType.QUInt8,
        )  # fmt: skip
    ready.unlink()

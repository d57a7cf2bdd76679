"""Checks ONNX files from others. A file is first judged, and then classifies a blank picture, in a separate process
with little memory and time. So nothing else has to foresee the memory that a graph takes, if that depends only on the
images' shape: `check_onnx` ensures this."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import resource
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from raydistill.errors import ConfigError

Run = Callable[[np.ndarray], np.ndarray]  # inputs to logits (B, C)
# For the library, one blank picture, and a file of no size. Loading holds the weights up to four times.
_MOST_DATA, _MOST_SECONDS, _BYTES_PER_SECOND = 768 << 20, 8, 100 << 20
_VALUES = ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data")
_LARGE = 1024  # bytes of a tensor that is too large to be a shape
_SEVERAL = 64  # pictures; their tensors may have this many times the numbers of one picture's
_WHOLE = {"tensor(int32)", "tensor(int64)"}
# Operators with other inputs than whole numbers that set the size of the output, or the time: the first such input.
_SIZED_FROM = {
    "NonZero": 0, "Unique": 0, "NonMaxSuppression": 0, "Range": 0, "ImageDecoder": 0, "Compress": 1, "OneHot": 1,
    "Resize": 1, "Upsample": 1, "RoiAlign": 1, "MaxRoiPool": 1,
}  # fmt: skip
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}


def answer_blank(file: str, data: str, seconds: str, dtype: str, *shape: str) -> None:
    """What a process of its own runs. It prints JSON: the bytes of memory that the answer took, or else the reason to
    refuse the file, with the exit status 2. Without either the limits have ended it."""
    path, sides = Path(file), [int(side) for side in shape]
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path}: not a regular file")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (int(data), int(data)))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
        check_onnx(path, sides)
        run = onnx_run(path, threads=1, keeps_memory=False)
        with contextlib.suppress(OSError, AttributeError):  # not Linux with glibc
            ctypes.CDLL(None).malloc_trim(0)  # gives back what loading took
            Path("/proc/self/clear_refs").write_text("5")  # from now on VmHWM is the most that the answer takes
        before = _resident("VmRSS")
        run(np.zeros(sides, dtype))
        print(json.dumps(_resident("VmHWM") - before))
    except ConfigError as error:
        print(json.dumps(str(error)))
        sys.exit(2)


def limits(file: Path) -> tuple[int, int]:
    """Bytes and seconds of a process that loads the file and answers one picture."""
    size = file.stat().st_size
    return _MOST_DATA + 4 * size, _MOST_SECONDS + size // _BYTES_PER_SECOND


def _resident(key: str) -> int:
    """Bytes; 0 if the system does not say."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
    return 0


def onnx_run(file: Path, threads: int = 0, keeps_memory: bool = True) -> Run:
    """A function from inputs to float32 logits, by ONNX Runtime on the CPU. `threads` 0: ONNX Runtime's default. It
    keeps the memory of an answer for the next.

    Raises ConfigError.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = keeps_memory
    options.log_severity_level = 4  # it also raises what it would print
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception:  # its errors have no common class, and their text names source files
        raise ConfigError(
            f"{file}: its graph cannot run: it is damaged, needs too much memory, or has an operator that ONNX Runtime "
            "lacks; export the student again"
        ) from None
    names = [[one.name for one in ends] for ends in (session.get_inputs(), session.get_outputs())]
    if names != [["images"], ["logits"]]:
        raise ConfigError(f"{file}: takes {names[0]!r:.100} and gives {names[1]!r:.100}, not images and logits")

    def run(inputs: np.ndarray) -> np.ndarray:
        try:
            logits_BC: np.ndarray = session.run(["logits"], {"images": inputs})[0]
        except Exception:  # for example, the graph takes images of another size than the folder says
            shape = "x".join(map(str, inputs.shape))
            raise ConfigError(
                f"{file}: does not take images of {shape} {inputs.dtype}, which its folder names, or needs too much "
                "memory; export the student again"
            ) from None
        return logits_BC

    return run


def check_onnx(file: Path, shape: Sequence[int]) -> None:
    """Raises ConfigError: the file is damaged, reads other files, has operators that may not end, or values that are no
    tensors of numbers; or the size of a tensor follows from the images' values, or grows faster than their number.
    `shape` is that of one image as the graph takes it, (1, ...)."""
    try:
        model = onnx.load(file, load_external_data=False)
        if model.functions:
            raise ConfigError(f"{file}: has its own functions, which may call each other without end")
        _check_parts(model.graph, file)
        one, several = _shapes(model, [1, *shape[1:]]), _shapes(model, [_SEVERAL, *shape[1:]])
        for name, sides in one.items():
            if sides and math.prod(several.get(name) or sides) > _SEVERAL * math.prod(sides):
                raise ConfigError(f"{file}: one of its tensors grows faster than the number of pictures")
        version = next((opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")), 1)
        steady = {tensor.name for tensor in model.graph.initializer} | {""}  # values that the images do not change
        for node in model.graph.node:
            if lacking := [name for name in node.output if name and name not in one]:
                raise ConfigError(
                    f"{file}: {lacking[0]!r:.80} ({node.op_type:.40}) is not a tensor of numbers, or ONNX lacks the "
                    "operator in this form"
                )
            if not steady.issuperset(_sizes(node, version, any(one[name] is None for name in node.output if name))):
                raise ConfigError(
                    f"{file}: the size of {node.output[0]!r:.80} ({node.op_type:.40}) follows from the pictures' "
                    "values, so it may be of any size"
                )
            if node.op_type in ("Shape", "Size") or (node.op_type not in _RANDOM and steady.issuperset(node.input)):
                steady.update(node.output)
    except (ConfigError, MemoryError):
        raise
    except Exception:  # errors of protobuf and onnx have no common class, and their text names source files
        raise ConfigError(f"{file}: not an ONNX graph, or a damaged one; export the student again") from None


def _check_parts(graph: Any, file: Path) -> None:
    """Looks at nodes and weights one by one, and drops the values of large weights."""
    tensors = list(graph.initializer)
    for node in graph.node:
        if node.domain not in ("", "ai.onnx") or any(a.graphs or a.HasField("g") for a in node.attribute):
            raise ConfigError(f"{file}: has the operator {node.op_type!r:.40}, which may not end or cannot be checked")
        tensors += [tensor for a in node.attribute for tensor in (*a.tensors, *([a.t] if a.HasField("t") else []))]
        if any(a.HasField("sparse_tensor") or a.sparse_tensors for a in node.attribute):
            raise _sparse(file)
    if graph.sparse_initializer:
        raise _sparse(file)
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ConfigError(f"{file}: its weights are in other files, which are not read; export them into one")
        if tensor.data_type == onnx.TensorProto.STRING:
            raise ConfigError(f"{file}: {tensor.name!r:.80} is text, not a tensor of numbers")
        for field in _VALUES if tensor.ByteSize() > _LARGE else ():
            tensor.ClearField(field)  # shape inference copies the whole model


def _sparse(file: Path) -> ConfigError:
    return ConfigError(
        f"{file}: has sparse weights, which may be far larger than their file; export them as dense ones"
    )


def _shapes(model: Any, shape: Sequence[int]) -> dict[str, list[int] | None]:
    """The tensors of numbers, with the shapes that follow from this one of the images, whatever the file states."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    found: dict[str, list[int] | None] = {tensor.name: list(tensor.dims) for tensor in copy.graph.initializer}
    copy.graph.ClearField("value_info")
    for value in copy.graph.output:
        value.ClearField("type")
    for value in copy.graph.input:
        if value.name not in found:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shape))
    inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        kind = value.type.tensor_type
        if kind.elem_type not in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
            is_known = kind.HasField("shape") and all(side.HasField("dim_value") for side in kind.shape.dim)
            found[value.name] = [side.dim_value for side in kind.shape.dim] if is_known else None
    return found


def _sizes(node: Any, version: int, is_unknown: bool) -> Iterator[str]:
    """The inputs of a node that may set the size of its output, which is unknown or known."""
    inputs = onnx.defs.get_schema(node.op_type, version, "").inputs
    first = _SIZED_FROM.get(node.op_type, len(node.input))
    for number, name in enumerate(node.input):
        is_whole = number < len(inputs) and inputs[number].types <= _WHOLE
        if number >= first or (is_unknown and is_whole):
            yield name

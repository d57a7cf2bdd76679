"""Checks of an ONNX file from others, before ONNX Runtime makes a session of it."""

from __future__ import annotations

import math
import mmap
import stat
from pathlib import Path
from typing import Any

import onnx

from raydistill.errors import ConfigError

# The most numbers of one tensor for one picture, and of all. ResNets and vision transformers stay below 2**23 in one.
_MOST_NUMBERS, _MOST_NUMBERS_OF_ALL = 2**26, 2**32
_MOST_PRODUCTS = 2**39  # for a picture: the largest vision transformers need 2**38
_LARGE = 1024  # bytes of a tensor that is too large to be a shape
_VALUES = ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")
_ANY_SIDE = 224  # if a graph takes pictures of any size
# Operators whose output can be far larger than their inputs, by the value of an input.
_MAKERS = {
    "ConstantOfShape", "Expand", "Tile", "Range", "Resize", "Upsample", "Pad", "OneHot", "CenterCropPad", "MaxUnpool",
    "Col2Im", "AffineGrid", "HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix", "DFT", "STFT",
}  # fmt: skip
_BOXES = {"Optional", "OptionalGetElement", "SequenceConstruct", "SequenceAt", "ConcatFromSequence"}  # of tensors
_MOST_FIELDS = 1 << 19  # of protobuf in the file; an empty node of two bytes takes 640 in memory
_SEVERAL = 64  # pictures; their tensors may have this many times the numbers of one picture's


def check_graph(file: Path) -> None:
    """Raises ConfigError: the file is damaged, has weights in other files, operators that may not end, or far larger
    tensors or more work than a picture needs. Shapes of tensors have to follow from the images' shape, not values."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ConfigError(f"{file}: not a regular file")
        _check_fields(file)
        model = onnx.load(file, load_external_data=False)
        if model.functions:
            raise ConfigError(f"{file}: has its own functions, which may call each other without end")
        _check_nodes(model.graph, file)
        one, several = _shapes(model, 1), _shapes(model, _SEVERAL)
        for name, shape in one.items():
            _refuse_large(shape, file)
            if math.prod(several.get(name, shape)) > _SEVERAL * math.prod(shape):
                raise ConfigError(f"{file}: one of its tensors grows faster than the number of pictures")
        makers = {name: node for node in model.graph.node for name in node.output}
        weights = {tensor.name for tensor in model.graph.initializer}
        for node in model.graph.node:
            sizes = node.input if node.op_type in ("ConstantOfShape", "Range") else node.input[1:]
            is_plain = node.op_type not in _BOXES and node.domain in ("", "ai.onnx")
            if is_plain and (node.op_type not in _MAKERS or not _follows_values(sizes, makers, weights)):
                continue  # such as a Reshape to a quotient of numbers of pictures, which inference does not follow
            if lacking := [name for name in node.output if name and (name not in one or name not in several)]:
                raise ConfigError(
                    f"{file}: the shape of {lacking[0]!r:.80} ({node.op_type:.40}) is unknown, so it may be of any size"
                )
        if sum(map(math.prod, one.values())) > _MOST_NUMBERS_OF_ALL:
            raise ConfigError(f"{file}: its tensors have far more numbers than a network for pictures")
        if sum(_products(node, one) for node in model.graph.node) > _MOST_PRODUCTS:
            raise ConfigError(f"{file}: needs far more multiplications than a network for pictures")
    except ConfigError:
        raise
    except Exception:  # errors of protobuf and onnx have no common class, and their text names source files
        raise ConfigError(f"{file}: not an ONNX graph, or a damaged one; export the student again") from None


def _check_fields(file: Path) -> None:
    """Raises ConfigError where protobuf would make too many objects of the file, ValueError where it is damaged."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        count, waiting = 0, [(0, len(data), onnx.ModelProto.DESCRIPTOR)]
        while waiting:
            at, end, kind = waiting.pop()
            while at < end:
                if (count := count + 1) > _MOST_FIELDS:
                    raise ConfigError(f"{file}: has far more parts than a network for pictures")
                tag, at = _varint(data, at)
                number, wire = tag >> 3, tag & 7
                if wire == 2:
                    length, at = _varint(data, at)
                    field = kind.fields_by_number.get(number)
                    if field is not None and field.message_type is not None:
                        waiting.append((at, at + length, field.message_type))
                    at += length
                elif wire in (0, 1, 5):
                    at = _varint(data, at)[1] if wire == 0 else at + (8 if wire == 1 else 4)
                else:
                    raise ValueError("no field of ONNX")
            if at > end:
                raise ValueError("it ends too early")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """The number at a place, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number that is too long")


def _check_nodes(graph: Any, file: Path) -> None:
    tensors = list(graph.initializer)
    for node in graph.node:
        if any(a.graphs or a.HasField("g") for a in node.attribute):
            raise ConfigError(f"{file}: has the operator {node.op_type!r:.40}, which may not end or cannot be checked")
        tensors += [tensor for a in node.attribute for tensor in (*a.tensors, *([a.t] if a.HasField("t") else []))]
        if any(a.HasField("sparse_tensor") or a.sparse_tensors for a in node.attribute):
            raise _sparse(file)
    if graph.sparse_initializer:
        raise _sparse(file)
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ConfigError(f"{file}: its weights are in other files, which are not read; export them into one")
        _refuse_large(tensor.dims, file, 2**31)
        for field in _VALUES if tensor.ByteSize() > _LARGE else ():
            tensor.ClearField(field)  # shape inference copies the whole model


def _sparse(file: Path) -> ConfigError:
    return ConfigError(
        f"{file}: has sparse weights, which may be far larger than their file; export them as dense ones"
    )


def _shapes(model: Any, pictures: int) -> dict[str, list[int]]:
    """The shapes of all tensors that follow from this number of pictures, whatever the file states."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {tensor.name: list(tensor.dims) for tensor in copy.graph.initializer}
    copy.graph.ClearField("value_info")
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in copy.graph.input:
        for number, side in enumerate(value.type.tensor_type.shape.dim if value.name not in weights else ()):
            if not side.HasField("dim_value"):
                side.dim_value = _ANY_SIDE if number else pictures
    inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    found = dict(weights)
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(side.HasField("dim_value") for side in kind.shape.dim):
            found[value.name] = [side.dim_value for side in kind.shape.dim]
    return found


def _follows_values(names: Any, makers: dict[str, Any], weights: set[str]) -> bool:
    """Whether these depend on the images' values, and not on constants and shapes only."""
    waiting, seen = list(names), set[str]()
    while waiting:
        name = waiting.pop()
        if not name or name in seen or name in weights:
            continue
        seen.add(name)
        if (node := makers.get(name)) is None:
            return True
        if node.op_type not in ("Shape", "Size"):
            waiting += node.input
    return False


def _products(node: Any, shapes: dict[str, list[int]]) -> int:
    """About the number of a node's multiplications, and at least one for each number of its output."""
    first, *_, second = [*(shapes.get(name, []) for name in node.input), [], []][
        : 4 if "QLinear" in node.op_type else 2
    ]
    given = sum(math.prod(shapes.get(name, [])) for name in node.output)
    own = {a.name: a for a in node.attribute}
    each = 1
    if "MatMul" in node.op_type or node.op_type == "Gemm":
        each = max([1, *first[-2:]] if node.op_type == "Gemm" else [1, *first[-1:]])  # Gemm may transpose its first
    elif "Conv" in node.op_type:
        each = math.prod(second[1:]) if second else 1
    elif "Attention" in node.op_type:
        each = max([1, *second])
    elif node.op_type in ("RNN", "GRU", "LSTM"):
        return math.prod(first[:2]) * sum(math.prod(shapes.get(name, [])) for name in node.input[1:3])
    elif "kernel_shape" in own:
        each = math.prod(own["kernel_shape"].ints)
    elif node.op_type == "Einsum":
        sides = dict[str, int]()
        parts = own["equation"].s.decode().replace(" ", "").partition("->")[0].split(",")
        for part, name in zip(parts, node.input, strict=False):
            sides |= zip(part, shapes.get(name, []), strict=False)
        return math.prod(sides.values())
    return given * each


def _refuse_large(shape: Any, file: Path, most: int = _MOST_NUMBERS) -> None:
    if any(side < 0 for side in shape) or math.prod(shape) > most:
        raise ConfigError(f"{file}: has a tensor of {' x '.join(map(str, shape))} numbers, far more than a picture's")

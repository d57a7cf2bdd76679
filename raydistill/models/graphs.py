"""An ONNX file that anybody may have written, looked at before ONNX Runtime makes a session of it."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from raydistill.errors import ConfigError, reason_of

# Numbers in one tensor of a picture's way through a network. ResNets and vision transformers stay below 2**23.
_MOST_NUMBERS = 2**26
_LARGE = 1024  # bytes of a tensor that says no shape any more
_ENDLESS = {"Loop", "Scan"}


def check_graph(file: Path) -> None:
    """Raises ConfigError: damage, weights in other files, operators that may not end, and tensors far larger than a
    picture's."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ConfigError(f"{file}: no regular file")
        model = onnx.load(file, load_external_data=False)
        for graph in _graphs(model):
            _check_tensors(graph, file)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        for value in (v for graph in _graphs(inferred) for v in (*graph.value_info, *graph.input, *graph.output)):
            _refuse_large([d.dim_value for d in value.type.tensor_type.shape.dim if d.HasField("dim_value")], file)
    except ConfigError:
        raise
    except Exception as error:  # protobuf's and onnx's own, of no common class
        raise ConfigError(f"{file}: not a graph of ONNX, or a damaged one ({reason_of(error)})") from None


def _graphs(model: Any) -> Iterator[Any]:
    """The model's, those within its nodes and its functions', none of which is a graph by itself."""
    waiting = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        if hasattr(graph, "initializer"):
            yield graph
        for node in graph.node:
            if node.op_type in _ENDLESS:
                raise ValueError(f"it has the operator {node.op_type}, which need not end")
            waiting += [inner for a in node.attribute for inner in (*a.graphs, *([a.g] if a.HasField("g") else []))]


def _check_tensors(graph: Any, file: Path) -> None:
    constants = [a.t for node in graph.node for a in node.attribute if a.HasField("t")]
    for tensor in (*graph.initializer, *constants):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ConfigError(f"{file}: its weights are in other files, which are not read; export them into one")
        _refuse_large(tensor.dims, file, 2**31)
        if len(tensor.raw_data) > _LARGE:
            tensor.ClearField("raw_data")  # inference of shapes copies the whole model
    for sparse in graph.sparse_initializer:
        _refuse_large(sparse.dims, file)


def _refuse_large(shape: Any, file: Path, most: int = _MOST_NUMBERS) -> None:
    if any(side < 0 for side in shape) or math.prod(shape) > most:
        raise ConfigError(f"{file}: a tensor of {' x '.join(map(str, shape))} numbers in it, far more than a picture's")

"""ONNX files of strangers: what would take memory or time without bound is refused before a session is made."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from raydistill.errors import ConfigError
from raydistill.models.formats import onnx_run
from raydistill.models.graphs import check_graph

node = helper.make_node


def numbers(name: str, *values: int) -> Any:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def written(tmp_path: Path, nodes: list[Any], weights: Any = (), change: Callable[[Any], Any] = lambda _: None) -> Path:
    """A graph from `images` (any number, 3, 8, 8) to `logits`."""
    ends = [
        helper.make_tensor_value_info(*end)
        for end in (("images", 1, ["n", 3, 8, 8]), ("logits", 1, ["n", "of", "any", "kind"]))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    change(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "model.onnx"


def add_sparse(model: Any) -> None:
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    place = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, place, [8192, 8192]))


def add_function(model: Any) -> None:
    model.functions.append(helper.make_function("mine", "f", ["x"], ["y"], [node("Relu", ["x"], ["y"])], []))


THROUGH = [node("Relu", ["images"], ["logits"])]
DATA = [
    node("Exp", ["images"], ["e"]), node("ReduceSum", ["e"], ["r"], keepdims=0), node("Reshape", ["r", "one"], ["f"]),
    node("Cast", ["f"], ["i"], to=TensorProto.INT64), node("ConstantOfShape", ["i"], ["c"]),
    node("ReduceSum", ["c"], ["d"]), node("Add", ["images", "d"], ["logits"]),
]  # fmt: skip
PRODUCTS = [
    node("ConstantOfShape", ["side"], ["m0"]), *(node("MatMul", [f"m{k}", "m0"], [f"m{k + 1}"]) for k in range(30)),
    node("ReduceMax", ["m30"], ["d"]), node("Add", ["images", "d"], ["logits"]),
]  # fmt: skip
SQUARES = [
    node("Shape", ["images"], ["s"], end=1), node("Mul", ["s", "s"], ["t"]), node("ConstantOfShape", ["t"], ["c"]),
    node("ReduceMax", ["c"], ["d"]), node("Add", ["images", "d"], ["logits"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "weights", "change", "said"),
    [
        (THROUGH, (), add_sparse, "sparse weights"),
        (THROUGH, (), add_function, "its own functions"),
        (DATA, [numbers("one", 1)], lambda _: None, r"the shape of 'c' \(ConstantOfShape\) is unknown"),
        (PRODUCTS, [numbers("side", 4096, 4096)], lambda _: None, "far more multiplications"),
        (SQUARES, (), lambda _: None, "faster than the number of pictures"),
        (
            [node("Einsum", ["images"], ["logits"], equation=b"\xff->")], (), lambda _: None,
            "not an ONNX graph, or a damaged one",
        ),
        ([node("Tile", ["images", "to"], ["logits"])], [numbers("to", 1, 3, 999, 999)], lambda _: None, "far more"),
    ],
)  # fmt: skip
def test_what_would_take_memory_or_time_without_bound_is_refused_at_once(tmp_path, nodes, weights, change, said):
    file = written(tmp_path, nodes, weights, change)
    began = time.process_time()
    with pytest.raises(ConfigError, match=said):
        check_graph(file)
    assert time.process_time() - began < 3


def test_shapes_that_follow_from_the_images_are_taken(tmp_path):
    """As exports of networks with a class token write them."""
    nodes = [
        node("Shape", ["images"], ["n"], end=1), node("Concat", ["n", "rest"], ["to"], axis=0),
        node("Expand", ["token", "to"], ["all"]), node("Add", ["images", "all"], ["logits"]),
    ]  # fmt: skip
    token = numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "token")
    run = onnx_run(written(tmp_path, nodes, [numbers("rest", 3, 8, 8), token]))
    assert (run(np.zeros((2, 3, 8, 8), np.float32)) == 1).all()


@pytest.mark.parametrize("data", [b"junk", None])
def test_a_graph_that_cannot_be_run_is_said_to_be_so_without_the_library_s_words(tmp_path, data):
    file = written(tmp_path, [node("Optional", ["images"], ["o"]), node("OptionalGetElement", ["o"], ["logits"])])
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(ConfigError) as refused:
        onnx_run(file)
    assert str(file) in str(refused.value)
    assert not any(word in str(refused.value) for word in ("ONNXRuntimeError", "FAIL", "Error parsing", "::"))


def test_images_that_a_graph_does_not_take_are_refused_without_the_library_s_words(tmp_path):
    file = written(tmp_path, THROUGH)
    onnx.checker.check_model(onnx.load(file))
    with pytest.raises(ConfigError, match=r"does not take images of 1x9 float32, which its folder names") as refused:
        onnx_run(file)(np.zeros((1, 9), np.float32))
    assert "ONNXRuntimeError" not in str(refused.value)


@pytest.mark.parametrize("part", [b"\x0a\x00", b"\x2a\x00", b"\x6a\x00"])  # empty nodes, weights and shapes
def test_a_small_file_of_very_many_empty_parts_is_refused_before_any_is_made(tmp_path, part):
    graph = part * 600_000
    (tmp_path / "model.onnx").write_bytes(b"\x3a" + bytes([0x80, 0x9F, 0x49]) + graph)  # 1,200,000 as a varint
    with pytest.raises(ConfigError, match="far more parts"):
        check_graph(tmp_path / "model.onnx")

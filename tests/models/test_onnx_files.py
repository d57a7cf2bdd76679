"""ONNX files of strangers: what would take memory or time without bound is refused before this process opens it."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from raydistill.errors import ConfigError
from raydistill.models.formats import try_onnx
from raydistill.models.onnx_files import check_onnx, onnx_run

node = helper.make_node
BLANK = np.zeros((1, 3, 8, 8), np.float32)


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
TEXT = helper.make_tensor("text", TensorProto.STRING, [1], [b"x"])
LISTS = [node("SequenceConstruct", ["images"], ["q"]), node("ConcatFromSequence", ["q"], ["logits"], axis=0)]
SORTED = [node("RandomNormal", [], ["x"], shape=[2**20]), node("Unique", ["x"], ["u"])]
ROWS = [node("Flatten", ["images"], ["f"]), node("Cast", ["f"], ["i"], to=TensorProto.INT64)]
TILED = [*ROWS, node("Squeeze", ["i"], ["t"]), node("Tile", ["f", "t"], ["logits"])]
OTHERS = [node("Gelu", ["images"], ["logits"], domain="com.microsoft")]


@pytest.mark.parametrize(
    ("nodes", "weights", "change", "said"),
    [
        (THROUGH, (), add_sparse, "sparse weights"),
        (THROUGH, (), add_function, "its own functions"),
        (DATA, [numbers("one", 1)], lambda _: None, r"the size of 'c' \(ConstantOfShape\) follows from the pictures"),
        ([node("NonZero", ["images"], ["logits"])], (), lambda _: None, r"\(NonZero\) follows from the pictures"),
        (SORTED, (), lambda _: None, r"\(Unique\) follows from the pictures"),
        (TILED, (), lambda _: None, r"\(Tile\) follows from the pictures"),
        ([*ROWS, node("TopK", ["f", "i"], ["logits", ""])], (), lambda _: None, r"\(TopK\) follows from the pictures"),
        (SQUARES, (), lambda _: None, "faster than the number of pictures"),
        (THROUGH, [TEXT], lambda _: None, "'text' is text"),
        ([node("Cast", ["images"], ["logits"], to=TensorProto.STRING)], (), lambda _: None, "not a tensor of numbers"),
        (LISTS, (), lambda _: None, r"'q' \(SequenceConstruct\) is not a tensor of numbers"),
        (OTHERS, (), lambda _: None, "the operator 'Gelu', which may not end or cannot be checked"),
        (
            [node("Einsum", ["images"], ["logits"], equation=b"\xff->")], (), lambda _: None,
            r"'logits' \(Einsum\) is not a tensor of numbers, or ONNX lacks the operator in this form",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_by_one_blank_picture_is_refused(tmp_path, nodes, weights, change, said):
    with pytest.raises(ConfigError, match=said):
        check_onnx(written(tmp_path, nodes, weights, change), BLANK.shape)


LIVE = [node("ConstantOfShape", ["side"], [f"k{number}"]) for number in range(9)]
ALIVE = [
    *LIVE,
    node("Sum", [f"k{number}" for number in range(9)], ["e"]),
    node("ReduceMax", ["e"], ["d"], keepdims=0),
    node("Add", ["images", "d"], ["logits"]),
]


@pytest.fixture
def in_one_second(monkeypatch):
    monkeypatch.setattr("raydistill.models.onnx_files._MOST_SECONDS", 1)


@pytest.mark.usefixtures("in_one_second")
@pytest.mark.parametrize(
    ("nodes", "weights", "said"),
    [
        (PRODUCTS, [numbers("side", 4096, 4096)], "1 s of one core for one blank picture"),
        ([node("Tile", ["images", "to"], ["logits"])], [numbers("to", 1, 3, 999, 999)], "needs too much memory"),
        (ALIVE, [numbers("side", 1, 3, 4096, 4096)], r"too much memory|more than 768 MiB of memory"),
    ],
)
def test_what_takes_far_more_than_a_blank_picture_needs_is_refused(tmp_path, nodes, weights, said):
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(ConfigError, match=said):
        try_onnx(written(tmp_path, nodes, weights), BLANK)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began.ru_utime < 4


def test_the_memory_of_an_answer_is_known(tmp_path):
    """By which so many pictures go through the network together as memory allows."""
    file = written(tmp_path, [node("Tile", ["images", "to"], ["logits"])], [numbers("to", 1, 3, 256, 256)])
    size = 4 * 9 * (8 * 256) ** 2
    assert try_onnx(file, BLANK) == pytest.approx(size, rel=0.1)


def test_shapes_that_follow_from_the_images_are_taken(tmp_path):
    """As exports of networks with a class token write them."""
    nodes = [
        node("Shape", ["images"], ["n"], end=1), node("Concat", ["n", "rest"], ["to"], axis=0),
        node("Expand", ["token", "to"], ["all"]), node("Add", ["images", "all"], ["logits"]),
    ]  # fmt: skip
    token = numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "token")
    file = written(tmp_path, nodes, [numbers("rest", 3, 8, 8), token])
    try_onnx(file, BLANK)
    run = onnx_run(file)
    assert (run(np.zeros((2, 3, 8, 8), np.float32)) == 1).all()


@pytest.mark.parametrize("data", [b"junk", None])
def test_a_graph_that_cannot_be_run_is_said_to_be_so_without_the_library_s_words(tmp_path, data):
    file = written(tmp_path, [node("Reshape", ["images", "shape"], ["logits"])], [numbers("shape", 1, 7)])
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(ConfigError) as refused:
        try_onnx(file, BLANK)
    assert str(file) in str(refused.value)
    assert not any(word in str(refused.value) for word in ("ONNXRuntimeError", "FAIL", "Error parsing", "::"))


def test_images_that_a_graph_does_not_take_are_refused_without_the_library_s_words(tmp_path):
    file = written(tmp_path, THROUGH)
    onnx.checker.check_model(onnx.load(file))
    with pytest.raises(ConfigError, match=r"does not take images of 1x9 float32, which its folder names") as refused:
        onnx_run(file)(np.zeros((1, 9), np.float32))
    assert "ONNXRuntimeError" not in str(refused.value)


@pytest.mark.usefixtures("in_one_second")
@pytest.mark.parametrize("part", [b"\x0a\x00", b"\x2a\x00", b"\x6a\x00"])  # empty nodes, weights and shapes
def test_a_small_file_of_very_many_empty_parts_ends_no_more_than_its_own_process(tmp_path, part):
    graph = part * 4_000_000
    length = bytes([0x80, 0xA4, 0xE8, 0x03])  # 8,000,000 as a varint
    (tmp_path / "model.onnx").write_bytes(b"\x3a" + length + graph)
    with pytest.raises(ConfigError, match=r"more than [0-9]+ MiB of memory or 1 s|too much memory"):
        try_onnx(tmp_path / "model.onnx", BLANK)

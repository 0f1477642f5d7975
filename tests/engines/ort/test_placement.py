"""What of a graph is arithmetic on shapes, and how a session's report is sorted."""

from __future__ import annotations

from collections import Counter

import onnx.parser
import pytest

from engines.sessions.placement import inlined, placement_of, shape_nodes
from graphs.errors import BadArtefact
from graphs.rules.rule import nodes_of

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# How many nodes of each operator onnxruntime-gpu 1.31.1 left to the CPU, told by itself over CUDA libraries that do
# nothing; all other nodes of these graphs it gave to CUDA.
TOLD = {
    "small": {"Add": 1, "Concat": 6, "Div": 1, "Gather": 4, "Min": 1, "Neg": 1, "Squeeze": 4, "Sub": 6},
    "large": {"Neg": 1},
}
MADE_ITSELF = ["Gather", "Gather_token_1", "Gather_token_3", "Gather_token_5"]


@pytest.mark.parametrize("role", ["small", "large"])
def test_what_onnx_runtime_left_to_the_cpu_is_arithmetic_on_shapes(exports, role):
    model = inlined(exports[role] / "decoder.onnx")
    shapes = shape_nodes(model)
    candidates = {op: [n.name for n in nodes_of(model.graph) if n.op_type == op] for op in TOLD[role]}
    candidates["Gather"] = MADE_ITSELF
    left = [(CPU, op, n) for op, names in candidates.items() for n in names if n in shapes or n in MADE_ITSELF]
    found = placement_of([*left, (CUDA, "MatMul", "MatMul#4")], shapes)
    assert found.work == ()
    counts = Counter(op for op, _ in found.shapes)
    assert all(counts[op] >= told for op, told in TOLD[role].items()), counts
    assert found.providers == {CPU: len(left), CUDA: 1}


@pytest.mark.parametrize("role", ["small", "large"])
def test_real_work_of_the_decoder_is_no_arithmetic(exports, role):
    model = inlined(exports[role] / "decoder.onnx")
    shapes = shape_nodes(model)
    work = {n.name for n in nodes_of(model.graph) if n.op_type in ("MatMul", "Attention", "TopK", "Softmax", "Range")}
    assert work
    assert not work & shapes


def flat(text: str) -> set[str]:
    model = onnx.parser.parse_model('<ir_version: 11, opset_import: ["" : 23]>\n' + text)
    for node in nodes_of(model.graph):
        node.name = node.output[0]
    return shape_nodes(model)


def test_an_element_of_a_tensor_makes_it_work():
    assert flat(
        """g (int64[S] position, float[S, 8] x) => (int64[1] a, int64[1] b, float[T, 8] c) {
          zero = Constant <value_ints: ints = [0]> ()
          shape = Shape (x)
          rows = Gather (shape, zero)
          a = Add (rows, rows)
          first = Gather (position, zero)
          b = Add (rows, first)
          c = Expand (x, shape)
        }"""
    ) == {"shape", "rows", "a"}


def test_a_table_is_no_constant_of_arithmetic():
    table = ", ".join(["1.0"] * 100)
    assert flat(
        f"""g (float[S, 8] x) => (float[T] a, float[2] b)
        <float[100] table = {{{table}}}, float[2] pair = {{1.0, 2.0}}> {{
          shape = Shape (x)
          a = Slice (table, shape, shape)
          b = Gather (pair, shape)
        }}"""
    ) == {"shape", "b"}


def test_what_grows_with_a_shape_is_no_arithmetic_and_nothing_behind_it():
    assert flat(
        """g (float[S, 8] x) => (int64[T] twice, float[a, b] zeros) {
          start = Constant <value_int: int = 0> ()
          step = Constant <value_int: int = 1> ()
          shape = Shape (x)
          size = Size (x)
          rows = Range (start, size, step)
          twice = Add (rows, rows)
          zeros = ConstantOfShape (shape)
        }"""
    ) == {"shape", "size"}


def test_a_loop_sees_the_shapes_around_it():
    assert flat(
        """g (float[S, 8] x, int64 trips, bool go) => (int64[1] last) {
          shape = Shape <end: int = 1> (x)
          last = Loop (trips, go, shape) <body = inner (int64 i, bool c, int64[1] before) => (bool d, int64[1] after) {
            d = Identity (c)
            half = Add (shape, shape)
            after = Add (half, before)
          }>
        }"""
    ) == {"shape", "half"}


@pytest.mark.parametrize(
    ("op", "name", "is_work"),
    [("Gather", "Gather", False), ("Gather", "Gather_token_12", False), ("Transpose", "Transpose_token_3", True),
     ("Gather", "Gather#3", True), ("MatMul", "MatMul", True)],
)  # fmt: skip
def test_what_onnx_runtime_made_itself(op, name, is_work):
    found = placement_of([(CPU, op, name)], set())
    assert bool(found.work) == is_work


def test_work_in_words():
    found = placement_of([(CPU, "Gather", "a#1"), (CPU, "MatMul", "b#2"), (CPU, "MatMul", "c#3")], set())
    assert found.work_in_words() == "MatMul ×2, Gather (first a#1)"
    assert placement_of([], set()).work_in_words() == "none"


def test_a_file_that_is_no_graph(tmp_path):
    (tmp_path / "decoder.onnx").write_bytes(b"\x07not a graph")
    with pytest.raises(BadArtefact, match="cannot be read as a graph"):
        inlined(tmp_path / "decoder.onnx")

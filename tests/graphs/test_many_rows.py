"""A long chunk's attention in pieces is the formula's, in numpy, and that of the operator that it stands in for.

Legend: S rows, H query heads, V key-value heads, D head width, C rows of the buffer, T filled rows.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from graphs.lowering.many_rows import ManyRows
from graphs.lowering.one_row import LONG, OneRow

D = 16
FORMS = ("GroupQueryAttention", "Scan")
CASES = {  # query heads, key-value heads, rows, past, rows of the buffer
    "a prompt": (14, 2, 200, 0, 300),
    "rows that fill their pieces, in a buffer that ends with them": (14, 2, 192, 0, 192),
    "the last piece ends behind the buffer": (6, 3, 195, 4, 199),
    "a past": (8, 1, 230, 100, 340),
    "as long a past as pieces take": (4, 2, 192, 384, 600),
    "a longer one": (4, 2, 192, 385, 600),
    "heads of their own": (3, 3, 70, 5, 80),
    "one row": (4, 2, 1, 90, 100),
}


def session(heads: int, keys: int, *, pieces: bool, softcap: float = 0.0) -> tuple[ort.InferenceSession, ir.Model]:
    def value(name: str, shape: list[int | str], kind: int = onnx.TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    node = onnx.helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "past_k", "past_v", "last", "filled"],
        ["out", "present_k", "present_v"],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=keys,
        softcap=softcap,
    )
    flat = [value("q", [1, "S", heads * D]), value("k", [1, "S", keys * D]), value("v", [1, "S", keys * D])]
    buffers = [value(f"past_{side}", [1, keys, "C", D]) for side in "kv"]
    told = [value("last", [1, 1], onnx.TensorProto.INT32), value("filled", [], onnx.TensorProto.INT32)]
    outputs = [value("out", [1, "S", heads * D]), *(value(f"present_{side}", [1, keys, "C", D]) for side in "kv")]
    graph = onnx.helper.make_graph([node], "attention", [*flat, *buffers, *told], outputs)
    opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11))
    if pieces:
        ManyRows()(model)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"]), model


def fed(heads: int, keys: int, rows: int, past: int, capacity: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows + past)
    feeds = {"q": rng.standard_normal((1, rows, heads * D), np.float32)}
    feeds |= {side: rng.standard_normal((1, rows, keys * D), np.float32) for side in "kv"}
    feeds |= {f"past_{side}": rng.standard_normal((1, keys, capacity, D), np.float32) for side in "kv"}
    return feeds | {"last": np.array([[past + rows - 1]], np.int32), "filled": np.array(past + rows, np.int32)}


@pytest.mark.parametrize("most", [0, 1 << 22])
@pytest.mark.parametrize("case", CASES)
def test_every_form_is_the_formula_and_the_operator(case: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """most: scores of a whole map; with none, what is left is pieces, or tiles."""
    monkeypatch.setattr("graphs.lowering.many_rows.MAP", most)
    heads, keys, rows, past, capacity = CASES[case]
    feeds = fed(heads, keys, rows, past, capacity)
    got = session(heads, keys, pieces=True)[0].run(None, feeds)
    theirs = session(heads, keys, pieces=False)[0].run(None, feeds)
    q_HSD = feeds["q"][0].reshape(rows, heads, D).transpose(1, 0, 2).astype(np.float64)
    held = []
    for side, present in zip("kv", got[1:], strict=True):
        whole = feeds[f"past_{side}"].copy()
        whole[0, :, past : past + rows] = feeds[side][0].reshape(rows, keys, D).transpose(1, 0, 2)
        np.testing.assert_array_equal(present[:, :, : past + rows], whole[:, :, : past + rows])
        held.append(np.repeat(whole[0, :, : past + rows], heads // keys, axis=0).astype(np.float64))
    logit_HST = q_HSD @ held[0].transpose(0, 2, 1) / D**0.5
    logit_HST[:, np.arange(past + rows) > past + np.arange(rows)[:, None]] = -np.inf
    share_HST = np.exp(logit_HST - logit_HST.max(-1, keepdims=True))
    wanted = (share_HST / share_HST.sum(-1, keepdims=True) @ held[1]).transpose(1, 0, 2).reshape(1, rows, -1)
    np.testing.assert_allclose(got[0], wanted, atol=2e-6)
    np.testing.assert_allclose(got[0], theirs[0], atol=2e-6)


def forms(heads: int, keys: int, **more: float) -> list[str]:
    """What each branch of the choice attends with, the deepest last."""
    _, model = session(heads, keys, pieces=True, **more)
    found, graph = [], model.graph
    while choice := next((node for node in graph if node.op_type == "If"), None):
        found.append(next(n.op_type for n in choice.attributes["then_branch"].as_graph() if n.op_type in FORMS))
        graph = choice.attributes["else_branch"].as_graph()
    return [*found, *(node.op_type for node in graph if node.op_type in FORMS)]


def test_each_choice_has_its_forms() -> None:
    assert forms(4, 2) == ["GroupQueryAttention", "Scan", "GroupQueryAttention"]
    assert forms(4, 4) == ["GroupQueryAttention", "GroupQueryAttention"], "pieces gain nothing"
    assert forms(4, 2, softcap=30.0) == ["GroupQueryAttention"]


@pytest.mark.parametrize(
    ("rows", "past", "whole"),
    [(1, 4000, True), (1024, 0, True), (1025, 0, False), (64, 16320, True), (64, 16321, False)],
)
def test_a_map_is_whole_up_to_its_size(rows: int, past: int, whole: bool) -> None:
    """The graph's own condition, asked for as an output."""
    _, model = session(4, 2, pieces=True)
    choice = next(node for node in model.graph if node.op_type == "If")
    model.graph.outputs.append(choice.inputs[0])
    ran = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    assert ran.run(None, fed(4, 2, rows, past, rows + past))[-1] == whole


@pytest.mark.parametrize(("past", "in_pieces"), [(0, True), (384, True), (385, False)])
def test_pieces_are_for_a_past_of_few_chunks(past: int, in_pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of the pieces are made wrong here, which shows where they are taken."""
    monkeypatch.setattr("graphs.lowering.many_rows.MAP", 0)
    _, model = session(4, 2, pieces=True)
    for node in model.graph.all_nodes():
        if node.op_type == "FusedMatMul":
            node.attributes["alpha"] = ir.AttrFloat32("alpha", 0.0)
    feeds = fed(4, 2, 192, past, 600)
    ran = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = session(4, 2, pieces=False)[0].run(None, feeds)[0]
    assert np.allclose(ran.run(None, feeds)[0], wanted, atol=2e-6) is not in_pieces


@pytest.mark.parametrize(
    ("heads", "keys", "softcap", "gains"),
    [(36, 6, 0.0, True), (35, 7, 0.0, False), (30, 5, 0.0, False), (36, 6, 30.0, False)],
)
def test_one_row_has_a_form_where_many_heads_share_wide_keys_and_no_cap_bends_their_logits(
    heads: int, keys: int, softcap: float, gains: bool
) -> None:
    _, model = session(heads, keys, pieces=False, softcap=softcap)
    assert OneRow()(model).modified is gains
    assert any(node.op_type == "If" for node in model.graph) is gains


@pytest.mark.parametrize(("rows", "capacity", "taken"), [(1, LONG, True), (1, LONG - 1, False), (2, LONG, False)])
def test_the_form_for_one_row_is_taken_over_a_long_buffer(rows: int, capacity: int, taken: bool) -> None:
    """The graph's own condition, asked for as an output."""
    _, model = session(36, 6, pieces=False)
    OneRow()(model)
    model.graph.outputs.append(next(node for node in model.graph if node.op_type == "If").inputs[0])
    ran = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    assert ran.run(None, fed(36, 6, rows, 5, capacity))[-1] == taken

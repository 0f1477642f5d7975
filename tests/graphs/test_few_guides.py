"""What rows of a buffer receive, whoever makes it on ONNX Runtime's CPU, held to the plain formula in numpy.

Legend: H query heads, V key-value heads, S rows, C rows of the buffer, T filled rows, D head width, G guide rows.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from graphs.lowering.in_place import grouped
from graphs.ops import DOMAIN, OPS
from graphs.ops.attention_received import PIECE

H, V, D = 4, 2, 8
SCALE = 0.7


@cache
def lowered(rated: bool, heads: int = H, asks: str = "q", scale: float = SCALE) -> bytes:
    """One canonical attention over a buffer, whose keys' received attention is asked for.

    asks, scale: the rows that they receive it from, and its scale, where these are not the attention's.
    """
    f, values = TensorProto.FLOAT, helper.make_tensor_value_info
    inputs = [values(name, f, [1, n, "S", D]) for name, n in (("q", heads), ("k", V), ("v", V))]
    inputs += [values(asks, f, [1, heads, "S", D])] if asks != "q" else []
    inputs += [values(f"past_{side}_0", f, [1, V, "P_0", D]) for side in "kv"]
    inputs.append(values("weight", f, [1, "G"]) if rated else values("guide", TensorProto.INT32, ["G"]))
    outputs = [values("out", f, [1, heads, "S", D]), *(values(f"present_{side}_0", f, [1, V, "T", D]) for side in "kv")]
    outputs.append(values("attention_received", f, [1, "T"]))
    name = "RatedAttentionReceived" if rated else "AttentionReceived"
    told = [value.name for value in outputs[:3]]
    nodes = [
        helper.make_node("Attention", ["q", "k", "v", "", "past_k_0", "past_v_0"], told, is_causal=1, scale=SCALE),
        helper.make_node(
            name, [asks, "present_k_0", inputs[-1].name], ["attention_received"], domain=DOMAIN, scale=scale
        ),
    ]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph(nodes, "one", inputs, outputs)
    proto = helper.make_model(graph, opset_imports=opsets, functions=[OPS[name].function], ir_version=11)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    assert grouped(model)
    return bytes(ir.to_proto(model).SerializeToString())


def shares(q_HSD: np.ndarray, k_VTD: np.ndarray, scale: float = SCALE) -> np.ndarray:
    """[H,S,T] of the last S rows."""
    k_HTD = np.repeat(k_VTD, len(q_HSD) // V, axis=0).astype(np.float64)
    logit_HST = scale * q_HSD @ k_HTD.transpose(0, 2, 1)
    rows, keys = logit_HST.shape[1:]
    logit_HST[:, np.arange(keys) > np.arange(rows)[:, None] + keys - rows] = -np.inf
    share_HST = np.exp(logit_HST - logit_HST.max(-1, keepdims=True))
    summed: np.ndarray = share_HST / share_HST.sum(-1, keepdims=True)
    return summed


@pytest.mark.parametrize(
    ("rows", "past", "guides"),
    [(90, 0, 12), (90, 37, 1), (90, 5, PIECE), (90, 5, PIECE + 1), (90, 0, 90), (3, 50, 2), (1, 50, 1)],
)
@pytest.mark.parametrize(("rated", "heads"), [(False, H), (True, H), (False, V)])
def test_received_is_what_the_formula_gives(rows: int, past: int, guides: int, rated: bool, heads: int) -> None:
    """By one row, by few guide rows and by many; with heads that share keys and with heads that do not."""
    rng, filled = np.random.default_rng(rows), past + rows
    q, k, v = (rng.standard_normal((1, n, rows, D), np.float32) for n in (heads, V, V))
    buffers = {f"past_{side}_0": np.full((1, V, filled + 3, D), 7.0, np.float32) for side in "kv"}
    for buffer in buffers.values():
        buffer[:, :, :past] = rng.standard_normal((1, V, past, D), np.float32)
    weight_G = rng.random(guides).astype(np.float32) if rated else np.ones(guides, np.float32)
    told = {"weight": weight_G[None]} if rated else {"guide": np.zeros(guides, np.int32)}
    k_VTD = np.concatenate([buffers["past_k_0"][0, :, :past], k[0]], axis=1)
    wanted_T = (shares(q[0], k_VTD)[:, -guides:] * weight_G[:, None]).sum((0, 1))

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    session = ort.InferenceSession(lowered(rated, heads), settings, providers=["CPUExecutionProvider"])
    feeds = {"q": q, "k": k, "v": v, "length_0": np.array([past]), **told, **buffers}
    feeds["received_before"] = np.zeros((1, filled + 3), np.float32)
    binding = session.io_binding()
    held = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for side in "kv":
        binding.bind_ortvalue_output(f"present_{side}_0", held[f"past_{side}_0"])
    binding.bind_output("attention_received", "cpu")
    session.run_with_iobinding(binding)
    received = binding.get_outputs()[-1].numpy()
    np.testing.assert_allclose(received[0, :filled], wanted_T, atol=1e-5 * guides)
    assert not received[0, filled:].any()


@pytest.mark.parametrize(("asks", "scale"), [("others", SCALE), ("q", 2 * SCALE)])
def test_one_row_that_asks_otherwise_than_its_attention_does_is_not_given_the_attentions_shares(
    asks: str, scale: float
) -> None:
    rng, filled = np.random.default_rng(3), 30
    feeds = {name: rng.standard_normal((1, n, 1, D), np.float32) for name, n in (("q", H), ("k", V), ("v", V))}
    feeds |= {asks: rng.standard_normal((1, H, 1, D), np.float32)}
    feeds |= {f"past_{side}_0": rng.standard_normal((1, V, filled, D), np.float32) for side in "kv"}
    feeds |= {"guide": np.zeros(1, np.int32), "length_0": np.array([filled - 1])}
    feeds["received_before"] = np.zeros((1, filled), np.float32)
    k_VTD = np.concatenate([feeds["past_k_0"][0, :, : filled - 1], feeds["k"][0]], axis=1)
    session = ort.InferenceSession(lowered(False, asks=asks, scale=scale), providers=["CPUExecutionProvider"])
    [received] = session.run(["attention_received"], feeds)
    np.testing.assert_allclose(received[0], shares(feeds[asks][0], k_VTD, scale).sum((0, 1)), atol=1e-5)


def test_both_forms_stand_in_one_graph() -> None:
    model = ir.from_proto(onnx.load_model_from_string(lowered(False)))
    kinds = [node.op_type for node in model.graph.all_nodes()]
    assert kinds.count("ReceivedInCache") == 1
    choices = [node for node in model.graph.all_nodes() if node.op_type == "If"]
    few, many = (choices[-1].attributes[f"{name}_branch"].as_graph() for name in ("then", "else"))
    assert [node.op_type for node in many] == ["ReceivedInCache"]
    assert "FusedMatMul" in [node.op_type for node in few]
    assert len([node for node in few if node.op_type != "Constant"]) == 7

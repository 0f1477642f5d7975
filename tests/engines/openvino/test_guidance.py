"""Guidance that is made at an answer's end, held to the formula in numpy; a graph that it cannot be made for is left.

Legend: L layers, H query heads, V key-value heads, G guide rows, T keys, D head width.
"""

from __future__ import annotations

import numpy as np
import onnx
import openvino as ov

from engines.sessions.openvino_guidance import Asked, Guide, Guiding, ask_instead
from graphs.ops import DOMAIN

L, H, V, D = 2, 4, 2, 8
SCALE = 0.3


def received(queries: np.ndarray, last: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Σ over layers, heads and rows of softmax(SCALE · q · kᵀ) up to each row's own key, [T]."""
    total = np.zeros(keys.shape[2])
    for layer in range(L):
        for head in range(H):
            key_TD = keys[0, layer * V + head // (H // V)].astype(np.float64)
            for row, end in enumerate(last):
                logit = SCALE * key_TD[: end + 1] @ queries[0, layer * H + head, row].astype(np.float64)
                share = np.exp(logit - logit.max())
                total[: end + 1] += share / share.sum()
    return total


def test_rows_of_several_runs_are_summed_in_pieces() -> None:
    rng = np.random.default_rng(0)
    core = ov.Core()
    guide = Guide(core, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}, Guiding(("a", "b"), H, V, D, SCALE))
    runs = [(90, 75), (1, 1), (4, 2), (1, 1)]  # rows of a run, and those of them that guide
    later, filled = None, 0
    keys: tuple[np.ndarray, ...] = ()
    for rows, guides in runs:
        filled += rows
        keys = (*keys, rng.standard_normal((1, L * V, rows, D), np.float32))
        queries = 3 * rng.standard_normal((1, L * H, guides, D), np.float32)
        asked = Asked((queries,), (np.arange(filled - guides, filled),), keys)
        later = later.and_then(asked) if later else asked
    assert later
    got = guide.received(later)
    wanted = received(np.concatenate(later.queries, 2), np.concatenate(later.last), np.concatenate(keys, 2))
    assert got.shape == (1, filled)
    np.testing.assert_allclose(got[0], wanted, rtol=1e-5, atol=1e-6)


def decoder(second_scale: float = SCALE, last: str = "Add") -> onnx.GraphProto:
    """Two layers that guide; no more of them than is asked about."""
    f, tensor = onnx.TensorProto.FLOAT, onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node
    nodes, inputs = [], [tensor("guide", onnx.TensorProto.INT32, ["G"])]
    values = [tensor(f"q_{i}", f, [1, H, "S", D]) for i in range(L)]
    for i, scale in enumerate((SCALE, second_scale)):
        inputs += [tensor(f"past_{side}_{i}", f, [1, V, "P_0", D]) for side in "kv"]
        nodes.append(
            node(
                "Attention", [f"q_{i}", f"k_{i}", f"v_{i}", "", f"past_k_{i}", f"past_v_{i}"], [f"o_{i}", f"n_{i}", ""]
            )
        )
        nodes.append(node("AttentionReceived", [f"q_{i}", f"n_{i}", "guide"], [f"r_{i}"], domain=DOMAIN, scale=scale))
    nodes.append(node(last, ["r_0", "r_1"], ["attention_received"]))
    outputs = [tensor("attention_received", f, [1, "P_0 + S"])]
    return onnx.helper.make_graph(nodes, "decoder", inputs, outputs, value_info=values)


def test_only_a_plain_sum_over_layers_of_one_kind_is_made_later() -> None:
    graph = decoder()
    assert ask_instead(graph) == Guiding(("past_k_0", "past_k_1"), H, V, D, float(np.float32(SCALE)))
    assert [value.name for value in graph.output] == ["asked", "told"]
    assert not [node for node in graph.node if node.op_type == "AttentionReceived"]
    for other in (decoder(second_scale=0.5), decoder(last="Max")):
        before = other.SerializeToString()
        assert ask_instead(other) is None
        assert other.SerializeToString() == before

"""What stands in OpenVINO's model for the nodes that ``openvino_graph`` puts between a file and the frontend.

Legend: Hkv key-value heads, H query heads, P past rows, S new rows, d head width; B blocks of K places.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import openvino as ov
from openvino import op
from openvino import opset13 as ops


class Conversions:
    """What the frontend calls for our nodes; ``sinks`` gathers the ends of the states, which a model must be given."""

    def __init__(self) -> None:
        self.sinks: list[Any] = []
        self._variables: dict[str, Any] = {}

    def past(self, node: Any) -> list[Any]:
        """The state as it was before the run: [1, Hkv, P, d]."""
        state, heads, width = (node.get_attribute(name) for name in ("state", "heads", "width"))
        dtype = onnx.helper.tensor_dtype_to_np_dtype(node.get_attribute("dtype"))
        info = op.util.VariableInfo()
        info.variable_id, info.data_type, info.data_shape = (
            state,
            ov.Type(dtype),
            ov.PartialShape([1, heads, -1, width]),
        )
        self._variables[state] = op.util.Variable(info)
        empty = ops.constant(np.zeros((1, heads, 0, width), dtype))
        return [op.read_value(empty, self._variables[state]).output(0)]

    def grown(self, node: Any) -> list[Any]:
        """Past and new rows behind each other, [1, Hkv, P + S, d], which the state is from then on."""
        return [self._assigned(node.get_attribute("state"), [node.get_input(0), node.get_input(1)]).output(0)]

    def attention(self, node: Any) -> list[Any]:
        """Causal attention of q [1, H, S, d] over the grown caches."""
        q, k, v, past_k, past_v, beam = (node.get_input(i) for i in range(6))
        zero = ops.constant(np.array(0, np.int64))
        pasts = [ops.gather(past, beam, zero) for past in (past_k, past_v)]
        keys = self._assigned(node.get_attribute("state_k"), [pasts[0], k])
        values = self._assigned(node.get_attribute("state_v"), [pasts[1], v])
        heads = q.get_partial_shape()[1].get_length()
        scale = ops.constant(np.array(node.get_attribute("scale"), q.get_element_type().to_dtype()))
        out = ops.scaled_dot_product_attention(
            q, _shared(keys, heads), _shared(values, heads), scale=scale, causal=True
        )
        return [out.output(0)]

    def blocks(self, node: Any) -> list[Any]:
        """Full attention of q [B, H, K, d] inside each block, with the keys that ``is_real`` [B, K] names."""
        q, k, v, is_real = (node.get_input(i) for i in range(4))
        visible = ops.unsqueeze(is_real, ops.constant(np.array([1, 2], np.int64)))
        scale = ops.constant(np.array(node.get_attribute("scale"), q.get_element_type().to_dtype()))
        return [ops.scaled_dot_product_attention(q, k, v, visible, scale).output(0)]

    def top(self, node: Any) -> list[Any]:
        """TopK-11 of ONNX, ties to the lower index: values and their indices."""
        k = ops.squeeze(node.get_input(1), ops.constant(np.array([0], np.int64)))
        mode = "max" if node.get_attribute("largest", 1) else "min"
        axis = node.get_attribute("axis", -1)
        out = ops.topk(node.get_input(0), k, axis, mode, "value", "i64", stable=True)
        return [out.output(0), out.output(1)]

    def _assigned(self, state: str, parts: list[Any]) -> Any:
        whole = ops.concat(parts, 2)
        self.sinks.append(op.assign(whole, self._variables[state]))
        return whole


def _shared(x_1VTd: Any, heads: int) -> Any:
    """Keys or values for every query head: each is broadcast to its group."""
    _, groups, _, width = x_1VTd.output(0).get_partial_shape()
    if groups.get_length() == heads:
        return x_1VTd
    column = ops.unsqueeze(x_1VTd, ops.constant(np.array([2], np.int64)))
    to = ops.constant(np.array([1, 1, heads // groups.get_length(), 1, 1], np.int64))
    wide = ops.broadcast(column, to, broadcast_spec="BIDIRECTIONAL")
    return ops.reshape(wide, ops.constant(np.array([0, heads, -1, width.get_length()], np.int64)), True)

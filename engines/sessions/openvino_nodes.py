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

from engines.sessions.openvino_pages import LENGTHS

HEADS_FIRST = np.array([0, 2, 1, 3])  # [1, S, H, d] to [1, H, S, d], and back


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
        """Causal attention of q [1, H, S, d] over a cache's rows and the run's, which are written behind them."""
        q, k, v, cache_k, cache_v, *lengths = (node.get_input(i) for i in range(5 + len(LENGTHS)))
        held, begins, blocks, block_begins, total = lengths
        heads, groups, width = (x.get_partial_shape()[i].get_length() for x, i in ((q, 1), (k, 1), (k, 3)))
        scale = ops.constant(np.array(node.get_attribute("scale"), np.float32))
        zero, ints, floats = ops.constant(np.array(0, np.int32)), _none(np.int32), _none(np.float32)
        # What is not asked for: a window, ALiBi, the scores, rotation, sparse prefill, sinks, eviction, other masks.
        rows = [ops.convert(_rows_first(x), cache_k.get_element_type()) for x in (q, k, v)]
        inputs = [*rows, cache_k, cache_v, held, begins, blocks, block_begins]
        inputs += [scale, zero, floats, total, ints, ints, ints, floats, floats, zero, zero]
        inputs += [_none(np.float32, 4), zero, ints, ints, ints, ints, _none(np.uint8), ints]
        made = op._PagedAttentionExtension([x if isinstance(x, ov.Output) else x.output(0) for x in inputs])
        told = {"num_k_heads": groups, "num_v_heads": groups, "k_head_size": width, "v_head_size": width}
        for name, size in told.items():
            made.get_rt_info()[name] = size
        out = ops.convert(made.output(0), q.get_element_type())
        split = ops.reshape(out, ops.constant(np.array([1, -1, heads, width], np.int64)), False)
        return [ops.transpose(split, ops.constant(HEADS_FIRST)).output(0)]

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


def _rows_first(x_1HSd: Any) -> Any:
    """[1, H, S, d] as [S, H·d]."""
    _, heads, _, width = x_1HSd.get_partial_shape()
    turned = ops.transpose(x_1HSd, ops.constant(HEADS_FIRST))
    return ops.reshape(turned, ops.constant(np.array([-1, heads.get_length() * width.get_length()], np.int64)), False)


def _none(dtype: Any, axes: int = 1) -> Any:
    return ops.constant(np.zeros((0,) * axes, dtype))

"""Attention inside blocks as ONNX Runtime's tiled kernel for the CPU, which holds no map of scores.

Legend: B blocks, H heads, K places of a block, D head width.

    BlockAttention(q, k, v [B,H,K,D], is_real [B,K])  →  MultiHeadAttention(q ⊕ 1, k ⊕ p, v),  p = 0 or LOW

The kernel is tiled only where there is no mask, so what is not real is said by one more column of q and k: its product
is LOW for a padding key, whose share is then exactly 0. Source: ONNX Runtime's com.microsoft::MultiHeadAttention.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphs.lowering.edit import before, constant, takes_over
from graphs.lowering.linear import MICROSOFT, remove_unread
from graphs.ops import DOMAIN

LOW = -1e30  # times any scale of an attention still less than every score, and no infinity
ROWS_FIRST = (0, 2, 1, 3)  # [B,H,K,D] ↔ [B,K,H,D]


class BlocksTiled(ir.passes.InPlacePass):
    """Rewrite every BlockAttention of fp32 values whose heads and width are known."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        blocks = (node for node in model.graph if node.domain == DOMAIN and node.op_type == "BlockAttention")
        found = [node for node in blocks if _heads(node.inputs[0])]
        columns: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for node in found:
            _rewrite(node, columns)
        if found:
            model.graph.opset_imports[MICROSOFT] = 1
            if not any(node.op_identifier() == found[0].op_identifier() for node in model.graph.all_nodes()):
                model.functions.pop(found[0].op_identifier(), None)
        return ir.passes.PassResult(model, bool(found))


def _rewrite(node: ir.Node, columns: dict[ir.Value, tuple[ir.Value, ir.Value]]) -> None:
    q, k, v, is_real = node.inputs
    assert q is not None
    assert is_real is not None
    graph, sizes = node.graph, _heads(q)
    assert graph is not None
    assert sizes
    heads, width = sizes
    if is_real not in columns:
        columns[is_real] = _columns(node, is_real, heads)
    one, padding = columns[is_real]
    wide_q, wide_k = (
        _flat(node, before(node, "Concat", [_rows_first(node, value), column], axis=3), heads * (width + 1))
        for value, column in ((q, one), (k, padding))
    )
    flat_v = _flat(node, _rows_first(node, v), heads * width)
    attributes = {"num_heads": heads, "scale": node.attributes.get_float("scale")}
    made = ir.node("MultiHeadAttention", [wide_q, wide_k, flat_v], attributes, domain=MICROSOFT, name=node.name)
    graph.insert_before(node, made)
    assert q.shape is not None
    made.outputs[0].type, made.outputs[0].shape = q.type, ir.Shape([q.shape[0], q.shape[2], heads * width])
    apart = before(node, "Reshape", [made.outputs[0], constant(node, [0, 0, heads, width])])
    takes_over(before(node, "Transpose", [apart], perm=ROWS_FIRST), node.outputs[0])
    fed = [value.producer() for value in (q, k, v) if value is not None]
    graph.remove(node, safe=True)
    remove_unread(fed)


def _columns(node: ir.Node, is_real: ir.Value, heads: int) -> tuple[ir.Value, ir.Value]:
    """What stands behind every row of q and of k, each [B,K,H,1]."""
    zero, low, one = (before(node, "Constant", [], value=ir.tensor(np.float32(x))) for x in (0, LOW, 1))
    padding_BK11 = before(node, "Unsqueeze", [before(node, "Where", [is_real, zero, low]), constant(node, [2, 3])])
    sizes = before(node, "Concat", [before(node, "Shape", [is_real]), constant(node, [heads, 1])], axis=0)
    return before(node, "Expand", [one, sizes]), before(node, "Expand", [padding_BK11, sizes])


def _flat(node: ir.Node, value: ir.Value, width: int) -> ir.Value:
    return before(node, "Reshape", [value, constant(node, [0, 0, width])])


def _rows_first(node: ir.Node, value: ir.Value | None) -> ir.Value:
    """[B,K,H,D] of [B,H,K,D]: what it was turned from, or turned back."""
    maker = value.producer() if value is not None else None
    turned = maker is not None and maker.op_type == "Transpose" and not maker.domain
    if maker is not None and turned and tuple(maker.attributes.get_ints("perm") or ()) == ROWS_FIRST:
        source = maker.inputs[0]
        assert source is not None
        return source
    return before(node, "Transpose", [value], perm=ROWS_FIRST)


def _heads(value: ir.Value | None) -> tuple[int, int] | None:
    """H and D of [B,H,K,D] in fp32; None where type or sizes are others, or not known."""
    if value is None or value.shape is None or len(value.shape) != 4 or value.dtype != ir.DataType.FLOAT:
        return None
    heads, width = value.shape[1], value.shape[3]
    return (heads, width) if isinstance(heads, int) and isinstance(width, int) else None

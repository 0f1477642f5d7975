"""Attention of a tower as ONNX Runtime's tiled kernel for the CPU, which holds no map of scores.

Legend: B images, tiles or blocks, H heads, K places of one, D head width.

    Attention(q, k, v [B,H,K,D])                      →  MultiHeadAttention(q, k, v [B,K,H·D])
    BlockAttention(q, k, v [B,H,K,D], is_real [B,K])  →  MultiHeadAttention(q ⊕ 1, k ⊕ p, v),  p = 0 or LOW

The kernel is tiled only where there is no mask, so what is not real is said by one more column of q and k: its product
is LOW for a padding key, whose share is then exactly 0. Where places are few the standard's Attention is faster, with
rows of all heads too. Source: ONNX Runtime's com.microsoft::MultiHeadAttention.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphs.lowering.edit import MICROSOFT, before, constant, only_user, remove_unread, takes_over
from graphs.lowering.heads import TURN, heads_and_width, only_joined, split, split_from, turned_from
from graphs.ops import DOMAIN

LOW = -1e30  # times any scale of an attention still less than every score, and no infinity
LONG = 448  # places from which on the tiled kernel is the faster one; a map of fewer scores is small


class TowersTiled(ir.passes.InPlacePass):
    """Rewrite attention over whole images and inside blocks, of fp32 values whose heads and width are known."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        found = [node for node in model.graph if _over_all(node) or _in_blocks(node)]
        columns: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for node in found:
            _rewrite(node, columns)
        if found:
            model.graph.opset_imports[MICROSOFT] = 1
        for blocks in (node for node in found if node.domain == DOMAIN):
            if not any(node.op_identifier() == blocks.op_identifier() for node in model.graph.all_nodes()):
                model.functions.pop(blocks.op_identifier(), None)
        return ir.passes.PassResult(model, bool(found))


def _in_blocks(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type == "BlockAttention" and _heads(node.inputs[0]) is not None


def _over_all(node: ir.Node) -> bool:
    """Whether every row attends to every row: no mask, no cache, and nothing that the kernel does not do."""
    if node.domain or node.op_type != "Attention" or len(node.inputs) != 3 or len(node.outputs) != 1:
        return False
    causal, capped = node.attributes.get_int("is_causal", 0), node.attributes.get_float("softcap", 0.0)
    same = _heads(node.inputs[0]) is not None and len({_heads(x) for x in node.inputs}) == 1
    return same and not causal and not capped


def _rewrite(node: ir.Node, columns: dict[ir.Value, tuple[ir.Value, ir.Value]]) -> None:
    q, k, v = node.inputs[:3]
    assert q is not None
    assert q.shape is not None
    graph, sizes = node.graph, _heads(q)
    assert graph is not None
    assert sizes
    heads, width = sizes
    rows = [turned_from(value) or before(node, "Transpose", [value], perm=TURN) for value in (q, k, v)]
    widths = [width] * 3
    if is_real := next(iter(node.inputs[3:]), None):
        if is_real not in columns:
            columns[is_real] = _columns(node, is_real, heads)
        rows[:2] = [before(node, "Concat", list(pair), axis=3) for pair in zip(rows[:2], columns[is_real], strict=True)]
        widths[:2] = [width + 1] * 2
    flat = [
        _flat(node, row, heads * wide, value) for row, wide, value in zip(rows, widths, node.inputs[:3], strict=True)
    ]
    scale = node.attributes.get_float("scale", 0.0) or width**-0.5
    if is_real is None and isinstance(q.shape[2], int) and q.shape[2] < LONG:
        attributes = {"q_num_heads": heads, "kv_num_heads": heads, "scale": scale}
        made = ir.node("Attention", flat, attributes, name=node.name)
    else:
        attributes = {"num_heads": heads, "scale": scale}
        made = ir.node("MultiHeadAttention", flat, attributes, domain=MICROSOFT, name=node.name)
    graph.insert_before(node, made)
    made.outputs[0].type, made.outputs[0].shape = q.type, ir.Shape([q.shape[0], q.shape[2], heads * width])
    together = _together(node.outputs[0])
    if together:
        takes_over(made.outputs[0], together)
    else:
        takes_over(split(node, made.outputs[0], heads, width), node.outputs[0])
    remove_unread([together.producer() if together else node])


def _together(value: ir.Value) -> ir.Value | None:
    """[B,K,H·D], where that alone is made of [B,H,K,D]; a view of the same sizes may stand on the way."""
    sizes = value.shape
    view = only_user(value, "Reshape")
    joined = only_joined(view.outputs[0] if view is not None and view.outputs[0].shape == sizes else value)
    shape = joined.shape if joined is not None else None
    if shape is None or sizes is None or len(shape) != 3:
        return None
    return joined if shape[-1] == sizes[1] * sizes[3] and shape[:2] == (sizes[0], sizes[2]) else None


def _columns(node: ir.Node, is_real: ir.Value, heads: int) -> tuple[ir.Value, ir.Value]:
    """What stands behind every row of q and of k, each [B,K,H,1]."""
    zero, low, one = (before(node, "Constant", [], value=ir.tensor(np.float32(x))) for x in (0, LOW, 1))
    padding_BK11 = before(node, "Unsqueeze", [before(node, "Where", [is_real, zero, low]), constant(node, [2, 3])])
    sizes = before(node, "Concat", [before(node, "Shape", [is_real]), constant(node, [heads, 1])], axis=0)
    return before(node, "Expand", [one, sizes]), before(node, "Expand", [padding_BK11, sizes])


def _flat(node: ir.Node, value: ir.Value, width: int, turned: ir.Value | None) -> ir.Value:
    """[B,K,H·D] of [B,K,H,D]: what it was split from, or joined again; ``turned`` is [B,H,K,D]."""
    together = split_from(value)
    shape = together.shape if together is not None else None
    sizes = turned.shape if turned is not None else None
    if together and shape and sizes and shape[-1] == width and shape[:2] == (sizes[0], sizes[2]):
        return together
    return before(node, "Reshape", [value, constant(node, [0, 0, width])])


def _heads(value: ir.Value | None) -> tuple[int, int] | None:
    """H and D of [B,H,K,D] in fp32; None where type or sizes are others, or not known."""
    return heads_and_width(value) if value is not None and value.dtype == ir.DataType.FLOAT else None

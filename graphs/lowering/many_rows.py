"""A chunk's attention over a buffer, for ONNX Runtime's CPU: GroupQueryAttention's tiles only where they are the best.

Legend: H query heads, S rows, T rows of the buffer up to the chunk's end, n pieces of R of them, V key-value heads,
G query heads that share one, D head width, F = H·D.

    If (H·S·T ≤ MAP):    GroupQueryAttention with a whole map of scores
    else If (T ≤ 3·S):   of each piece  softmax(scale · q [V,G·R,D] · k [V,T,D]ᵀ + hidden [R,T]) · v [V,T,D]
    else:                GroupQueryAttention in tiles

In tiles the operator multiplies some rows of one query head at a time and lays out keys and values for them anew, and
leaves out little of what is hidden. A map that fits into a cache is faster whole. In pieces the heads of a group are
rows of one product, and what lies behind a piece is not multiplied; heads that share no keys would gain nothing. The
operator makes a whole map for heads that have a sink (its notes on the CPU, "activation conditions"), so here they have
one of no weight. Rows that are not filled must hold numbers, any, as in ``graphs.lowering.one_row``. Figures:
benchmarks/LOG.md. Source: ONNX If, Scan, TensorScatter-24; com.microsoft's FusedMatMul and GroupQueryAttention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphs.lowering.edit import MICROSOFT, Branch, before, choose, constant, with_else_branches
from graphs.lowering.grouped import FILLED, PAST_K, PAST_V, Heads, K, Q, V, heads_of
from graphs.lowering.heads import TURN

MAP = 1 << 22  # scores of a whole map, at most: 16 MiB
# In pieces where so many query heads share their keys, and a past and its chunk are no more than so many chunks: the
# operator multiplies a past at twice the speed of what is hidden in part.
SHARED, CHUNKS = 2, 3
PIECE, PIECE_OF_FEW = 32, 64  # rows of a piece, so that some 200 rows share a layout of keys; of fewer than FEW heads
FEW = 4
SINK, NO_WEIGHT = 11, -1e30  # an input of GroupQueryAttention; what e to the power of is 0


class ManyRows(ir.passes.InPlacePass):
    """Give every GroupQueryAttention over a buffer, also in an else-branch, its forms for few rows and for many."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; what stands deeper is left as it is."""
        shared: dict[tuple[object, ...], _Chunk] = {}
        changed = False
        for top, node in with_else_branches(model.graph):
            if node.op_type != "GroupQueryAttention" or node.domain != MICROSOFT:
                continue
            heads, softcap = heads_of(node), node.attributes.get_float("softcap", 0.0)
            if softcap:
                continue
            key = (node.inputs[FILLED], heads.queries)
            if key not in shared:
                shared[key] = _chunk(top, node, heads)
            _rewrite(node, heads, shared[key])
            changed = True
        return ir.passes.PassResult(model, changed)


@dataclass(frozen=True)
class _Chunk:
    """What the layers of a segment share.

    rows: S, int64 [1]. filled: T, int64 []. small: whether a whole map of scores is, bool [1].
    """

    rows: ir.Value
    filled: ir.Value
    small: ir.Value


def _chunk(top: ir.Node, node: ir.Node, heads: Heads) -> _Chunk:
    """In front of the decoder's own node that holds the segment's first attention."""
    rows = before(top, "Shape", [node.inputs[Q]], start=1, end=2)
    filled = before(top, "Cast", [node.inputs[FILLED]], to=ir.DataType.INT64.value)
    most = constant(top, [MAP // heads.queries])
    small = before(top, "LessOrEqual", [before(top, "Mul", [rows, filled]), most])
    small.type, small.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([1])
    return _Chunk(rows, filled, small)


def _rewrite(node: ir.Node, heads: Heads, chunk: _Chunk) -> None:
    name = node.name or str(node.outputs[0].name)
    whole = _whole(node, heads, f"{name}/whole")
    choice = choose([node], node.outputs, chunk.small, whole, f"{name}/map", f"{name}/tiles")
    if heads.together >= SHARED:
        large = _pieces_or(choice.attributes["else_branch"].as_graph(), heads, chunk, name)
        choice.attributes["else_branch"] = ir.AttrGraph("else_branch", large)


def _whole(node: ir.Node, heads: Heads, name: str) -> ir.Graph:
    branch = Branch(name)
    sink_H = branch.constant(np.full(heads.queries, NO_WEIGHT, np.float32))
    attributes = {key: attribute.value for key, attribute in node.attributes.items()}
    inputs = [*node.inputs, *[None] * (SINK - len(node.inputs)), sink_H]
    whole = ir.node(node.op_type, inputs, attributes, domain=MICROSOFT, num_outputs=3, name=f"{name}/attention")
    _told_as(whole.outputs, node, name)
    return ir.Graph([], whole.outputs, nodes=[*branch.nodes, whole], name=name)


def _pieces_or(tiles: ir.Graph, heads: Heads, chunk: _Chunk, name: str) -> ir.Graph:
    node, branch = tiles[0], Branch(f"{name}/large")
    short = branch.add("LessOrEqual", [chunk.filled, branch.add("Mul", [chunk.rows, branch.ints(CHUNKS)])])
    branches = {"then_branch": _in_pieces(node, heads, chunk, f"{name}/pieces"), "else_branch": tiles}
    choice = ir.node("If", [short], branches, num_outputs=3, name=f"{name}/past")
    _told_as(choice.outputs, node, f"{name}/past")
    return ir.Graph([], choice.outputs, nodes=[*branch.nodes, choice], name=f"{name}/large")


def _told_as(values: Sequence[ir.Value], node: ir.Node, name: str) -> None:
    """Types and shapes of the operator's outputs, under names of their own."""
    for i, (value, like) in enumerate(zip(values, node.outputs, strict=True)):
        value.name, value.type, value.shape = f"{name}/{i}", like.type, like.shape


def _in_pieces(node: ir.Node, heads: Heads, chunk: _Chunk, name: str) -> ir.Graph:
    v, g, d = heads.keys, heads.together, heads.width
    r = PIECE_OF_FEW if g < FEW else PIECE
    branch = Branch(name)
    rows, begin = chunk.rows, branch.add("Sub", [chunk.filled, chunk.rows])
    presents = []
    for buffer, added in ((node.inputs[PAST_K], node.inputs[K]), (node.inputs[PAST_V], node.inputs[V])):
        chunk_1SVD = branch.add("Reshape", [added, branch.ints(1, -1, v, d)])
        chunk_1VSD = branch.add("Transpose", [chunk_1SVD], perm=TURN)
        presents.append(branch.add("TensorScatter", [buffer, chunk_1VSD, begin], axis=2))
    held_VCD = [branch.add("Reshape", [present, branch.ints(v, -1, d)]) for present in presents]
    # The last piece is filled up with rows of zeros, whose results are cut off.
    count = branch.add("Div", [branch.add("Add", [rows, branch.ints(r - 1)]), branch.ints(r)])
    full = branch.add("Mul", [count, branch.ints(r)])
    zeros = branch.add("Concat", [branch.ints(0, 0, 0, 0), branch.add("Sub", [full, rows]), branch.ints(0)], axis=0)
    padded = branch.add("Pad", [node.inputs[Q], zeros])
    q_nRF = branch.add("Reshape", [padded, branch.ints(-1, r, v * g * d)])
    ends = [branch.add("Squeeze", [x]) for x in (begin, branch.add("Add", [begin, full]))]
    begins_n = branch.add("Range", [*ends, branch.constant(np.array(r, np.int64))])
    begins_n1 = branch.add("Reshape", [begins_n, branch.ints(-1, 1)])
    body = _piece(heads, r, held_VCD, f"{name}/piece")
    out_nRF = branch.add("Scan", [q_nRF, begins_n1], body=body, num_scan_inputs=2)
    flat = branch.add("Reshape", [out_nRF, branch.ints(1, -1, v * g * d)])
    outputs = [branch.add("Slice", [flat, branch.ints(0), rows, branch.ints(1)]), *presents]
    _told_as(outputs, node, name)
    return ir.Graph([], outputs, nodes=branch.nodes, name=name)


def _piece(heads: Heads, r: int, held_VCD: list[ir.Value], name: str) -> ir.Graph:
    """Rows of q, [R,F], and where they begin in the buffer, int64 [1], to rows of out; F = V·G·D, M = G·R."""
    v, g, d = heads.keys, heads.together, heads.width
    q_RF = ir.Value(name=f"{name}/q", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([r, v * g * d]))
    begin = ir.Value(name=f"{name}/begin", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    body = Branch(name)
    q_VGRD = body.add("Transpose", [body.add("Reshape", [q_RF, body.ints(r, v, g, d)])], perm=[1, 2, 0, 3])
    q_VMD = body.add("Reshape", [q_VGRD, body.ints(v, g * r, d)])
    end = body.add("Add", [begin, body.ints(r)])
    k_VTD, v_VTD = (body.add("Slice", [held, body.ints(0), end, body.ints(1)]) for held in held_VCD)
    logit_VMT = body.add("FusedMatMul", [q_VMD, k_VTD], MICROSOFT, transB=1, alpha=heads.scale)
    logit_VGRT = body.add("Reshape", [logit_VMT, body.ints(v, g, r, -1)])
    seen = body.add("Squeeze", [body.add("Shape", [k_VTD], start=1, end=2)])
    zero, one = (body.constant(np.array(x, np.int64)) for x in (0, 1))
    key_T = body.add("Range", [zero, seen, one])
    row_R1 = body.add("Add", [body.constant(np.arange(r, dtype=np.int64)[:, None]), begin])
    shown, none = (body.constant(np.array(x, np.float32)) for x in (0, -np.inf))
    hidden_RT = body.add("Where", [body.add("LessOrEqual", [key_T, row_R1]), shown, none])
    share_VGRT = body.add("Softmax", [body.add("Add", [logit_VGRT, hidden_RT])], axis=-1)
    share_VMT = body.add("Reshape", [share_VGRT, body.ints(v, g * r, -1)])
    mixed_VGRD = body.add("Reshape", [body.add("MatMul", [share_VMT, v_VTD]), body.ints(v, g, r, d)])
    mixed_RVGD = body.add("Transpose", [mixed_VGRD], perm=[2, 0, 1, 3])
    mixed_RF = body.add("Reshape", [mixed_RVGD, body.ints(r, v * g * d)])
    mixed_RF.type, mixed_RF.shape = q_RF.type, q_RF.shape
    return ir.Graph([q_RF, begin], [mixed_RF], nodes=body.nodes, name=name)

"""A long chunk's attention over a buffer, for ONNX Runtime's CPU: what GroupQueryAttention does for many rows, faster.

Legend: S rows, n pieces of R of them, V key-value heads, G query heads that share one, D head width, F = V·G·D,
T rows of the buffer up to a piece's end.

    If (long):  of each piece  softmax(scale · q [V,G·R,D] · k [V,T,D]ᵀ + hidden [R,T]) · v [V,T,D]
    else:       GroupQueryAttention

The operator multiplies some rows of one query head at a time and lays out keys and values for them anew. Here the heads
of a group are rows of one product, what lies behind a piece is not multiplied at all, and one piece's map is in memory
at a time. Heads that share no keys gain nothing. Rows that are not filled must hold numbers, any, as in
``graphs.lowering.one_row``. Figures: benchmarks/LOG.md. Source: ONNX If, Scan, TensorScatter-24; com.microsoft's
FusedMatMul.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphs.lowering.edit import Branch, before, constant, takes_over, with_else_branches
from graphs.lowering.grouped import CONTRIB, LAST, PAST_K, PAST_V, Heads, K, Q, V, heads_of

# From where on it gains: rows of a chunk, query heads that share their keys. And up to where: a past and a chunk of so
# many chunks' rows, as the operator multiplies a past at twice the speed of what is hidden in part.
LONG, SHARED, CHUNKS = 192, 2, 3
PIECE, PIECE_OF_FEW = 32, 64  # rows of a piece, so that some 200 rows share a layout of keys; of fewer than FEW heads
FEW = 4


class ManyRows(ir.passes.InPlacePass):
    """Give every GroupQueryAttention over a buffer, also in an else-branch, a form for a long chunk."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; what stands deeper is left as it is."""
        long: dict[ir.Value | None, ir.Value] = {}
        changed = False
        for top, node in with_else_branches(model.graph):
            if node.op_type != "GroupQueryAttention" or node.domain != CONTRIB:
                continue
            heads, softcap = heads_of(node), node.attributes.get_float("softcap", 0.0)
            if heads.together < SHARED or softcap:
                continue
            if node.inputs[LAST] not in long:
                long[node.inputs[LAST]] = _long(top, node)
            _rewrite(node, heads, long[node.inputs[LAST]])
            changed = True
        return ir.passes.PassResult(model, changed)


def _long(top: ir.Node, node: ir.Node) -> ir.Value:
    """Whether a chunk has so many rows and not too long a past, bool []; in front of the decoder's own node."""
    rows = before(top, "Shape", [node.inputs[Q]], start=1, end=2)
    last = before(top, "Cast", [node.inputs[LAST]], to=ir.DataType.INT64.value)
    enough = before(top, "GreaterOrEqual", [rows, constant(top, [LONG])])
    most = before(top, "Mul", [rows, constant(top, [CHUNKS])])
    long = before(top, "Squeeze", [before(top, "And", [enough, before(top, "Less", [last, most])])])
    long.type, long.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
    return long


def _rewrite(node: ir.Node, heads: Heads, long: ir.Value) -> None:
    graph, old = node.graph, list(node.outputs)
    assert graph is not None
    name = node.name or str(old[0].name)
    choice = ir.node("If", [long], num_outputs=len(old), name=f"{name}/chunk")
    graph.insert_before(node, choice)
    for new, value in zip(choice.outputs, old, strict=True):
        takes_over(new, value)
    graph.remove(node)
    few = ir.Graph([], old, nodes=[node], name=f"{name}/few")
    choice.attributes["then_branch"] = ir.AttrGraph("then_branch", _in_pieces(node, heads, f"{name}/many"))
    choice.attributes["else_branch"] = ir.AttrGraph("else_branch", few)


def _in_pieces(node: ir.Node, heads: Heads, name: str) -> ir.Graph:
    v, g, d = heads.keys, heads.together, heads.width
    r = PIECE_OF_FEW if g < FEW else PIECE
    branch = Branch(name)
    rows = branch.add("Shape", [node.inputs[Q]], start=1, end=2)
    past = branch.add("Sub", [branch.add("Cast", [node.inputs[LAST]], to=ir.DataType.INT64.value), rows])
    begin = branch.add("Add", [branch.add("Reshape", [past, branch.ints(1)]), branch.ints(1)])
    presents = []
    for buffer, chunk in ((node.inputs[PAST_K], node.inputs[K]), (node.inputs[PAST_V], node.inputs[V])):
        chunk_1SVD = branch.add("Reshape", [chunk, branch.ints(1, -1, v, d)])
        chunk_1VSD = branch.add("Transpose", [chunk_1SVD], perm=[0, 2, 1, 3])
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
    for value, like in zip(outputs, node.outputs, strict=True):
        value.type, value.shape = like.type, like.shape
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
    logit_VMT = body.add("FusedMatMul", [q_VMD, k_VTD], CONTRIB, transB=1, alpha=heads.scale)
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

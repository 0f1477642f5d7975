"""A decode step's attention over a buffer, for ONNX Runtime's CPU: what GroupQueryAttention does for one row, cheaper.

Legend: H query heads, V key-value heads, G = H / V, C rows of the buffer, D head width.

    If (one row):  logit [V,C,G] = K · qᵀ,  p [V,G,C] = softmax(logit + hidden),  out = p · V,  received [C] = Σ_heads p
    else:          GroupQueryAttention, and ReceivedInCache behind it

GroupQueryAttention multiplies each query head by its group's keys on its own and is bound by arithmetic; here the keys
are read once for the whole group, which pays where the group is large. And what each row received is the sum of shares
that are at hand, where ReceivedInCache has to make them again. It costs by the capacity, not by the filled rows, and a
few nodes more, so a short buffer keeps the operator. Rows that are not filled must hold numbers, any: what hides them
is added to their logits, and their share, zero, is multiplied. Figures: benchmarks/LOG.md. Source: ONNX If,
TensorScatter-24; com.microsoft's FusedMatMul.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphs.lowering.edit import MICROSOFT, Branch, before, choose, constant
from graphs.lowering.grouped import LAST, PAST_K, PAST_V, Heads, K, Q, V, heads_of
from graphs.ops import DOMAIN, OPS, OVER_CACHE

# From where on it gains without received attention: query heads that share their keys, H·D, and rows of the buffer.
# With less in common a product has too few rows; in a narrower or shorter one its nodes cost more.
SHARED, WIDE, LONG = 6, 512, 384
SHARED_RECEIVED = 2  # … and with it, at any width and length
RECEIVED_OVER_CACHE = frozenset(OVER_CACHE.values())


class OneRow(ir.passes.InPlacePass):
    """Give every GroupQueryAttention over a buffer a form for one row, with what is received from it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; what stands outside the decoder's own graph is left as it is."""
        shared: dict[tuple[object, ...], ir.Value] = {}
        found = [node for node in model.graph if node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT]
        changed = False
        for node in found:
            layer = _layer_of(node)
            if layer.gains and not node.attributes.get_float("softcap", 0.0):
                _rewrite(layer, shared)
                changed = True
        return ir.passes.PassResult(model, changed)


@dataclass(frozen=True)
class _Layer:
    node: ir.Node
    received: ir.Node | None
    heads: Heads

    @property
    def outputs(self) -> list[ir.Value]:
        """What the form gives too."""
        return [*self.node.outputs, *(self.received.outputs if self.received else ())]

    @property
    def gains(self) -> bool:
        """Whether the form is worth its nodes."""
        if self.received is not None:
            return self.heads.together >= SHARED_RECEIVED
        return self.heads.together >= SHARED and self.heads.queries * self.heads.width >= WIDE


def is_rated(received: ir.Node) -> bool:
    """Whether guide rows have weights, an input of one row each, in the place of a carrier of their number."""
    return bool(OPS[received.op_type].scores)


def _layer_of(node: ir.Node) -> _Layer:
    heads = heads_of(node)
    users = [
        user for user, at in node.outputs[1].uses() if user.domain == DOMAIN and user.op_type in RECEIVED_OVER_CACHE
    ]
    same = [user for user in users if _same_rows(user.inputs[0], node.inputs[Q])]
    alike = len(same) == 1 and abs(same[0].attributes["scale"].value - heads.scale) < 1e-6 * heads.scale
    return _Layer(node, same[0] if alike else None, heads)


def _same_rows(heads_first: ir.Value | None, rows_first: ir.Value | None) -> bool:
    """Whether [B,H,S,D] and [B,S,H·D] are views of each other."""
    split, joined = _behind(heads_first, "Transpose", "Reshape"), _behind(rows_first, "Reshape", "Transpose")
    return (split is not None and split is rows_first) or (joined is not None and joined is heads_first)


def _behind(value: ir.Value | None, *op_types: str) -> ir.Value | None:
    """What a value was before nodes of these types, the last first."""
    for op_type in op_types:
        maker = value.producer() if value is not None else None
        value = maker.inputs[0] if maker is not None and maker.op_type == op_type else None
    return value


def _rewrite(layer: _Layer, shared: dict[tuple[object, ...], ir.Value]) -> None:
    node, received = layer.node, layer.received
    name = node.name or str(node.outputs[0].name)
    node.name = node.name or f"{name}/attention"
    one = _one_row(layer, _hidden(node, shared), _write_at(node, shared), f"{name}/one_row")
    condition = _condition(layer, shared)
    many = [node, *_own_view(received, node), received] if received else [node]
    choose(many, layer.outputs, condition, one, f"{name}/rows", f"{name}/many")


def _own_view(received: ir.Node, node: ir.Node) -> list[ir.Node]:
    """What splits q's heads for received attention alone, which a step then does not do."""
    turn = _only_maker(received.inputs[0])
    view = _only_maker(turn.inputs[0]) if turn is not None else None
    return [view, turn] if view is not None and turn is not None and view.inputs[0] is node.inputs[Q] else []


def _only_maker(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value for one other node and nobody else."""
    alone = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
    return value.producer() if value is not None and alone else None


def _condition(layer: _Layer, shared: dict[tuple[object, ...], ir.Value]) -> ir.Value:
    """One row, and a guide of one where received attention is asked for; else a buffer that is long."""
    node, received = layer.node, layer.received
    key = ("rows", node.inputs[LAST], received.inputs[2] if received else None)
    if key not in shared:
        one = constant(node, [1])
        rows = before(node, "Shape", [node.inputs[Q]], start=1, end=2)
        single = before(node, "Equal", [rows, one])
        if received:
            axis = 1 if is_rated(received) else 0
            guides = before(node, "Shape", [received.inputs[2]], start=axis, end=axis + 1)
            more = before(node, "Equal", [guides, one])
        else:
            buffer = before(node, "Shape", [node.inputs[PAST_K]], start=2, end=3)
            more = before(node, "GreaterOrEqual", [buffer, constant(node, [LONG])])
        shared[key] = before(node, "Squeeze", [before(node, "And", [single, more])])
        shared[key].type, shared[key].shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
    return shared[key]


def _write_at(node: ir.Node, shared: dict[tuple[object, ...], ir.Value]) -> ir.Value:
    """Where one row goes, int64 [1]."""
    key = ("at", node.inputs[LAST])
    if key not in shared:
        wide = before(node, "Cast", [node.inputs[LAST]], to=ir.DataType.INT64.value)
        shared[key] = before(node, "Reshape", [wide, constant(node, [1])])
    return shared[key]


def _hidden(node: ir.Node, shared: dict[tuple[object, ...], ir.Value]) -> ir.Value:
    """What is added to a row's logits, fp32 [C]: 0 up to its own key, −inf behind."""
    key = ("hidden", node.inputs[LAST])
    if key not in shared:
        rows = before(node, "Squeeze", [before(node, "Shape", [node.inputs[PAST_K]], start=2, end=3)])
        keys = before(node, "Range", [constant(node, 0), rows, constant(node, 1)])
        seen = before(node, "LessOrEqual", [keys, _write_at(node, shared)])
        zero = before(node, "Constant", [], value_float=0.0)
        none = before(node, "Constant", [], value_float=float("-inf"))
        shared[key] = before(node, "Where", [seen, zero, none])
    return shared[key]


def _one_row(layer: _Layer, hidden: ir.Value, write_at: ir.Value, name: str) -> ir.Graph:
    node, of = layer.node, layer.heads
    h, v, g, d = of.queries, of.keys, of.together, of.width
    body = Branch(name)
    presents = [
        body.add("TensorScatter", [past, body.add("Reshape", [chunk, body.ints(1, v, 1, d)]), write_at], axis=2)
        for past, chunk in ((node.inputs[PAST_K], node.inputs[K]), (node.inputs[PAST_V], node.inputs[V]))
    ]
    q_1VGD = body.add("Reshape", [node.inputs[Q], body.ints(1, v, g, d)])
    logit_1VCG = body.add("FusedMatMul", [presents[0], q_1VGD], MICROSOFT, transB=1, alpha=of.scale)
    logit_1VGC = body.add("Transpose", [logit_1VCG], perm=[0, 1, 3, 2])
    share_1VGC = body.add("Softmax", [body.add("Add", [logit_1VGC, hidden])], axis=-1)
    # Products of one row each: a product of G rows would copy the values first.
    share_VG1C = body.add("Reshape", [share_1VGC, body.ints(v, g, 1, -1)])
    value_V1CD = body.add("Reshape", [presents[1], body.ints(v, 1, -1, d)])
    mixed_VG1D = body.add("MatMul", [share_VG1C, value_V1CD])
    outputs = [body.add("Reshape", [mixed_VG1D, body.ints(1, 1, h * d)]), *presents]
    if layer.received:
        ones_1H = body.constant(np.ones((1, h), np.float32))
        if is_rated(layer.received):
            ones_1H = body.add("Mul", [ones_1H, layer.received.inputs[2]])
        share_HC = body.add("Reshape", [share_1VGC, body.ints(h, -1)])
        outputs.append(body.add("MatMul", [ones_1H, share_HC]))
    for value, like in zip(outputs, layer.outputs, strict=True):
        value.type, value.shape = like.type, like.shape
    return ir.Graph([], outputs, nodes=body.nodes, name=name)

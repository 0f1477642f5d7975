"""Attention over a buffer by com.microsoft's GroupQueryAttention, for ONNX Runtime's CPU.

Legend: B batch, H heads, S rows, D head width.

Where past and present are one OrtValue it writes the chunk behind the filled rows and copies nothing; it costs by the
filled rows, not by the capacity, in fp32. It takes rows of all heads side by side, [B,S,H·D], and heads of widths that
are multiples of 8. Source: ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphs.lowering.edit import MICROSOFT, before, constant, takes_over
from graphs.lowering.heads import TURN, heads_and_width, is_turn, split, split_from, turned_from

HEAD_WIDTHS = 8
Q, K, V, PAST_K, PAST_V, LAST, FILLED = range(7)  # inputs of GroupQueryAttention


@dataclass
class Segment:
    """What the layers of one segment share: how many rows are filled, and what follows from it, made once."""

    length: ir.Value
    capacity: int | str
    shared: dict[str, ir.Value]


@dataclass(frozen=True)
class Heads:
    """Of a GroupQueryAttention over a buffer: query heads, key-value heads, their width, what scales their products."""

    queries: int
    keys: int
    width: int
    scale: float

    @property
    def together(self) -> int:
        """The query heads that share a key-value head."""
        return self.queries // self.keys


def heads_of(node: ir.Node) -> Heads:
    """Told by the operator's attributes and its buffer [1,V,C,D]."""
    buffer = node.inputs[PAST_K]
    assert buffer is not None
    assert buffer.shape is not None
    keys, width = int(buffer.shape[1]), int(buffer.shape[3])  # type: ignore[arg-type]
    scale = node.attributes.get_float("scale", 0.0) or width**-0.5
    return Heads(node.attributes.get_int("num_heads", 0), keys, width, scale)


def attend(node: ir.Node, segment: Segment) -> list[ir.Value]:
    """Put the operator in front of a canonical attention, let it take over the outputs, and return both caches."""
    graph, (q, k, v, _, past_k, past_v) = node.graph, node.inputs[:6]
    assert graph is not None
    assert q is not None
    assert k is not None
    assert v is not None
    last, filled = _filled(node, segment)
    names = {"scale", "softcap"} & set(node.attributes)
    attributes = {name: node.attributes[name].value for name in sorted(names)}
    if heads_together(node):
        flat, counts = [q, k, v], [node.attributes[n].value for n in ("q_num_heads", "kv_num_heads")]
    else:
        flat, counts = [_rows_first(node, value) for value in (q, k, v)], [_heads(x)[0] for x in (q, k)]
    made = ir.node(
        "GroupQueryAttention",
        [*flat, past_k, past_v, last, filled],
        attributes | dict(zip(("num_heads", "kv_num_heads"), counts, strict=True)),
        domain=MICROSOFT,
        num_outputs=3,
        name=node.name,
    )
    graph.insert_before(node, made)
    if heads_together(node):
        takes_over(made.outputs[0], node.outputs[0])
    else:
        _heads_first(node, made.outputs[0])
    return [takes_over(new, old) for new, old in zip(made.outputs[1:], node.outputs[1:], strict=True)]


def _rows_first(node: ir.Node, value: ir.Value) -> ir.Value:
    """[B,H,S,D] as [B,S,H·D]: what it was made of by a reshape and a transpose, or turned back."""
    if rows := split_from(turned_from(value)):
        return rows
    apart = before(node, "Transpose", [value], perm=TURN)
    heads, head_width = _heads(value)
    rows = before(node, "Reshape", [apart, constant(node, [0, 0, heads * head_width])])
    assert value.shape is not None
    rows.type, rows.shape = value.type, ir.Shape([value.shape[0], value.shape[2], heads * head_width])
    return rows


def _heads_first(node: ir.Node, flat: ir.Value) -> None:
    """Hand [B,S,H·D] to who read the attention's [B,H,S,D]: as it is behind a transpose and a reshape."""
    graph, old = node.graph, node.outputs[0]
    assert graph is not None
    users = [user for user, _ in old.uses()]
    behind = [u for user in users if is_turn(user) for u, _ in user.outputs[0].uses()]
    if users and all(map(is_turn, users)) and all(u.op_type == "Reshape" for u in behind):
        for reshape in behind:
            takes_over(flat, reshape.outputs[0])
            graph.remove(reshape, safe=True)
        for user in users:
            graph.remove(user, safe=True)
        return
    takes_over(split(node, flat, *_heads(old)), old)


def _filled(node: ir.Node, segment: Segment) -> tuple[ir.Value, ir.Value]:
    """seqlens_k int32 [1,1] = filled − 1, and total_sequence_length int32 []: once per segment."""
    if "filled" not in segment.shared:
        axis = 1 if heads_together(node) else 2
        rows = before(node, "Shape", [node.inputs[0]], start=axis, end=axis + 1)
        sum_1 = before(node, "Add", [segment.length, rows])
        filled = before(node, "Cast", [sum_1], to=ir.DataType.INT32.value)
        one = before(node, "Cast", [constant(node, [[1]])], to=ir.DataType.INT32.value)
        segment.shared["last"] = before(node, "Sub", [filled, one])
        segment.shared["filled"] = before(node, "Squeeze", [filled])
    return segment.shared["last"], segment.shared["filled"]


def heads_together(node: ir.Node) -> bool:
    """Whether an attention takes rows of all heads side by side, [B,S,H·D], and gives such."""
    return "q_num_heads" in node.attributes


def _heads(value: ir.Value) -> tuple[int, int]:
    """H and D of [B,H,S,D], which the exporter always knows."""
    sizes = heads_and_width(value)
    if sizes is None:
        raise ir.passes.PassError(f"{value.name} has no shape")
    return sizes

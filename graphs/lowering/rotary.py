"""Rotary position embedding as the standard's one node, and heads split by the nodes that need them.

Legend: B batch, S rows, H heads, d head width.

    x·cos + concat(−x[d/2:], x[:d/2])·sin,  cos = concat(a, a), sin = concat(b, b)   →   RotaryEmbedding(x, a, b)
    Transpose(Reshape(x [B,S,H·d])) [B,H,S,d] in front of RotaryEmbedding and Attention   →   x [B,S,H·d] as it is

Qwen's angles come from three axes, so a tracer leaves their rotation as ten nodes a layer; a decode step is a few
hundred such nodes of microseconds each. Source: ONNX RotaryEmbedding-23 and Attention-23 with inputs of three axes.
"""

from __future__ import annotations

import onnx_ir as ir

from graphs.lowering.linear import remove_unread, replace


class OneRotary(ir.passes.InPlacePass):
    """Rewrite every rotation by halves whose angles are the same for both halves."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""

        changed = False
        for node in list(model.graph.all_nodes()):
            if found := _rotation(node):
                x, cos, sin = found
                replace(node, ir.node("RotaryEmbedding", [x, cos, sin]))
                changed = True

        return ir.passes.PassResult(model, changed)


def _rotation(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x [B,H,S,d] and the angles' halves cos, sin [B,S,d/2] of an Add that rotates; None for others."""
    if not _is(node, "Add"):
        return None
    straight, turned = (value.producer() if value else None for value in node.inputs)
    if not _is(straight, "Mul") or not _is(turned, "Mul"):
        return None
    if not _is(_maker(turned.inputs[0]), "Concat"):
        straight, turned = turned, straight
    x, cos = straight.inputs
    halves, sin = turned.inputs
    joined = _maker(halves)
    cos_half, sin_half = _half(cos), _half(sin)
    if x is None or cos_half is None or sin_half is None or not _is(joined, "Concat") or len(joined.inputs) != 2:
        return None
    negative, first = (_maker(value) for value in joined.inputs)
    second = _maker(negative.inputs[0]) if _is(negative, "Neg") else None
    if not (_is(first, "Slice") and _is(second, "Slice") and first.inputs[0] is x and second.inputs[0] is x):
        return None
    width = x.shape[-1] if x.shape is not None else None
    if len(x.shape or ()) != 4 or not isinstance(width, int):
        return None
    if _bounds(first) != (0, width // 2) or _bounds(second)[0] != width // 2:
        return None
    return x, cos_half, sin_half


def _half(value: ir.Value | None) -> ir.Value | None:
    """a [B,S,d/2] of Unsqueeze(Concat(a, a), 1)."""
    outer = _maker(value)
    if not _is(outer, "Unsqueeze") or _ints(outer.inputs[1]) != [1]:
        return None
    joined = _maker(outer.inputs[0])
    if not _is(joined, "Concat") or len(joined.inputs) != 2 or joined.inputs[0] is not joined.inputs[1]:
        return None
    half = joined.inputs[0]
    return half if half is not None and len(half.shape or ()) == 3 else None


class HeadsTogether(ir.passes.InPlacePass):
    """Give the decoder's attention rows of all heads side by side, where nothing else reads the split ones."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        changed = False
        for node in list(model.graph.all_nodes()):
            if _is(node, "Attention") and len(node.outputs) > 1:
                changed |= _join(node)
        return ir.passes.PassResult(model, changed)


def _join(node: ir.Node) -> bool:
    """Rewrite one attention, all of its three inputs and its output or nothing."""
    sources = [_together(value) for value in node.inputs[:3]]
    out = _only_user(node.outputs[0])
    merged = _only_user(out.outputs[0]) if _is(out, "Transpose") and _perm(out) == [0, 2, 1, 3] else None
    if not _is(merged, "Reshape") or any(source is None for source in sources):
        return False
    graph = node.graph
    assert graph is not None
    old = list(node.inputs[:3])
    heads = []
    for i, (x, rotary, count) in enumerate(sources):  # type: ignore[misc]
        heads.append(count)
        if rotary is not None:
            new = ir.node("RotaryEmbedding", [x, *rotary.inputs[1:]], {"num_heads": count})
            new.outputs[0].type, new.name = x.type, f"{rotary.name}_together"
            graph.insert_before(node, new)
            x = new.outputs[0]
        node.replace_input_with(i, x)
    node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", heads[0])
    node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", heads[1])
    node.outputs[0].shape = merged.outputs[0].shape
    ir.convenience.replace_all_uses_with(merged.outputs[0], node.outputs[0])
    remove_unread([merged, *(value.producer() for value in old if value is not None)])
    return True


def _together(value: ir.Value | None) -> tuple[ir.Value, ir.Node | None, int] | None:
    """x [B,S,H·d] behind a split value, the rotation on the way where there is one, and H."""
    maker = _maker(value)
    rotary = maker if _is(maker, "RotaryEmbedding") else None
    turned = _maker(rotary.inputs[0]) if rotary else maker
    if not _is(turned, "Transpose") or _perm(turned) != [0, 2, 1, 3]:
        return None
    split, heads = _maker(turned.inputs[0]), turned.outputs[0].shape
    if not _is(split, "Reshape") or heads is None or not isinstance(heads[1], int):
        return None
    x = split.inputs[0]
    return (x, rotary, heads[1]) if x is not None and len(x.shape or ()) == 3 else None


def _is(node: ir.Node | None, op_type: str) -> bool:
    return node is not None and node.domain == "" and node.op_type == op_type


def _maker(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _only_user(value: ir.Value) -> ir.Node | None:
    users = list(value.uses())
    return users[0].node if len(users) == 1 and not value.is_graph_output() else None


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes.get_ints("perm") or ())


def _ints(value: ir.Value | None) -> list[int] | None:
    held = value.const_value if value is not None else None
    return [int(x) for x in held.numpy().reshape(-1)] if held is not None and held.size <= 8 else None


def _bounds(node: ir.Node) -> tuple[int, int] | tuple[None, None]:
    """First and end of a slice of the last axis by steps of 1."""
    first, end, axes, steps = (_ints(value) for value in (*node.inputs[1:5], *[None] * 4)[:4])
    if not first or not end or axes not in ([3], [-1]) or steps not in ([1], None):
        return None, None
    return first[0], end[0]

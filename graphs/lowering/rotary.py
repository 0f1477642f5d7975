"""Rotary position embedding as the standard's one node, and heads split by the nodes that need them.

Legend: B batch, S rows, H heads, d head width, M samples of a tower.

    x·cos + concat(−x[d/2:], x[:d/2])·sin,  cos = concat(a, a), sin = concat(b, b)   →   RotaryEmbedding(x, a, b)
    the same of a tower's x [M,H,d]   →   RotaryEmbedding of x as [1,M,H·d]
    Transpose(Reshape(x [B,S,H·d])) [B,H,S,d] in front of RotaryEmbedding and Attention   →   x [B,S,H·d] as it is

A tracer leaves a rotation as some ten nodes, twice a layer; a decode step of a small model is a few hundred such nodes
of microseconds each. The halves may be equal before their cosine and sine are taken (Llama: cos(concat(f, f))) or after
(Qwen-VL, whose angles come from three axes); before, those of one half are taken instead.
Source: ONNX RotaryEmbedding-23 and Attention-23 with inputs of three axes.
"""

from __future__ import annotations

import onnx_ir as ir

from graphs.lowering.edit import before, constant, made_by, remove_unread, replace
from graphs.lowering.heads import only_joined, split, split_from, turned_from

SINCE = 23  # the version of the standard that has the node
ONE_BY_ONE, SCALED = ("Cos", "Sin", "Cast"), ("Mul",)  # what may stand between the halves' Concat and the rotation


class OneRotary(ir.passes.InPlacePass):
    """Rewrite every rotation by halves whose angles are the same for both halves."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""

        if (model.graph.opset_imports.get("") or 0) < SINCE:
            return ir.passes.PassResult(model, False)
        changed = False
        halves: dict[ir.Value, ir.Value] = {}
        alone: dict[ir.Value, ir.Value] = {}
        for node in list(model.graph.all_nodes()):
            if found := _rotation(node):
                x, cos, sin = found
                angles = [_half(cos, halves), _half(sin, halves)]
                tower = x.shape is not None and len(x.shape) == 3
                replace(node, _of_tower(node, x, angles, alone) if tower else ir.node("RotaryEmbedding", [x, *angles]))
                changed = True

        return ir.passes.PassResult(model, changed)


def _of_tower(node: ir.Node, x: ir.Value, angles: list[ir.Value], alone: dict[ir.Value, ir.Value]) -> ir.Node:
    """The rotation of x [M,H,d] by cos, sin [M,d/2] as that of one batch, and a view of what it was."""
    assert x.shape is not None
    samples, heads, width = x.shape
    assert isinstance(heads, int)
    assert isinstance(width, int)
    for angle in angles:
        if angle not in alone:
            alone[angle] = before(node, "Unsqueeze", [angle, constant(node, [0])])
    flat = before(node, "Reshape", [x, constant(node, [1, -1, heads * width])])
    turned = before(node, "RotaryEmbedding", [flat, *(alone[angle] for angle in angles)], num_heads=heads)
    flat.type = turned.type = x.type
    flat.shape = turned.shape = ir.Shape([1, samples, heads * width])
    return ir.node("Reshape", [turned, constant(node, [-1, heads, width])])


def _rotation(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x [B,H,S,d] and the angles cos, sin [B,S,d], of two equal halves, of an Add that rotates; None for others.

    Of a tower: x [M,H,d], cos and sin [M,d].
    """
    if node.op_type != "Add" or node.domain:
        return None
    straight, turned = (made_by(value, "Mul") for value in node.inputs)
    if straight is None or turned is None:
        return None
    if made_by(turned.inputs[0], "Concat") is None:
        straight, turned = turned, straight
    x, joined = straight.inputs[0], made_by(turned.inputs[0], "Concat")
    axes = len(x.shape) if x is not None and x.shape is not None else 0
    if axes not in (3, 4):
        return None
    cos, sin = (_twice(value.inputs[1], axes - 1) for value in (straight, turned))
    if x is None or cos is None or sin is None or joined is None or len(joined.inputs) != 2:
        return None
    negative, first = made_by(joined.inputs[0], "Neg"), made_by(joined.inputs[1], "Slice")
    second = made_by(negative.inputs[0], "Slice") if negative else None
    if first is None or second is None or not first.inputs[0] is second.inputs[0] is x:
        return None
    width = x.shape[-1] if x.shape is not None else None
    if not isinstance(width, int) or _bounds(first, axes) != (0, width // 2) or _bounds(second, axes)[0] != width // 2:
        return None
    return x, cos, sin


def _twice(value: ir.Value | None, axes: int) -> ir.Value | None:
    """The angles of so many axes behind Unsqueeze, one axis for the heads, where they are one half twice."""
    outer = made_by(value, "Unsqueeze")
    if outer is None or _ints(outer.inputs[1]) not in ([1], [-axes]):
        return None
    joined = _joined(outer.inputs[0])
    half = joined.inputs[0] if joined is not None else None
    return outer.inputs[0] if half is not None and half.shape is not None and len(half.shape) == axes else None


def _joined(value: ir.Value | None) -> ir.Node | None:
    """The Concat(a, a) of the last axis that a value is, or is made of one by one."""
    node = value.producer() if value is not None else None
    if node is None or node.domain:
        return None
    if node.op_type == "Concat":
        twice = len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
        sizes = node.outputs[0].shape
        last = (-1,) if sizes is None else (-1, len(sizes) - 1)
        return node if twice and node.attributes.get_int("axis", 0) in last else None
    single = node.op_type in ONE_BY_ONE or (node.op_type in SCALED and _is_number(node.inputs[1]))
    return _joined(node.inputs[0]) if single else None


def _half(value: ir.Value, halves: dict[ir.Value, ir.Value]) -> ir.Value:
    """The first half of angles that are it twice, [B,S,d/2]; what they are made by is done to the half, once."""
    node = value.producer()
    assert node is not None
    first = node.inputs[0]
    assert first is not None
    if node.op_type == "Concat":
        return first
    if value not in halves:
        half = before(node, node.op_type, [_half(first, halves), *node.inputs[1:]], **node.attributes)
        half.type, half.shape = value.type, _joined(value).inputs[0].shape  # type: ignore[union-attr]
        halves[value] = half
    return halves[value]


class HeadsTogether(ir.passes.InPlacePass):
    """Give the decoder's attention rows of all heads side by side, where nothing else reads the split ones."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        changed = False
        for node in list(model.graph.all_nodes()):
            if node.op_type == "Attention" and not node.domain and len(node.outputs) > 1:
                changed |= _join(node)
        return ir.passes.PassResult(model, changed)


def _join(node: ir.Node) -> bool:
    """Rewrite one attention, all of its three inputs and its output or nothing."""
    sources = [source for value in node.inputs[:3] if (source := _together(value)) is not None]
    merged = only_joined(node.outputs[0])
    if merged is None or len(sources) != 3:
        return False
    graph = node.graph
    assert graph is not None
    old = list(node.inputs[:3])
    heads = []
    for i, (rows, rotary, count) in enumerate(sources):
        heads.append(count)
        x = _flat(node, rows)
        if rotary is None:
            node.replace_input_with(i, x)
            continue
        new = ir.node("RotaryEmbedding", [x, *rotary.inputs[1:]], {"num_heads": count})
        new.outputs[0].type, new.outputs[0].shape, new.name = x.type, x.shape, f"{rotary.name}_together"
        graph.insert_before(node, new)
        node.replace_input_with(i, new.outputs[0])
        _views_of(new.outputs[0], old[i])
    node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", heads[0])
    node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", heads[1])
    node.outputs[0].shape = merged.shape
    ir.convenience.replace_all_uses_with(merged, node.outputs[0])
    remove_unread([merged.producer(), *(value.producer() for value in old if value is not None)])
    return True


def _views_of(rows_first: ir.Value, heads_first: ir.Value | None) -> None:
    """What else reads split heads reads them behind the one rotation; only what follows it in the graph may."""
    assert heads_first is not None
    users = [(user, at) for user, at in heads_first.uses()]
    rotation, sizes = rows_first.producer(), heads_first.shape
    assert rotation is not None
    graph = rotation.graph
    assert graph is not None
    if not users or sizes is None or heads_first.is_graph_output():
        return
    places = {id(node): place for place, node in enumerate(graph)}
    if any(places.get(id(user), -1) < places[id(rotation)] for user, _ in users):
        return
    for user, at in users:
        turned = split(user, rows_first, int(sizes[1]), int(sizes[3]))  # type: ignore[arg-type]
        turned.type, turned.shape = heads_first.type, sizes
        user.replace_input_with(at, turned)


def _flat(node: ir.Node, source: ir.Value) -> ir.Value:
    """[B,S,H·d] of [B,S,H,d] in front of a node, or of itself."""
    sizes = source.shape
    assert sizes is not None
    if len(sizes) == 3:
        return source
    width = int(sizes[2]) * int(sizes[3])  # type: ignore[arg-type]
    flat = before(node, "Reshape", [source, constant(node, [0, 0, width])])
    flat.type, flat.shape = source.type, ir.Shape([*sizes[:2], width])
    return flat


def _together(value: ir.Value | None) -> tuple[ir.Value, ir.Node | None, int] | None:
    """x [B,S,H·d] behind a split value, or [B,S,H,d] where heads are normed first; a rotation on the way; and H."""
    rotary = made_by(value, "RotaryEmbedding")
    turned = rotary.inputs[0] if rotary else value
    apart = turned_from(turned)
    count = turned.shape[1] if turned is not None and turned.shape is not None else None
    if apart is None or not isinstance(count, int):
        return None
    if x := split_from(apart):
        return x, rotary, count
    sizes = apart.shape
    if sizes is None or len(sizes) != 4 or sizes[2] != count or not isinstance(sizes[3], int):
        return None
    return apart, rotary, count


def _ints(value: ir.Value | None) -> list[int] | None:
    held = value.const_value if value is not None else None
    return [int(x) for x in held.numpy().reshape(-1)] if held is not None and held.size <= 8 else None


def _is_number(value: ir.Value | None) -> bool:
    held = value.const_value if value is not None else None
    return held is not None and held.size == 1


def _bounds(node: ir.Node, rank: int) -> tuple[int, int] | tuple[None, None]:
    """First and end of a slice of the last axis by steps of 1."""
    first, end, axes, steps = (_ints(value) for value in (*node.inputs[1:5], *[None] * 4)[:4])
    if not first or not end or axes not in ([rank - 1], [-1]) or steps not in ([1], None):
        return None, None
    return first[0], end[0]

"""Heads split from rows and put together again, as the exporter writes it and as passes look for it.

Legend: B batch, S rows, H heads, D head width.

    together [B,S,H·D]  ⇄ Reshape ⇄  apart [B,S,H,D]  ⇄ Transpose ⇄  turned [B,H,S,D]
"""

from __future__ import annotations

import onnx_ir as ir

from graphs.lowering.edit import before, constant, made_by, only_user

TURN = (0, 2, 1, 3)


def is_turn(node: ir.Node) -> bool:
    """Whether a node swaps rows and heads."""
    return node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm") or ()) == TURN


def turned_from(turned: ir.Value | None) -> ir.Value | None:
    """What [B,H,S,D] was as [B,S,H,D]."""
    maker = made_by(turned, "Transpose")
    return maker.inputs[0] if maker is not None and is_turn(maker) else None


def split_from(apart: ir.Value | None) -> ir.Value | None:
    """What [B,S,H,D] was as [B,S,H·D]."""
    maker = made_by(apart, "Reshape")
    together = maker.inputs[0] if maker is not None else None
    return together if together is not None and together.shape is not None and len(together.shape) == 3 else None


def only_joined(turned: ir.Value) -> ir.Value | None:
    """What is made of [B,H,S,D] alone, by way of [B,S,H,D]: [B,S,H·D], or another view."""
    turn = only_user(turned, "Transpose")
    view = only_user(turn.outputs[0], "Reshape") if turn is not None and is_turn(turn) else None
    return view.outputs[0] if view is not None else None


def split(node: ir.Node, together: ir.Value, heads: int, width: int) -> ir.Value:
    """[B,H,S,D] of [B,S,H·D], in front of a node."""
    apart = before(node, "Reshape", [together, constant(node, [0, 0, heads, width])])
    return before(node, "Transpose", [apart], perm=TURN)


def heads_and_width(turned: ir.Value) -> tuple[int, int] | None:
    """H and D of [B,H,S,D], where both are known."""
    if turned.shape is None or len(turned.shape) != 4:
        return None
    heads, width = turned.shape[1], turned.shape[3]
    return (heads, width) if isinstance(heads, int) and isinstance(width, int) else None

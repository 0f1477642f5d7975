"""Canonical attention → what TensorRT parses: the cache grown by Concat, one output, an explicit boolean mask.

Legend: B batch, H query heads, V key-value heads, S rows, P past rows, T = P + S keys, D head width.

    present = Concat(past, chunk),   out = Attention(q, present_k, present_v, visible),   visible[s, t] = t ≤ s + T − S

The mask is written out because ONNX aligns ``is_causal`` without a ``past_key`` upper-left, and so does TensorRT-RTX:
a one-output node that kept the flag would see the first key only at decode. Attentions of equal S and P share a mask.
Source: ONNX Attention-23; TensorRT-RTX 1.7's parser, which takes Attention nodes of exactly one output.
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from graphs.lowering.edit import before, takes_over

PAST_K, PAST_V, MASK = 4, 5, 3
KEPT_ATTRIBUTES = ("scale", "softcap", "softmax_precision", "q_num_heads", "kv_num_heads")


class ExplicitMask(ir.passes.InPlacePass):
    """Rewrite every ``Attention`` that is causal on top of a past; others of one output are left as they are.

    ensures: no Attention has more than one output, a past or ``is_causal``. Raises PassError for one that is causal
    without a past or that already has a mask, for neither is what the exporter writes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        masks: dict[tuple[str, str], ir.Value] = {}
        found = [node for node in model.graph.all_nodes() if is_canonical(node)]
        for node in found:
            _rewrite(node, masks)
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No attention is left whose causality a parser could misread."""
        for node in model.graph.all_nodes():
            if node.op_type == "Attention" and (len(node.outputs) > 1 or _is_causal(node)):
                raise ir.passes.PostconditionError(f"{node.name} is causal or has {len(node.outputs)} outputs")


def is_canonical(node: ir.Node) -> bool:
    """Whether a node is the exporter's attention with a cache."""
    return node.domain == "" and node.op_type == "Attention" and len(node.outputs) > 1


def _is_causal(node: ir.Node) -> bool:
    return bool(node.attributes.get_int("is_causal", 0))


def _rewrite(node: ir.Node, masks: dict[tuple[str, str], ir.Value]) -> None:
    q, k, v = node.inputs[:3]
    past_k, past_v = (node.inputs[i] if i < len(node.inputs) else None for i in (PAST_K, PAST_V))
    if not (q and k and v and past_k and past_v) or node.inputs[MASK] or not _is_causal(node):
        raise ir.passes.PassError(f"{node.name} is no causal attention on top of a cache, so it cannot be lowered")
    graph, (out, *presents) = node.graph, node.outputs
    assert graph is not None
    grown = []
    for past, chunk, present in zip((past_k, past_v), (k, v), presents, strict=True):
        grown.append(takes_over(before(node, "Concat", [past, chunk], axis=2), present))
    mask = _mask_of(node, q, grown[0], (_length(q), _length(past_k)), masks)
    attributes = [node.attributes[name] for name in KEPT_ATTRIBUTES if name in node.attributes]
    lowered = ir.Node("", "Attention", [q, *grown, mask], attributes=attributes, num_outputs=1, name=node.name)
    graph.insert_before(node, lowered)
    takes_over(lowered.outputs[0], out)
    graph.remove(node, safe=True)


def _length(value: ir.Value) -> str:
    """The symbolic length of a [B,·,length,D] value, or a word of its own where it is not known."""
    size = None if value.shape is None or len(value.shape) < 3 else value.shape[2]
    known = size if isinstance(size, int) else getattr(size, "value", None)
    return f"of {value.name}" if known is None else str(known)


def _mask_of(
    node: ir.Node, q: ir.Value, k: ir.Value, lengths: tuple[str, str], masks: dict[tuple[str, str], ir.Value]
) -> ir.Value:
    """visible bool [1,1,S,T]: built in front of the first node of these lengths, reused by the others."""
    if lengths not in masks:
        op = partial(before, node)
        zero, one = (op("Constant", [], value_int=x) for x in (0, 1))
        rows, keys = (op("Squeeze", [op("Shape", [x], start=2, end=3)]) for x in (q, k))
        key_T = op("Range", [zero, keys, one])
        row_S = op("Range", [op("Sub", [keys, rows]), keys, one])
        visible_ST = op("LessOrEqual", [key_T, op("Unsqueeze", [row_S, op("Constant", [], value_ints=[1])])])
        masks[lengths] = op("Unsqueeze", [visible_ST, op("Constant", [], value_ints=[0, 1])])
        masks[lengths].name = f"visible_{len(masks) - 1}"
        masks[lengths].type = ir.TensorType(ir.DataType.BOOL)
        masks[lengths].shape = ir.Shape([1, 1, *lengths_as_dims(q, k)])
    return masks[lengths]


def lengths_as_dims(q: ir.Value, k: ir.Value) -> list[int | str | None]:
    """S and T as a shape says them; None where it does not."""
    dims = [v.shape[2] if v.shape is not None else None for v in (q, k)]
    return [d if isinstance(d, int) else getattr(d, "value", None) for d in dims]

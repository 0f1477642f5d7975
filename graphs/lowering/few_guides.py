"""What rows of a buffer receive from few guide rows, for ONNX Runtime's CPU: ReceivedInCache in seven nodes.

Legend: H query heads, V key-value heads, S rows, C rows of the buffer, D head width, G guide rows.

    If (G ≤ 64):  received [C] = Σ_h Σ_g softmax(scale · q[S − G + g] · kᵀ + hidden)
    else:         ReceivedInCache

The op's body works out its lengths and its mask in every layer, and walks the guide rows in a Loop: forty nodes and the
Loop's own, which in a small model cost as much as the layer. Here lengths and mask are those of the segment, made once,
and a question's rows are one piece. Rows of the buffer that are not filled must hold numbers, any, as in
``graphs.lowering.one_row``. Figures: benchmarks/LOG.md. Source: ONNX If; com.microsoft's FusedMatMul.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphs.lowering.edit import MICROSOFT, Branch, before, choose, constant, with_else_branches
from graphs.lowering.grouped import LAST, PAST_K, Q
from graphs.lowering.one_row import RECEIVED_OVER_CACHE, is_rated
from graphs.ops import DOMAIN
from graphs.ops.attention_received import PIECE

GUIDES = 2  # input of ReceivedInCache: the carrier [G], or the rows' weights [1, G]


@dataclass(frozen=True)
class _Guides:
    """What the layers of a segment share.

    few: bool []. start, end: of the guide rows among all, int64 [1]. shape: of the map, [1, H, G, C]. hidden: what is
    added to it, fp32 [G, C], 0 where a row sees a key and −inf elsewhere. Of G no more than 64 rows.
    """

    few: ir.Value
    start: ir.Value
    end: ir.Value
    shape: ir.Value
    hidden: ir.Value


class FewGuides(ir.passes.InPlacePass):
    """Give every ReceivedInCache of a GroupQueryAttention, also in an else-branch, a form for few guide rows."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; what stands deeper is left as it is."""
        shared: dict[tuple[object, ...], _Guides] = {}
        changed = False
        for top, node in with_else_branches(model.graph):
            attention = _attention_of(node)
            if attention is None:
                continue
            heads = attention.attributes.get_int("num_heads", 0)
            key = (attention.inputs[LAST], node.inputs[GUIDES], heads)
            if key not in shared:
                shared[key] = _guides(top, node, attention, heads)
            _rewrite(node, shared[key])
            changed = True
        return ir.passes.PassResult(model, changed)


def _attention_of(node: ir.Node) -> ir.Node | None:
    """The GroupQueryAttention whose keys this node says what they receive."""
    keys = node.inputs[1] if node.domain == DOMAIN and node.op_type in RECEIVED_OVER_CACHE else None
    maker = keys.producer() if keys is not None else None
    return maker if maker is not None and maker.op_type == "GroupQueryAttention" else None


def _guides(top: ir.Node, node: ir.Node, attention: ir.Node, heads: int) -> _Guides:
    """In front of the decoder's own node that holds the segment's first attention."""
    axis = 1 if is_rated(node) else 0
    every = before(top, "Shape", [node.inputs[GUIDES]], start=axis, end=axis + 1)
    few = before(top, "Squeeze", [before(top, "LessOrEqual", [every, constant(top, [PIECE])])])
    few.type, few.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
    count = before(top, "Min", [every, constant(top, [PIECE])])
    end = before(top, "Shape", [attention.inputs[Q]], start=1, end=2)
    keys = before(top, "Shape", [attention.inputs[PAST_K]], start=2, end=3)
    shape = before(top, "Concat", [constant(top, [1, heads]), count, keys], axis=0)
    zero, one = constant(top, 0), constant(top, 1)
    wide = before(top, "Cast", [attention.inputs[LAST]], to=ir.DataType.INT64.value)
    last = before(top, "Reshape", [wide, constant(top, [1])])
    first_end = before(top, "Sub", [before(top, "Add", [last, constant(top, [1])]), count])
    row_G = before(top, "Range", [zero, before(top, "Squeeze", [count]), one])
    last_G1 = before(top, "Unsqueeze", [before(top, "Add", [row_G, first_end]), constant(top, [1])])
    key_C = before(top, "Range", [zero, before(top, "Squeeze", [keys]), one])
    seen_GC = before(top, "LessOrEqual", [key_C, last_G1])
    shown = before(top, "Constant", [], value_float=0.0)
    none = before(top, "Constant", [], value_float=float("-inf"))
    return _Guides(few, before(top, "Sub", [end, count]), end, shape, before(top, "Where", [seen_GC, shown, none]))


def _rewrite(node: ir.Node, guides: _Guides) -> None:
    name = node.name or str(node.outputs[0].name)
    few = _few(node, guides, f"{name}/few_guides")
    node.name = f"{name}/many_guides"
    choose([node], node.outputs, guides.few, few, f"{name}/guides", node.name)


def _few(node: ir.Node, guides: _Guides, name: str) -> ir.Graph:
    q_1HSD, k_1VCD, told = node.inputs[:3]
    assert k_1VCD is not None
    assert k_1VCD.shape is not None
    groups, width = int(k_1VCD.shape[1]), int(k_1VCD.shape[3])  # type: ignore[arg-type]
    branch = Branch(name)
    asked_1HGD = branch.add("Slice", [q_1HSD, guides.start, guides.end, branch.ints(2)])
    asked_1VRD = branch.add("Reshape", [asked_1HGD, branch.ints(1, groups, -1, width)])
    scale = node.attributes["scale"].value
    logit_1VRC = branch.add("FusedMatMul", [asked_1VRD, k_1VCD], MICROSOFT, transB=1, alpha=scale)
    logit_1HGC = branch.add("Reshape", [logit_1VRC, guides.shape])
    share_1HGC = branch.add("Softmax", [branch.add("Add", [logit_1HGC, guides.hidden])], axis=-1)
    if is_rated(node):
        share_1HGC = branch.add("Mul", [share_1HGC, branch.add("Reshape", [told, branch.ints(-1, 1)])])
    received_1C = branch.add("ReduceSum", [share_1HGC, branch.ints(1, 2)], keepdims=0)
    received_1C.type, received_1C.shape = node.outputs[0].type, node.outputs[0].shape
    return ir.Graph([], [received_1C], nodes=branch.nodes, name=name)

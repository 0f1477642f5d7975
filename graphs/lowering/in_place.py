"""Canonical attention → a cache of fixed capacity that is written in place, for runtimes that bind it to one buffer.

Legend: B batch, H query heads, V key-value heads, S rows, C rows of the buffer, D head width, j segment.

    present[length_j + s] = chunk[s],   out = attention of row s over present[t],   t ≤ length_j + s

``scattered``: TensorScatter (opset 24) and a one-output Attention with a boolean mask, which is what TensorRT's parser
makes a KV_CACHE_UPDATE layer and a fused attention of; rows that are not filled must hold numbers, any, for what the
mask hides is multiplied by zero. ``grouped``: com.microsoft's GroupQueryAttention, which ONNX Runtime's CPU runs in
place where past and present are one OrtValue, at the cost of the filled rows and not of the capacity.
Received attention is that of the filled rows (``graphs.ops.received_in_cache``), and its sum goes on from an input.
Source: ONNX TensorScatter-24 and Attention-23.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from graphs.lowering.attention import KEPT_ATTRIBUTES, PAST_K, PAST_V, is_canonical
from graphs.lowering.edit import MICROSOFT, before, constant, takes_over
from graphs.lowering.few_guides import FewGuides
from graphs.lowering.grouped import HEAD_WIDTHS, Segment, attend, heads_together
from graphs.lowering.many_rows import ManyRows
from graphs.lowering.one_row import OneRow
from graphs.ops import DOMAIN, OPS, OVER_CACHE, RECEIVED
from graphs.plan import PruningPlan
from graphs.spec import RECEIVED_BEFORE, length_name

By = Literal["scattered", "grouped"]
OPSET = 24
GUIDANCE = "attention_received"


def refusal(plan: PruningPlan) -> str:
    """Why a decoder with this plan keeps its concatenated cache; '' where it need not."""
    if any(point.score == "preview" for point in plan.points):
        return "its plan asks a layer about rows that do not enter that layer's cache"
    return ""


class CacheInPlace(ir.passes.InPlacePass):
    """Rewrite every canonical attention, what reads its cache's length, and what says which row received how much.

    Adds ``length_j`` int64 [1] per segment, and ``received_before`` fp32 [1,C_0] where the graph gives guidance.
    capacity: C of every segment, which TensorRT wants to know when the network is made; None: each its own, C_j, known
    when it is run. Raises PassError where the graph is not what the exporter writes.
    """

    def __init__(self, by: By, capacity: int | None = None) -> None:
        super().__init__()
        self.by, self.capacity = by, capacity

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; a graph without a cache is left as it is."""
        attentions = [node for node in model.graph if is_canonical(node)]
        if not attentions:
            return ir.passes.PassResult(model, False)
        _Rewriting(model, self.by, self.capacity).run(attentions)
        model.graph.opset_imports[""] = OPSET
        for function in model.functions.values():
            function.opset_imports[""] = OPSET
        return ir.passes.PassResult(model, True)


class _Rewriting:
    def __init__(self, model: ir.Model, by: By, capacity: int | None) -> None:
        self.model, self.graph, self.by, self.capacity = model, model.graph, by, capacity
        self.segments: dict[str, Segment] = {}

    def run(self, attentions: list[ir.Node]) -> None:
        for node in attentions:
            past_k, past_v = (node.inputs[i] if i < len(node.inputs) else None for i in (PAST_K, PAST_V))
            if not past_k or not past_v or node.inputs[3] or not node.attributes.get_int("is_causal", 0):
                raise ir.passes.PassError(f"{node.name} is no causal attention on top of a cache")
            segment = self._segment(past_k)
            # A segment's length is read where torch found its symbol, which is any of its layers' keys or values.
            for shape in [user for past in (past_k, past_v) for user, _ in past.uses() if user.op_type == "Shape"]:
                self._chunk_rows_only(shape, node, segment)
            if others := [past.name for past in (past_k, past_v) for user, _ in past.uses() if user is not node]:
                raise ir.passes.PassError(f"{others[0]} is read by more than its layer's attention")
            received = [u for out in node.outputs[1:] for u, _ in out.uses() if u.op_type in RECEIVED]
            presents = self._scattered(node, segment) if self.by == "scattered" else attend(node, segment)
            for past, present in zip((past_k, past_v), presents, strict=True):
                heads, width = past.shape[1], past.shape[3]  # type: ignore[index]
                past.shape = ir.Shape([1, heads, segment.capacity, width])
                present.shape = ir.Shape([1, heads, segment.capacity, width])
            for user in received:
                self._received(user, segment)
            self.graph.remove(node, safe=True)
        self._going_on()
        if self.by == "grouped":
            self.graph.opset_imports[MICROSOFT] = 1

    def _segment(self, past: ir.Value) -> Segment:
        """The segment of a past [1,V,P_j,D], told by the name of its length."""
        symbol = str(getattr(past.shape[2], "value", "")) if past.shape is not None else ""
        _, _, number = symbol.partition("P_")
        if not number.isdigit():
            raise ir.passes.PassError(f"the length of {past.name} is {symbol or 'not named'}, not P_ and a number")
        if symbol not in self.segments:
            length = _value(length_name(int(number)), ir.DataType.INT64, [1])
            self.graph.inputs.append(length)
            self.segments[symbol] = Segment(length, self.capacity or f"C_{number}", {})
        return self.segments[symbol]

    def _scattered(self, node: ir.Node, segment: Segment) -> list[ir.Value]:
        q, k, v, _, past_k, past_v = node.inputs[:6]
        presents = []
        for past, chunk, present in zip((past_k, past_v), (k, v), node.outputs[1:], strict=True):
            scatter = before(node, "TensorScatter", [past, chunk, segment.length], axis=2)
            presents.append(takes_over(scatter, present))
        attributes = {a: node.attributes[a].value for a in KEPT_ATTRIBUTES if a in node.attributes}
        mask = self._mask(node, segment, presents[0])
        out = before(node, "Attention", [q, *presents, mask], **attributes)
        takes_over(out, node.outputs[0])
        maker = out.producer()
        assert maker is not None
        maker.name = node.name
        return presents

    def _mask(self, node: ir.Node, segment: Segment, present: ir.Value) -> ir.Value:
        """visible bool [1,1,S,C]: built in front of the segment's first attention, reused by the others."""
        if "mask" not in segment.shared:
            q = node.inputs[0]
            zero, one = constant(node, 0), constant(node, 1)
            ends = []
            for value in (q, node.inputs[PAST_K]):
                size = before(node, "Shape", [value], start=2, end=3)
                ends.append(before(node, "Squeeze", [size]))
            row_S = before(node, "Range", [zero, ends[0], one])
            key_C = before(node, "Range", [zero, ends[1], one])
            last_S = before(node, "Add", [row_S, segment.length])
            last_11S1 = before(node, "Unsqueeze", [last_S, constant(node, [0, 1, 3])])
            key_111C = before(node, "Unsqueeze", [key_C, constant(node, [0, 1, 2])])
            mask = before(node, "LessOrEqual", [key_111C, last_11S1])
            mask.name = str(segment.length.name).replace("length_", "visible_")
            rows = q.shape[2] if q is not None and q.shape is not None else None
            mask.type, mask.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([1, 1, rows, segment.capacity])
            segment.shared["mask"] = mask
        return segment.shared["mask"]

    def _chunk_rows_only(self, shape: ir.Node, attention: ir.Node, segment: Segment) -> None:
        """What slices received attention behind the past: the chunk's rows are gathered instead."""
        for user, at in list(shape.outputs[0].uses()):
            source = user.inputs[0].producer() if user.op_type == "Slice" and user.inputs[0] is not None else None
            if at != 1 or source is None or source.op_type not in RECEIVED:
                raise ir.passes.PassError(f"{user.name} reads the length of a cache in a way that is not known")
            axis = 1 if heads_together(attention) else 2
            size = before(user, "Shape", [attention.inputs[1]], start=axis, end=axis + 1)
            rows = before(user, "Squeeze", [size])
            row_S = before(user, "Range", [constant(user, 0), rows, constant(user, 1)])
            index = before(user, "Add", [row_S, segment.length])
            chunk = before(user, "Gather", [user.inputs[0], index], axis=1)
            takes_over(chunk, user.outputs[0])
            self.graph.remove(user, safe=True)
        self.graph.remove(shape, safe=True)

    def _received(self, node: ir.Node, segment: Segment) -> None:
        op = OPS[OVER_CACHE[node.op_type]]
        function = ir.serde.deserialize_function(op.function)
        self.model.functions[function.identifier()] = function
        attributes = {name: a.value for name, a in node.attributes.items()}
        made = ir.node(
            op.name, [*node.inputs, segment.length], attributes, domain=DOMAIN, num_outputs=1, name=node.name
        )
        self.graph.insert_before(node, made)
        new = takes_over(made.outputs[0], node.outputs[0])
        new.shape = ir.Shape([1, segment.capacity])
        old = node.op_identifier()
        self.graph.remove(node, safe=True)
        if not any(other.op_identifier() == old for other in self.graph):
            self.model.functions.pop(old, None)

    def _going_on(self) -> None:
        """Guidance goes on from what earlier steps received."""
        for i, value in enumerate(self.graph.outputs):
            if value.name != GUIDANCE:
                continue
            maker = value.producer()
            assert maker is not None
            capacity = self.segments["P_0"].capacity
            before = _value(RECEIVED_BEFORE, ir.DataType.FLOAT, [1, capacity])
            self.graph.inputs.append(before)
            added = ir.node("Add", [before, value], num_outputs=1)
            self.graph.insert_after(maker, added)
            value.name = f"{GUIDANCE}_now"
            value.shape = ir.Shape([1, capacity])
            self.graph.outputs[i] = added.outputs[0]
            new = added.outputs[0]
            new.name, new.type, new.shape = GUIDANCE, value.type, value.shape


def _value(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def grouped(model: ir.Model) -> bool:
    """Let a canonical decoder of fp32 write its caches in place by GroupQueryAttention; False where it is none.

    A decode step has a form of its own where that is cheaper (``graphs.lowering.one_row``), and so have what few guide
    rows give (``graphs.lowering.few_guides``) and other chunks, by their size (``graphs.lowering.many_rows``).
    False too, and no change, for heads of a width that the operator does not take, and for a plan that cannot have it
    so: a layer's keys are then read before it runs.
    """
    found = [node for node in model.graph if is_canonical(node)]
    caches = [node.inputs[at] for node in found for at in (PAST_K, PAST_V)]
    for cache in caches:
        width = cache.shape[3] if cache is not None and cache.shape is not None else None
        if cache is None or cache.dtype != ir.DataType.FLOAT or not isinstance(width, int) or width % HEAD_WIDTHS:
            return False
        if any(user.op_type == "Concat" for user, _ in cache.uses()):
            return False
    if found:
        CacheInPlace("grouped")(model)
        OneRow()(model)
        FewGuides()(model)
        ManyRows()(model)
    return bool(found)

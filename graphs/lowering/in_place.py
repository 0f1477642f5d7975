"""Canonical attention → a cache of fixed capacity that is written in place, for runtimes that bind it to one buffer.

Legend: B batch, H query heads, V key-value heads, S rows, C rows of the buffer, D head width, j segment.

    present[length_j + s] = chunk[s],   out = attention of row s over present[t],   t ≤ length_j + s

``scattered``: TensorScatter (opset 24) and a one-output Attention with a boolean mask, which is what TensorRT's parser
makes a KV_CACHE_UPDATE layer and a fused attention of; rows that are not filled must hold numbers, any, for what the
mask hides is multiplied by zero. ``grouped``: com.microsoft's GroupQueryAttention, which ONNX Runtime's CPU runs in
place where past and present are one OrtValue, at the cost of the filled rows and not of the capacity.
Received attention is that of the filled rows (``graphs.ops.received_in_cache``), and its sum goes on from an input.
Source: ONNX TensorScatter-24 and Attention-23; ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from graphs.lowering.attention import KEPT_ATTRIBUTES, PAST_K, PAST_V, is_canonical
from graphs.ops import DOMAIN, OPS
from graphs.plan import PruningPlan
from graphs.spec import RECEIVED_BEFORE, length_name

By = Literal["scattered", "grouped"]
OPSET = 24
CONTRIB = "com.microsoft"
HEAD_WIDTHS = 8  # GroupQueryAttention takes multiples of it
RECEIVED = {"AttentionReceived": "ReceivedInCache", "RatedAttentionReceived": "RatedReceivedInCache"}
GUIDANCE = "attention_received"
ALL_HEADS_LAST = (0, 2, 1, 3)  # [B,H,S,D] ↔ [B,S,H,D]


def refusal(plan: PruningPlan) -> str:
    """Why a decoder with this plan keeps its concatenated cache; '' where it need not."""
    if any(point.score == "preview" for point in plan.points):
        return "its plan asks a layer about rows that do not enter that layer's cache"
    return ""


def grouped(model: ir.Model) -> bool:
    """Let a canonical decoder of fp32 write its caches in place by GroupQueryAttention; False where it is none.

    False too, and no change, for heads of a width that the operator does not take, and for a plan that cannot have it
    so: a layer's keys are then read before it runs.
    """
    found = [node for node in model.graph if is_canonical(node)]
    caches = [node.inputs[at] for node in found for at in (PAST_K, PAST_V)]
    if not found or any(cache is None or cache.dtype != ir.DataType.FLOAT or not cache.shape for cache in caches):
        return False
    if any(int(cache.shape[3]) % HEAD_WIDTHS for cache in caches if cache and cache.shape):  # type: ignore[arg-type]
        return False
    if any(user.op_type == "Concat" for cache in caches if cache for user, _ in cache.uses()):
        return False
    CacheInPlace("grouped")(model)
    return True


@dataclass
class _Segment:
    """What the layers of one segment share: how many rows are filled, and what follows from it, made once."""

    length: ir.Value
    capacity: int | str
    shared: dict[str, ir.Value]


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
        self.segments: dict[str, _Segment] = {}

    def run(self, attentions: list[ir.Node]) -> None:
        for node in attentions:
            past_k, past_v = (node.inputs[i] if i < len(node.inputs) else None for i in (PAST_K, PAST_V))
            if not past_k or not past_v or node.inputs[3] or not node.attributes.get_int("is_causal", 0):
                raise ir.passes.PassError(f"{node.name} is no causal attention on top of a cache")
            segment = self._segment(past_k)
            for shape in [user for user, _ in past_k.uses() if user.op_type == "Shape"]:
                self._chunk_rows_only(shape, node, segment)
            received = [u for out in node.outputs[1:] for u, _ in out.uses() if u.op_type in RECEIVED]
            presents = self._scattered(node, segment) if self.by == "scattered" else self._grouped(node, segment)
            for past, present in zip((past_k, past_v), presents, strict=True):
                heads, width = past.shape[1], past.shape[3]  # type: ignore[index]
                past.shape = ir.Shape([1, heads, segment.capacity, width])
                present.shape = ir.Shape([1, heads, segment.capacity, width])
                if any(user.op_type == "Concat" for user, _ in past.uses()):
                    raise ir.passes.PassError(f"{past.name} is read by more than its layer's attention")
            for user in received:
                self._received(user, segment)
            self.graph.remove(node, safe=True)
        self._going_on()
        if self.by == "grouped":
            self.graph.opset_imports[CONTRIB] = 1

    def _segment(self, past: ir.Value) -> _Segment:
        """The segment of a past [1,V,P_j,D], told by the name of its length."""
        symbol = str(getattr(past.shape[2], "value", "")) if past.shape is not None else ""
        _, _, number = symbol.partition("P_")
        if not number.isdigit():
            raise ir.passes.PassError(f"the length of {past.name} is {symbol or 'not named'}, not P_ and a number")
        if symbol not in self.segments:
            length = _value(length_name(int(number)), ir.DataType.INT64, [1])
            self.graph.inputs.append(length)
            self.segments[symbol] = _Segment(length, self.capacity or f"C_{number}", {})
        return self.segments[symbol]

    def _scattered(self, node: ir.Node, segment: _Segment) -> list[ir.Value]:
        q, k, v, _, past_k, past_v = node.inputs[:6]
        presents = []
        for past, chunk, present in zip((past_k, past_v), (k, v), node.outputs[1:], strict=True):
            [scatter] = self._before(node, "TensorScatter", [past, chunk, segment.length], axis=2)
            presents.append(_takes_over(scatter, present))
        attributes = {a: node.attributes[a].value for a in KEPT_ATTRIBUTES if a in node.attributes}
        mask = self._mask(node, segment, presents[0])
        [out] = self._before(node, "Attention", [q, *presents, mask], **attributes)
        _takes_over(out, node.outputs[0])
        maker = out.producer()
        assert maker is not None
        maker.name = node.name
        return presents

    def _mask(self, node: ir.Node, segment: _Segment, present: ir.Value) -> ir.Value:
        """visible bool [1,1,S,C]: built in front of the segment's first attention, reused by the others."""
        if "mask" not in segment.shared:
            q = node.inputs[0]
            zero, one = self._constant(node, 0), self._constant(node, 1)
            ends = []
            for value in (q, node.inputs[PAST_K]):
                [size] = self._before(node, "Shape", [value], start=2, end=3)
                ends += self._before(node, "Squeeze", [size])
            [row_S] = self._before(node, "Range", [zero, ends[0], one])
            [key_C] = self._before(node, "Range", [zero, ends[1], one])
            [last_S] = self._before(node, "Add", [row_S, segment.length])
            [last_11S1] = self._before(node, "Unsqueeze", [last_S, self._constant(node, [0, 1, 3])])
            [key_111C] = self._before(node, "Unsqueeze", [key_C, self._constant(node, [0, 1, 2])])
            [mask] = self._before(node, "LessOrEqual", [key_111C, last_11S1])
            mask.name = str(segment.length.name).replace("length_", "visible_")
            rows = q.shape[2] if q is not None and q.shape is not None else None
            mask.type, mask.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([1, 1, rows, segment.capacity])
            segment.shared["mask"] = mask
        return segment.shared["mask"]

    def _grouped(self, node: ir.Node, segment: _Segment) -> list[ir.Value]:
        q, k, v, _, past_k, past_v = node.inputs[:6]
        assert q
        assert k
        assert v
        before, filled = self._filled(node, segment)
        names = {"scale", "softcap"} & set(node.attributes)
        attributes = {name: node.attributes[name].value for name in sorted(names)}
        if _heads_together(node):
            flat, counts = [q, k, v], [node.attributes[n].value for n in ("q_num_heads", "kv_num_heads")]
        elif q.shape and k.shape:
            flat, counts = [self._rows_first(node, value) for value in (q, k, v)], [int(x.shape[1]) for x in (q, k)]  # type: ignore[index, arg-type]
        else:
            raise ir.passes.PassError(f"{node.name} has no shapes")
        made = ir.node(
            "GroupQueryAttention",
            [*flat, past_k, past_v, before, filled],
            attributes | dict(zip(("num_heads", "kv_num_heads"), counts, strict=True)),
            domain=CONTRIB,
            num_outputs=3,
            name=node.name,
        )
        self.graph.insert_before(node, made)
        if _heads_together(node):
            _takes_over(made.outputs[0], node.outputs[0])
        else:
            self._heads_first(node, made.outputs[0])
        return [_takes_over(new, old) for new, old in zip(made.outputs[1:], node.outputs[1:], strict=True)]

    def _rows_first(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """[B,H,S,D] as [B,S,H·D]: what it was made of by a reshape and a transpose, or turned back."""
        maker = value.producer()
        if maker is not None and _is_turn(maker):
            view = maker.inputs[0].producer() if maker.inputs[0] is not None else None
            rows = view.inputs[0] if view is not None and view.op_type == "Reshape" else None
            if rows is not None and rows.shape is not None and len(rows.shape) == 3:
                return rows
        [turned] = self._before(node, "Transpose", [value], perm=ALL_HEADS_LAST)
        heads, head_width = _heads(value)
        width = heads * head_width
        [flat] = self._before(node, "Reshape", [turned, self._constant(node, [0, 0, width])])
        return flat

    def _heads_first(self, node: ir.Node, flat: ir.Value) -> None:
        """Hand [B,S,H·D] to who read the attention's [B,H,S,D]: as it is behind a transpose and a reshape."""
        old = node.outputs[0]
        users = [user for user, _ in old.uses()]
        behind = [u for user in users if _is_turn(user) for u, _ in user.outputs[0].uses()]
        if all(_is_turn(user) for user in users) and all(u.op_type == "Reshape" for u in behind):
            for reshape in behind:
                _takes_over(flat, reshape.outputs[0])
                self.graph.remove(reshape, safe=True)
            for user in users:
                self.graph.remove(user, safe=True)
            return
        [apart] = self._before(node, "Reshape", [flat, self._constant(node, [0, 0, *_heads(old)])])
        [turned] = self._before(node, "Transpose", [apart], perm=ALL_HEADS_LAST)
        _takes_over(turned, old)

    def _filled(self, node: ir.Node, segment: _Segment) -> tuple[ir.Value, ir.Value]:
        """seqlens_k int32 [1,1] = filled − 1, and total_sequence_length int32 []: once per segment."""
        if "filled" not in segment.shared:
            axis = 1 if _heads_together(node) else 2
            [rows] = self._before(node, "Shape", [node.inputs[0]], start=axis, end=axis + 1)
            [sum_1] = self._before(node, "Add", [segment.length, rows])
            [filled] = self._before(node, "Cast", [sum_1], to=ir.DataType.INT32.value)
            [one] = self._before(node, "Cast", [self._constant(node, [[1]])], to=ir.DataType.INT32.value)
            [segment.shared["before"]] = self._before(node, "Sub", [filled, one])
            [segment.shared["filled"]] = self._before(node, "Squeeze", [filled])
        return segment.shared["before"], segment.shared["filled"]

    def _chunk_rows_only(self, shape: ir.Node, attention: ir.Node, segment: _Segment) -> None:
        """What slices received attention behind the past: the chunk's rows are gathered instead."""
        for user, at in list(shape.outputs[0].uses()):
            source = user.inputs[0].producer() if user.op_type == "Slice" and user.inputs[0] is not None else None
            if at != 1 or source is None or source.op_type not in RECEIVED:
                raise ir.passes.PassError(f"{user.name} reads the length of a cache in a way that is not known")
            axis = 1 if _heads_together(attention) else 2
            [size] = self._before(user, "Shape", [attention.inputs[1]], start=axis, end=axis + 1)
            [rows] = self._before(user, "Squeeze", [size])
            [row_S] = self._before(user, "Range", [self._constant(user, 0), rows, self._constant(user, 1)])
            [index] = self._before(user, "Add", [row_S, segment.length])
            [chunk] = self._before(user, "Gather", [user.inputs[0], index], axis=1)
            _takes_over(chunk, user.outputs[0])
            self.graph.remove(user, safe=True)
        self.graph.remove(shape, safe=True)

    def _received(self, node: ir.Node, segment: _Segment) -> None:
        op = OPS[RECEIVED[node.op_type]]
        function = ir.serde.deserialize_function(op.function)
        self.model.functions[function.identifier()] = function
        attributes = {name: a.value for name, a in node.attributes.items()}
        made = ir.node(
            op.name, [*node.inputs, segment.length], attributes, domain=DOMAIN, num_outputs=1, name=node.name
        )
        self.graph.insert_before(node, made)
        new = _takes_over(made.outputs[0], node.outputs[0])
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

    def _before(
        self, node: ir.Node, op_type: str, inputs: list[ir.Value | None], **attributes: object
    ) -> list[ir.Value]:
        made = ir.node(op_type, inputs, attributes, num_outputs=1)  # type: ignore[arg-type]
        self.graph.insert_before(node, made)
        return list(made.outputs)

    def _constant(self, node: ir.Node, value: int | list[int] | list[list[int]]) -> ir.Value:
        """An int64 constant, in front of a node."""
        [made] = self._before(node, "Constant", [], value=ir.tensor(value, dtype=ir.DataType.INT64))
        return made


def _heads_together(node: ir.Node) -> bool:
    """Whether an attention takes rows of all heads side by side, [B,S,H·D], and gives such."""
    return "q_num_heads" in node.attributes


def _heads(value: ir.Value) -> tuple[int, int]:
    """H and D of [B,H,S,D], which the exporter always knows."""
    heads, width = (value.shape[1], value.shape[3]) if value.shape is not None else (None, None)
    if not isinstance(heads, int) or not isinstance(width, int):
        raise ir.passes.PassError(f"{value.name} has no shape")
    return heads, width


def _is_turn(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ()) or ()) == ALL_HEADS_LAST


def _value(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _takes_over(new: ir.Value, old: ir.Value) -> ir.Value:
    """``new`` stands wherever ``old`` stood, under its name; ``old`` is left without a use."""
    name = old.name
    old.name = f"{name}_lowered"
    new.name, new.type, new.shape = name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    return new

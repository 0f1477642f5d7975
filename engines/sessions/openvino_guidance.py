"""Guidance from a decoder in OpenVINO: its graph gives the guide rows' queries, and what keys received follows later.

Legend: L layers that guide, H query heads, V key-value heads, S rows of a run, G guide rows (of one run or of several),
T keys, D head width.

Attention that appends to its cache in place gives the keys to no other node. Read in every step they would have to be
kept, and copied, a second time, which with the map's small nodes costs a seventh of a decode step. But nobody needs the
sum before the answer ends. So a run returns its guide rows' queries and its rows' keys, a few KB in a step, and one
product per layer of all runs' queries with all keys then gives Σ_l Σ_h Σ_g softmax(scale · q · kᵀ), each row up to its
own key: AttentionReceived's formula (``graphs.ops.attention_received``), in fp32. (A state's rows could be asked for
instead of keeping keys, but of a cache in bf16 they are converted one by one: 30 ms where all else takes 25.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import openvino as ov
from openvino import opset13 as ops

from engines.sessions.session import Later
from graphs.ops import DOMAIN
from graphs.ops.attention_received import PIECE

GUIDANCE, ASKED, TOLD = "attention_received", "asked", "told"


@dataclass(frozen=True)
class Guiding:
    """Which layers guide. pasts: cache input of each one's keys. heads: H. groups: V. width: D. scale: of logits."""

    pasts: tuple[str, ...]
    heads: int
    groups: int
    width: int
    scale: float


@dataclass(frozen=True, eq=False)
class Asked(Later):
    """What some runs' rows asked: an output ``attention_received`` that is made when it is brought to the host.

    Of each run that asked, queries: float32 [1, L·H, G, D], last: int64 [G], the last key that each row sees. keys:
    float32 [1, L·V, S, D] of every run so far, which together are the T of the newest.
    """

    queries: tuple[np.ndarray, ...]
    last: tuple[np.ndarray, ...]
    keys: tuple[np.ndarray, ...]

    def and_then(self, later: Asked) -> Asked:
        """These rows and those of a later run of the same conversation."""
        return Asked((*self.queries, *later.queries), (*self.last, *later.last), later.keys)


def ask_instead(graph: onnx.GraphProto) -> Guiding | None:
    """Let a canonical decoder return its guide rows' queries, [1, L·H, G, D], and its keys, [1, L·V, S, D], instead.

    None, and no change, where the output is no plain sum over layers of one number of heads.
    """
    outputs = [value for value in graph.output if value.name == GUIDANCE]
    maker = {name: node for node in graph.node for name in node.output}
    summed, received = _terms(GUIDANCE, maker) if outputs else ([], [])
    if not received:
        return None
    attention = {node.output[1]: node for node in graph.node if node.op_type == "Attention" and len(node.output) > 1}
    inputs = {value.name: value for value in graph.input}
    layers = [attention.get(node.input[1]) for node in received]
    scales = {a.f for node in received for a in node.attribute if a.name == "scale"}
    if not all(layers) or len(scales) != 1:
        return None
    pasts = tuple(layer.input[4] for layer in layers if layer)
    shapes = {value.name: value.type.tensor_type.shape for value in graph.value_info}
    counts = {shapes[node.input[0]].dim[1].dim_value if node.input[0] in shapes else 0 for node in received}
    if len(counts) > 1 or not (heads := counts.pop()) or any(past not in inputs for past in pasts):
        return None
    for node in (*summed, *received):
        graph.node.remove(node)
    graph.output.remove(outputs[0])
    node = onnx.helper.make_node
    made = [
        node("Shape", [received[0].input[2]], ["asked_guides"]),
        node("Neg", ["asked_guides"], ["asked_first"]),
        node("Constant", [], ["asked_end"], value_ints=[2**62]),
        node("Constant", [], ["asked_axis"], value_ints=[2]),
    ]
    rows = [f"asked_rows_{i}" for i in range(len(received))]
    made += [
        node("Slice", [of.input[0], "asked_first", "asked_end", "asked_axis"], [name])
        for of, name in zip(received, rows, strict=True)
    ]
    keys = [layer.input[1] for layer in layers if layer]
    _, groups, _, width = (dim.dim_value for dim in inputs[pasts[0]].type.tensor_type.shape.dim)
    for name, parts, each, count in ((ASKED, rows, heads, "G"), (TOLD, keys, groups, "S")):
        made += [
            node("Concat", parts, [f"{name}_all"], axis=1),
            node("Cast", [f"{name}_all"], [name], to=onnx.TensorProto.FLOAT),
        ]
        shape = [1, len(parts) * each, count, width]
        graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    graph.node.extend(made)
    return Guiding(pasts, heads, groups, width, scales.pop())


def _terms(name: str, maker: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The sums behind a value, and the AttentionReceived that they sum, first layer first; nothing for another sum."""
    node = maker.get(name)
    if node is not None and (node.domain, node.op_type) == (DOMAIN, "AttentionReceived"):
        return [], [node]
    if node is None or node.domain or node.op_type not in ("Add", "Identity"):
        return [], []
    parts = [_terms(part, maker) for part in node.input]
    if not all(received for _, received in parts):
        return [], []
    return [node, *(n for sums, _ in parts for n in sums)], [n for _, received in parts for n in received]


class Guide:
    """The product that is made later: a model without weights."""

    def __init__(self, core: ov.Core, device: str, settings: dict[str, Any], guiding: Guiding) -> None:
        self.pasts = guiding.pasts
        self._request = core.compile_model(_model(guiding), device, settings).create_infer_request()

    def received(self, later: Asked) -> np.ndarray:
        """What each key received, float32 [1, T], in pieces of at most 64 rows."""
        queries, last = np.concatenate(later.queries, axis=2), np.concatenate(later.last)
        every = np.concatenate(later.keys, axis=2)
        total = np.zeros((1, every.shape[2]), np.float32)
        keys = np.split(every, len(self.pasts), axis=1)
        for start in range(0, len(last), PIECE):
            piece = slice(start, start + PIECE)
            values: Sequence[np.ndarray] = (np.ascontiguousarray(queries[:, :, piece]), last[piece], *keys)
            self._request.infer(dict(enumerate(values)), share_inputs=True, share_outputs=True)
            total += self._request.get_output_tensor(0).data
        return total


def _model(guiding: Guiding) -> ov.Model:
    """asked [1, L·H, G, D], last [G] and each layer's keys [1, V, T, D] → [1, T]."""
    layers, heads, groups, width = len(guiding.pasts), guiding.heads, guiding.groups, guiding.width
    asked = ops.parameter([1, layers * heads, -1, width], np.float32)
    last = ops.parameter([-1], np.int64)
    keys = [ops.parameter([1, groups, -1, width], np.float32) for _ in range(layers)]
    zero, one, two = (ops.constant(np.array(i, np.int64)) for i in range(3))
    count = ops.gather(ops.shape_of(keys[0]), two, zero)
    key_of = ops.unsqueeze(ops.range(zero, count, one, "i64"), zero)
    hidden_GT = ops.select(
        ops.less_equal(key_of, ops.unsqueeze(last, one)),
        ops.constant(np.float32(0)),
        ops.constant(np.float32(-np.inf)),
    )
    scaled = ops.multiply(asked, ops.constant(np.float32(guiding.scale)))
    total = None
    for query, key in zip(ops.split(scaled, one, layers).outputs(), keys, strict=True):
        grouped = ops.reshape(query, ops.constant(np.array([1, groups, -1, width], np.int64)), False)
        logit = ops.matmul(grouped, key, False, True)
        rows = ops.concat([ops.constant(np.array([1, heads], np.int64)), ops.shape_of(hidden_GT)], 0)
        share = ops.softmax(ops.add(ops.reshape(logit, rows, False), hidden_GT), 3)
        received = ops.reduce_sum(share, ops.constant(np.array([1, 2], np.int64)), False)
        total = received if total is None else ops.add(total, received)
    return ov.Model([total], [asked, last, *keys], "guidance")

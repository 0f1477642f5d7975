"""Weights of 4 or 8 bits as the standard's DequantizeLinear in front of each product: TensorRT's form, and OpenVINO's.

Legend: N outputs, K inputs of a layer, J blocks of a row, V vocabulary, D width.

    Transpose(W),  W [N,K]   →   Transpose(DequantizeLinear(q, s)),   W ≈ q · s
    W[ids],  W [V,D]         →   DequantizeLinear(q, s)[ids], where tables are asked for; a tied head reads the same q
    int8: one scale a row, s [N], s = max |W[n]| / 127;   int4: s [N,J], J = K / 128, s = max |block| / 7

Symmetric, for TensorRT takes no zero point but 0, and OpenVINO multiplies no slower by it than by one of two sides.
Scales of fp16 are no less than its least number, those of fp32 than its least normal one: none is 0, which TensorRT
refuses. Blocks of int8 are not used: TensorRT-RTX 1.7.1
builds them, but holds the weight in the wide type (209 KB for 256 × 256), while rows of int8 and blocks of int4 stay
narrow (83 and 50 KB).
Source: ONNX DequantizeLinear-21; TensorRT's explicit quantisation, weight-only; OpenVINO's compressed weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import DTypeLike

from graphs.lowering.derived import CHUNK, DerivedWeights
from graphs.lowering.edit import initializer
from graphs.lowering.linear import Rows, is_stored_matrix, rows_of, sizes_of, stored_weight
from graphs.lowering.roles import Width, place_of

BITS: dict[str, Width] = {"int8": 8, "int4": 4}  # precision → bits of the weights of products
BLOCK = 128  # values of a row that share a scale in int4
SMALLEST = {np.dtype(np.float16): 2.0**-24, np.dtype(np.float32): 2.0**-126}
LARGEST: dict[Width, int] = {8: 127, 4: 7}
TYPES: dict[Width, ir.DataType] = {8: ir.DataType.INT8, 4: ir.DataType.INT4}


class WeightOnly(ir.passes.InPlacePass):
    """Quantise every stored matrix that a product reads, and where ``tables``, those whose rows are gathered.

    scales: their type, which what is dequantised has too. bits_of: 4 or 8 for a weight; one whose K is no multiple of
    128 is int8. rows_of: gives what reads a weight's rows.
    """

    def __init__(
        self,
        weights: DerivedWeights,
        scales: ir.DataType,
        bits_of: Callable[[ir.Value], Width],
        rows_of: Callable[[ir.Value], Rows] = rows_of,
        *,
        tables: bool = False,
    ) -> None:
        super().__init__()
        self.weights, self.scales, self.tables = weights, scales, tables
        self.bits_of, self.rows_of = bits_of, rows_of

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        changed = False
        for node in list(model.graph):
            found = self._read_by(node)
            if found is None or not is_stored_matrix(found[0]):
                continue
            self._narrow(model, *found)
            changed = True
        return ir.passes.PassResult(model, changed)

    def _read_by(self, node: ir.Node) -> tuple[ir.Value, ir.Node, int] | None:
        """A weight, the node that reads it, and as which input."""
        weight = stored_weight(node)
        if weight is not None:
            return weight, node.inputs[1].producer(), 0  # type: ignore[union-attr,return-value]
        at = None
        if node.op_type == "Gemm" and not node.domain and node.attributes.get_int("transB", 0) == 1:
            at = 1
        elif self.tables and node.op_type == "Gather" and not node.domain and node.attributes.get_int("axis", 0) == 0:
            at = 0
        weight = None if at is None else node.inputs[at]
        return None if weight is None else (weight, node, at)  # type: ignore[return-value]

    def _narrow(self, model: ir.Model, weight: ir.Value, reader: ir.Node, at: int) -> None:
        place = place_of(weight)
        (n, k), name = sizes_of(weight), str(weight.name)
        bits: Width = self.bits_of(weight) if k % BLOCK == 0 else 8
        block = BLOCK if bits == 4 else k
        shape = (n, k // block) if bits == 4 else (n,)
        kind = np.float32 if self.scales == ir.DataType.FLOAT else np.float16
        pieces = partial(_pieces, self.rows_of(weight), (n, k), bits, block, kind)
        q = self.weights.place((*place, "q"), f"{name}.q", TYPES[bits], (n, k), partial(pieces, scales=False))
        s = self.weights.place((*place, "s"), f"{name}.scale", self.scales, shape, partial(pieces, scales=True))
        attributes = {"axis": 1, "block_size": block} if bits == 4 else {"axis": 0}
        wide = ir.node("DequantizeLinear", [initializer(model, q), initializer(model, s)], attributes)
        wide.name, wide.outputs[0].name = f"{name}.dequantised_{reader.name}", f"{name}.wide_{reader.name}"
        wide.outputs[0].type, wide.outputs[0].shape = ir.TensorType(self.scales), weight.shape
        assert reader.graph is not None
        reader.graph.insert_before(reader, wide)
        reader.replace_input_with(at, wide.outputs[0])
        if not weight.uses():
            model.graph.initializers.pop(name)


def narrowed(
    weight_NK: np.ndarray, bits: Width, block: int, scales: DTypeLike = np.float16
) -> tuple[np.ndarray, np.ndarray]:
    """q int8 [N,K] and s [N,J] of type ``scales``, of fp32 rows whose length ``block`` divides."""
    value_NJk = weight_NK.reshape(len(weight_NK), -1, block)
    largest = LARGEST[bits]
    scale_NJ1 = np.abs(value_NJk).max(-1, keepdims=True) / np.float32(largest)
    scale_NJ1 = np.maximum(scale_NJ1, np.float32(SMALLEST[np.dtype(scales)])).astype(scales)
    q_NJk = np.clip(np.rint(value_NJk / scale_NJ1.astype(np.float32)), -largest, largest).astype(np.int8)
    return q_NJk.reshape(weight_NK.shape), scale_NJ1[..., 0]


def _pieces(
    rows: Rows, shape: tuple[int, int], bits: Width, block: int, kind: DTypeLike, *, scales: bool
) -> Iterator[np.ndarray]:
    n, k = shape
    step = max(1, CHUNK // k)
    for first in range(0, n, step):
        q_NK, scale_NJ = narrowed(rows(first, min(n, first + step)), bits, block, kind)
        if scales:
            yield scale_NJ
        else:
            yield q_NK if bits == 8 else ((q_NK[:, ::2] & 15) | (q_NK[:, 1::2] << 4)).view(np.uint8)

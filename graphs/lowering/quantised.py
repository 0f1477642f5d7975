"""Weights of 4 or 8 bits for ONNX Runtime on a CPU; activations stay fp32 between the layers.

Legend: N outputs, K inputs of a layer, V vocabulary, D width, J blocks of a row, k values of a block.

    y = x Wᵀ,  W [N,K]        →  MatMulNBits(x, q, s)                 q uint8 [N,J,k·bits/8], s fp32 [N,J]
    rows W[ids],  W [V,D]     →  GatherBlockQuantized(q, ids, s)      the same q, so a tied head lies there once
    W ≈ (q − 2^(bits−1)) · s,  s = (the value of largest magnitude in the block) / −2^(bits−1)

The scale's sign follows that value, so it is hit exactly. Sources: com.microsoft's MatMulNBits and
GatherBlockQuantized (two values a byte, low half first; without a zero point it is 2^(bits−1)). accuracy_level 4
quantises a row's activations to 8 bits while it multiplies: 2.5 to 200 times faster here than level 1, at a third more
error for 8 bits and none that shows for 4 (benchmarks/LOG-cpu.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphs.lowering.derived import CHUNK, DerivedWeights
from graphs.lowering.edit import MICROSOFT, initializer, replace
from graphs.lowering.linear import Rows, is_stored_matrix, sizes_of, stored_weight

ACCURACY_LEVEL = 4
SMALLEST_BLOCK = 16  # of both ops


@dataclass(frozen=True)
class Bits:
    """bits: 4 or 8. block: the most values that share a scale."""

    bits: int
    block: int

    def block_of(self, width: int) -> int:
        """The block of a row of ``width`` values: a power of two that divides it, else one that pads it."""
        divisor = min(self.block, width & -width)
        return divisor if divisor >= SMALLEST_BLOCK else max(SMALLEST_BLOCK, min(self.block, 1 << width.bit_length()))


def quantised(weight_NK: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """q uint8 [N,J,block·bits/8] and s fp32 [N,J] of fp32 rows; a short last block is padded with zeros."""
    rows, width = weight_NK.shape
    blocks = -(-width // block)
    padded = np.zeros((rows, blocks * block), np.float32)
    padded[:, :width] = weight_NK
    value_NJk = padded.reshape(rows, blocks, block)
    half = 1 << (bits - 1)
    largest_NJ1 = np.take_along_axis(value_NJk, np.abs(value_NJk).argmax(-1)[..., None], -1)
    scale_NJ1 = largest_NJ1 / np.float32(-half)
    divisor = np.where(scale_NJ1 == 0, np.float32(1), scale_NJ1)
    q_NJk = np.clip(np.rint(value_NJk / divisor) + half, 0, 2 * half - 1).astype(np.uint8)
    if bits == 4:
        q_NJk = q_NJk[..., ::2] | (q_NJk[..., 1::2] << 4)
    return q_NJk, scale_NJ1[..., 0]


class Quantise(ir.passes.InPlacePass):
    """Quantise every stored matrix that is multiplied with, or whose rows are gathered.

    bits_of: how a weight is quantised; a tied one is to be alike in all graphs. rows_of: gives what reads fp32 rows of
    a weight by first and end.
    """

    def __init__(
        self, weights: DerivedWeights, bits_of: Callable[[ir.Value], Bits], rows_of: Callable[[ir.Value], Rows]
    ) -> None:
        super().__init__()
        self.weights, self.bits_of, self.rows_of = weights, bits_of, rows_of

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        changed = False
        for node in list(model.graph.all_nodes()):
            changed |= self._layer(model, node) or self._gemm(model, node) or self._table(model, node)
        if changed:
            model.graph.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, changed)

    def _layer(self, model: ir.Model, node: ir.Node) -> bool:
        weight = stored_weight(node)
        if weight is None:
            return False
        replace(node, self._product(model, node.inputs[0], weight))
        return True

    def _gemm(self, model: ir.Model, node: ir.Node) -> bool:
        """x [M,K] with W [N,K] transposed, and a bias."""
        if node.op_type != "Gemm" or node.domain or node.attributes.get_int("transB", 0) != 1:
            return False
        weight = node.inputs[1]
        plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
        if weight is None or not is_stored_matrix(weight) or not plain or node.attributes.get_int("transA"):
            return False
        product = self._product(model, node.inputs[0], weight)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None:
            replace(node, product)
            return True
        assert node.graph is not None
        product.outputs[0].type, product.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        product.name = f"{node.name}_product"
        node.graph.insert_before(node, product)
        replace(node, ir.node("Add", [product.outputs[0], bias]))
        return True

    def _product(self, model: ir.Model, x: ir.Value | None, weight: ir.Value) -> ir.Node:
        n, k = sizes_of(weight)
        how = self.bits_of(weight)
        q, s = self._placed(model, weight, flat=False)
        attributes = {"K": k, "N": n, "bits": how.bits, "block_size": how.block_of(k)}
        return ir.node("MatMulNBits", [x, q, s], attributes | {"accuracy_level": ACCURACY_LEVEL}, domain=MICROSOFT)

    def _table(self, model: ir.Model, node: ir.Node) -> bool:
        if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 0:
            return False
        table = node.inputs[0]
        if table is None or not is_stored_matrix(table):
            return False
        width = sizes_of(table)[1]
        how = self.bits_of(table)
        block = how.block_of(width)
        if width % block:
            return False  # the op has no padded blocks
        q, s = self._placed(model, table, flat=True)
        attributes = {"bits": how.bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        replace(node, ir.node("GatherBlockQuantized", [q, node.inputs[1], s], attributes, domain=MICROSOFT))
        return True

    def _placed(self, model: ir.Model, weight: ir.Value, *, flat: bool) -> tuple[ir.Value, ir.Value]:
        held = weight.const_value
        assert isinstance(held, ir.ExternalTensor)
        (n, k), how = sizes_of(weight), self.bits_of(weight)
        bits, block = how.bits, how.block_of(k)
        blocks, stored = -(-k // block), block * bits // 8
        place = (str(held.path), held.offset)
        rows = self.rows_of(weight)
        name = str(weight.name)

        def pieces(which: int) -> Iterator[np.ndarray]:
            step = max(1, CHUNK // k)
            for first in range(0, n, step):
                yield quantised(rows(first, min(n, first + step)), bits, block)[which]

        shape = (n, blocks * stored) if flat else (n, blocks, stored)
        q = self.weights.place((*place, "q"), f"{name}.q", ir.DataType.UINT8, shape, lambda: pieces(0))
        s = self.weights.place((*place, "s"), f"{name}.scale", ir.DataType.FLOAT, (n, blocks), lambda: pieces(1))
        return initializer(model, q), initializer(model, s)

"""Linear layers that read their weight as the checkpoint stores it: no transpose, so nothing to copy at load.

Legend: N outputs, K inputs of a layer.

    y = MatMul(x, Transpose(W)),  W [N,K]   →   y = FusedMatMul(x, W, transB=1)

Source: ONNX Runtime's com.microsoft::FusedMatMul. Its own optimiser folds the transpose first, which is a second copy
of every weight in memory and most of the time it takes to open a graph.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphs.lowering.edit import MICROSOFT, replace

Rows = Callable[[int, int], np.ndarray]  # rows of a weight in fp32, by first and end


class WeightsAsStored(ir.passes.InPlacePass):
    """Rewrite every product with a transposed fp32 matrix of a weight file; what else reads the transpose keeps it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        found = [(node, w) for node in model.graph.all_nodes() if (w := stored_weight(node)) is not None]
        for node, weight in found:
            if weight.dtype != ir.DataType.FLOAT:
                continue
            replace(node, ir.node("FusedMatMul", [node.inputs[0], weight], {"transB": 1}, domain=MICROSOFT))
            model.graph.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, bool(found))


def stored_weight(node: ir.Node) -> ir.Value | None:
    """W [N,K] of a MatMul with its transpose, where a weight file holds it; None for other nodes."""
    if node.domain != "" or node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    turned = node.inputs[1].producer()
    if turned is None or turned.op_type != "Transpose" or turned.attributes.get_ints("perm") not in ([1, 0], (1, 0)):
        return None
    weight = turned.inputs[0]
    return weight if weight is not None and is_stored_matrix(weight) else None


def is_stored_matrix(value: ir.Value) -> bool:
    """Whether a value is an initialiser of two axes that lies in a weight file."""
    held = value.const_value
    return value.is_initializer() and isinstance(held, ir.ExternalTensor) and len(held.shape) == 2


def sizes_of(weight: ir.Value) -> tuple[int, ...]:
    """The axes of a stored weight."""
    assert weight.const_value is not None
    return tuple(int(size) for size in weight.const_value.shape.numpy())


def mapped_values(held: ir.ExternalTensor) -> np.ndarray:
    """A weight's values, mapped until they are read no more: the tensor's own map would stay, with all its pages."""
    return np.memmap(held.path, np.dtype(held.dtype.numpy()), "r", held.offset or 0, held.shape.numpy())


def rows_of(weight: ir.Value) -> Rows:
    """What reads rows of a stored weight from its file, in fp32."""
    held = weight.const_value
    assert isinstance(held, ir.ExternalTensor)
    return rows_in(held)


def rows_in(held: ir.ExternalTensor) -> Rows:
    """The same of the tensor itself; of a number, the number."""

    def rows(first: int, end: int) -> np.ndarray:
        values = mapped_values(held)
        return np.asarray(values[first:end] if values.shape else values, np.float32)

    return rows

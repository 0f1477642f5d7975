"""For TensorRT 10.3: what its parser does not know, written out in what it does.

Attention, RMSNormalization and RotaryEmbedding become what ONNX defines them as, our ops their bodies, the opset 20,
which for every operator that is left differs from 23 in types only. Those definitions compute axes from shapes; what is
known when the file is written is folded, for the parser wants axes as constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphs.errors import UsageError
from graphs.lowering.edit import before, takes_over
from graphs.lowering.operators_10_3 import CONSTANT_INPUT, OPERATORS, OPSET
from graphs.ops import DOMAIN

INLINED = [("", "Attention"), ("", "RMSNormalization"), ("", "RotaryEmbedding")]
FOLDED_SIZE = 64  # values of a folded constant at most: axes and shapes, never a weight
Fold = Callable[..., np.ndarray]

FOLDS: dict[str, Fold] = {
    "Identity": lambda x: x,
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Range": lambda start, stop, step: np.arange(start, stop, step, dtype=start.dtype),
    "Concat": lambda *parts: np.concatenate(parts),
    "Reshape": lambda x, shape: x.reshape(shape),
}


def written_out(model: ir.Model) -> ir.Model:
    """A lowered stage as TensorRT 10.3 parses it; UsageError where it needs what that parser lacks."""
    import onnx.inliner

    weights = {name: value.const_value for name, value in model.graph.initializers.items()}
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", ir.DataType.FLOAT.value)
    proto = onnx.inliner.inline_local_functions(ir.to_proto(model))
    proto = onnx.inliner.inline_selected_functions(proto, INLINED, exclude=False, inline_schema_functions=True)
    plain = ir.from_proto(proto)
    for name, value in plain.graph.initializers.items():
        if name in weights:
            value.const_value = weights[name]  # a proto forgets which folder a weight lies in
    _fold(plain.graph)
    plain.opset_imports.pop(DOMAIN, None)
    plain.opset_imports[""] = OPSET
    RemoveUnusedNodesPass()(plain)
    if lacking := _lacking(plain.graph):
        raise UsageError(f"TensorRT 10.3 cannot take this graph: {lacking}; build for a newer parser")
    return plain


def _lacking(graph: ir.Graph) -> str:
    """The first thing in a graph that the parser does not have, '' where it has everything."""
    for node in graph.all_nodes():
        if node.domain or node.op_type not in OPERATORS:
            return f"it has no {node.op_type}"
        index = CONSTANT_INPUT.get(node.op_type, len(node.inputs))
        axes = node.inputs[index] if index < len(node.inputs) else None
        if axes is not None and ir.convenience.get_const_tensor(axes) is None:
            return f"{node.op_type} {node.name} takes its axes from a tensor that is not constant"
        if node.op_type == "Loop" and len(node.outputs) > len(node.inputs) - 2:
            return f"Loop {node.name} stacks as many rows as its input has"
    return ""


def _fold(graph: ir.Graph) -> None:
    """Replace what is known: ranks, and small integers computed from constants alone."""
    for node in list(graph):
        known = _known(node)
        if known is None or known.size > FOLDED_SIZE:
            continue
        new = takes_over(before(node, "Constant", [], value=ir.tensor(known)), node.outputs[0])
        new.type, new.shape = ir.TensorType(ir.DataType.from_numpy(known.dtype)), ir.Shape(known.shape)
        graph.remove(node, safe=True)


def _known(node: ir.Node) -> np.ndarray | None:
    if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return None
    maker = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if node.op_type == "Size" and maker is not None and maker.op_type == "Shape" and not maker.attributes:
        measured: Any = maker.inputs[0]
        return None if measured.shape is None else np.array(len(measured.shape), np.int64)
    if node.op_type not in FOLDS or node.domain:
        return None
    tensors = [None if v is None else ir.convenience.get_const_tensor(v) for v in node.inputs]
    if any(t is None or isinstance(t, ir.ExternalTensor) or t.size > FOLDED_SIZE for t in tensors):
        return None
    values = [t.numpy() for t in tensors if t is not None]
    if any(v.dtype.kind != "i" for v in values):
        return None
    return np.asarray(FOLDS[node.op_type](*values))

"""Files for ONNX Runtime on a CPU: weights laid out as its products read them fastest without a copy, or quantised.

Legend: N outputs, K inputs of a layer.

fp32: a weight [N,K] with N > K is stored turned, [K,N], else as the checkpoint has it; what is an embedding table too
stays as it is, so that both are one. Read in place, decode is then within 5 % of what ONNX Runtime's own packed copies
reach, which take as much memory again and are made at every open (benchmarks/LOG.md, "opening and memory").
int8, int4: ``graphs.lowering.quantised``, tables included; norms, biases and convolutions stay fp32. Of int4, the
vision tower, the embedding table and the head are int8: they are few bytes and most of the error.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphs.errors import OperationFailed
from graphs.lowering.derived import CHUNK, DerivedWeights, Pieces
from graphs.lowering.host import one_node_each
from graphs.lowering.linear import WeightsAsStored, is_stored_matrix, replace, sizes_of, stored_weight
from graphs.lowering.patches import PatchesByProduct
from graphs.lowering.precision import Precision
from graphs.lowering.quantised import Bits, Quantise, Rows, initializer
from graphs.packed import PACKED

HostPrecision = Literal["fp32", "int8", "int4"]
PRECISIONS: tuple[HostPrecision, ...] = get_args(HostPrecision)
INT8 = Bits(8, 128)
BITS = {"int8": INT8, "int4": Bits(4, 128)}
HEAD, TOWER = "logits", "visual_embeds"  # the outputs that tell the decoder and the vision stage
Place = tuple[str, int]


class Packing:
    """One set of weights for all stages of an export: ``apply`` to each, embed before decoder, then ``write``."""

    def __init__(self, precision: HostPrecision, folder: Path) -> None:
        self.precision = precision
        self.weights = DerivedWeights(folder)
        self._tables: set[Place] = set()
        self._sources: dict[Place, ir.ExternalTensor] = {}

    def apply(self, model: ir.Model) -> None:
        """Lower one canonical stage in place; OperationFailed where it is not what the exporter writes."""
        try:
            self._apply(model)
        except (ir.passes.PassError, ir.passes.InvariantError) as e:
            cause = e.__cause__ or e
            raise OperationFailed(f"a graph cannot be packed ({cause}); export the checkpoint again") from e

    def write(self) -> None:
        """Write the weights of all stages."""
        self.weights.write()

    def _apply(self, model: ir.Model) -> None:
        held = [v for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
        for value in held:
            self._sources[_place(value)] = value.const_value  # type: ignore[assignment]
        if any(value.dtype != ir.DataType.FLOAT for value in held):
            Precision(ir.DataType.FLOAT, _claimed)(model)
        self._tables |= {_place(table) for node in model.graph.all_nodes() if (table := _table(node)) is not None}
        if self.precision in BITS:
            wide = self._tables | _heads(model)
            tower = any(output.name == TOWER for output in model.graph.outputs)
            layers = INT8 if tower else BITS[self.precision]
            Quantise(self.weights, lambda w: INT8 if _place(w) in wide else layers, self.rows_of)(model)
        else:
            self._turn(model)
        one_node_each(model)
        RemoveUnusedNodesPass()(model)
        self._keep_the_rest(model)
        PatchesByProduct()(model)
        RemoveUnusedNodesPass()(model)
        model.metadata_props[PACKED] = self.precision

    def _turn(self, model: ir.Model) -> None:
        for node in list(model.graph.all_nodes()):
            weight = stored_weight(node)
            if weight is None or _place(weight) in self._tables:
                continue
            n, k = sizes_of(weight)
            if n > k:
                shape, name = (k, n), f"{weight.name}.turned"
                held = self._sources[_place(weight)]
                turned = self.weights.place((*_place(weight), "turned"), name, ir.DataType.FLOAT, shape, _turned(held))
                replace(node, ir.node("MatMul", [node.inputs[0], initializer(model, turned)]))
        WeightsAsStored()(model)

    def _keep_the_rest(self, model: ir.Model) -> None:
        """What was neither turned nor quantised, as fp32 beside the others."""
        for value in list(model.graph.initializers.values()):
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or tensor.location == self.weights.file:
                continue
            shape = sizes_of(value)
            steps = partial(_in_steps, self.rows_of(value), shape[0] if shape else 1, tensor.size)
            value.const_value = self.weights.place(
                (*_place(value), "kept"), str(value.name), tensor.dtype, shape, steps
            )

    def rows_of(self, weight: ir.Value) -> Rows:
        """What reads rows of a weight from its file, in fp32."""
        held = self._sources[_place(weight)]

        def rows(first: int, end: int) -> np.ndarray:
            values = _mapped(held)
            return np.asarray(values[first:end] if values.shape else values, np.float32)

        return rows


def _claimed(tensor: ir.ExternalTensor, dtype: ir.DataType) -> ir.ExternalTensor:
    """The same place under another type: who reads it goes by ``Packing._sources``."""
    return ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=tensor.base_dir,
    )


def _place(value: ir.Value) -> Place:
    held = value.const_value
    assert isinstance(held, ir.ExternalTensor)
    return str(held.path), held.offset or 0


def _table(node: ir.Node) -> ir.Value | None:
    """The stored matrix whose rows a node gathers."""
    table = node.inputs[0] if node.op_type == "Gather" and node.inputs else None
    return table if table is not None and is_stored_matrix(table) else None


def _heads(model: ir.Model) -> set[Place]:
    """The weight whose product is the logits, a cast behind it or not."""
    outputs = [output.producer() for output in model.graph.outputs if output.name == HEAD]
    cast = [node.inputs[0] for node in outputs if node is not None and node.op_type == "Cast"]
    nodes = [*outputs, *(value.producer() for value in cast if value is not None)]
    return {_place(weight) for node in nodes if node is not None and (weight := stored_weight(node)) is not None}


def _turned(held: ir.ExternalTensor) -> Pieces:
    def pieces() -> Iterator[np.ndarray]:
        n, k = held.shape.numpy()
        step = max(1, CHUNK // n)
        for first in range(0, k, step):
            yield np.asarray(_mapped(held)[:, first : first + step], np.float32).T

    return pieces


def _in_steps(rows: Rows, count: int, size: int) -> Iterator[np.ndarray]:
    step = max(1, CHUNK * count // max(1, size))
    for first in range(0, count, step):
        yield rows(first, min(count, first + step))


def _mapped(held: ir.ExternalTensor) -> np.ndarray:
    """A weight's values, mapped until they are read no more: the tensor's own map would stay, with all its pages."""
    return np.memmap(held.path, np.dtype(held.dtype.numpy()), "r", held.offset or 0, held.shape.numpy())

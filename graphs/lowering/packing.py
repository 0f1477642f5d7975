"""Files for a CPU: weights as ONNX Runtime's products read them in place, without a copy, or quantised.

Legend: N outputs, K inputs of a layer.

fp32: weights stay as the checkpoint has them, [N,K]: a product lays them out while it reads along K. ONNX Runtime's own
packed copies gain some 5 % of a long product, lose more of one row's that comes from memory, take as much memory again
and are made at every open (benchmarks/LOG.md).
int8, int4: ``graphs.lowering.quantised`` for ONNX Runtime, ``graphs.lowering.weight_only`` for OpenVINO, tables
included; norms, biases and convolutions stay fp32, and ``graphs.lowering.roles`` has what stays int8 in int4.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphs.errors import OperationFailed
from graphs.lowering.derived import CHUNK, DerivedWeights
from graphs.lowering.host import one_node_each
from graphs.lowering.linear import (
    Rows,
    WeightsAsStored,
    rows_in,
    sizes_of,
)
from graphs.lowering.patches import PatchesByProduct
from graphs.lowering.precision import Precision
from graphs.lowering.quantised import Bits, Quantise
from graphs.lowering.roles import Place, place_of, tables_of, width_of
from graphs.lowering.weight_only import BITS, BLOCK, WeightOnly
from graphs.packed import PACKED

HostPrecision = Literal["fp32", "int8", "int4"]


class Packing:
    """One set of weights for all stages of an export: ``apply`` to each, embed before decoder, then ``write``.

    target: cpu, for ONNX Runtime, or openvino, which takes graphs in fp32 as they are.
    """

    def __init__(self, precision: HostPrecision, folder: Path, target: str = "cpu") -> None:
        self.precision, self.target = precision, target
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
            self._sources[place_of(value)] = value.const_value  # type: ignore[assignment]
        if any(value.dtype != ir.DataType.FLOAT for value in held):
            Precision(ir.DataType.FLOAT, _claimed)(model)
        self._tables |= tables_of(model)
        if self.target == "openvino" and self.precision in BITS:
            width = width_of(model, BITS[self.precision], self._tables)
            WeightOnly(self.weights, ir.DataType.FLOAT, width, self.rows_of, tables=True)(model)
        elif self.precision in BITS:
            width = width_of(model, BITS[self.precision], self._tables)
            Quantise(self.weights, lambda weight: Bits(width(weight), BLOCK), self.rows_of)(model)
        elif self.target == "cpu":
            WeightsAsStored()(model)
        if self.target == "cpu":
            one_node_each(model)
            model.metadata_props[PACKED] = self.precision
        RemoveUnusedNodesPass()(model)
        self._keep_the_rest(model)
        if self.target == "cpu":
            PatchesByProduct()(model)
            RemoveUnusedNodesPass()(model)

    def _keep_the_rest(self, model: ir.Model) -> None:
        """What was not quantised, as fp32, all in one file."""
        for value in list(model.graph.initializers.values()):
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or tensor.location == self.weights.file:
                continue
            shape = sizes_of(value)
            steps = partial(_in_steps, self.rows_of(value), shape[0] if shape else 1, tensor.size)
            value.const_value = self.weights.place(
                (*place_of(value), "kept"), str(value.name), tensor.dtype, shape, steps
            )

    def rows_of(self, weight: ir.Value) -> Rows:
        """What reads rows of a weight from its file, in fp32."""
        return rows_in(self._sources[place_of(weight)])


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


def _in_steps(rows: Rows, count: int, size: int) -> Iterator[np.ndarray]:
    step = max(1, CHUNK * count // max(1, size))
    for first in range(0, count, step):
        yield rows(first, min(count, first + step))

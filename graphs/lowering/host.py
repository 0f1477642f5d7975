"""From the canonical graphs to what ONNX Runtime runs best on a CPU: a short, ordered list of passes, on this page.

1. ``WeightsAsStored``  products read a weight as the checkpoint stores it: mapped from its file and never copied
2. ``OneRotary``        a rotation is one node
3. ``HeadsTogether``    attention takes rows of all heads side by side
4. ``TowersTiled``      a tower's attention, over whole images or inside blocks, holds no map of scores
5. ``PatchesByProduct`` a tower's patches are embedded by one product

``mapped`` does this in memory when a graph is opened and moves no byte of a weight. ``graphs.lowering.packing`` writes
files whose weights are fp32, or quantised, for it.
"""

from __future__ import annotations

import onnx_ir as ir

from graphs.lowering.linear import WeightsAsStored, is_stored_matrix, stored_weight
from graphs.lowering.patches import PatchesByProduct
from graphs.lowering.rotary import HeadsTogether, OneRotary
from graphs.lowering.tiled import TowersTiled


def mapped(model: ir.Model) -> bool:
    """Lower a canonical fp32 graph in place; False, and no change, where its weights are of another type.

    A runtime converts or transposes those, and then has to hold what it made.
    """
    held = [value.dtype for value in model.graph.initializers.values() if is_stored_matrix(value)]
    if any(dtype != ir.DataType.FLOAT for dtype in held):
        return False
    WeightsAsStored()(model)
    one_node_each(model)
    PatchesByProduct()(model)
    return not any(stored_weight(node) for node in model.graph.all_nodes())


def one_node_each(model: ir.Model) -> None:
    """The passes that touch no weight, in place."""
    OneRotary()(model)
    HeadsTogether()(model)
    TowersTiled()(model)

"""Which weights stay 8 bits wide where the others have 4: the vision tower, embedding tables, and the head.

They are few bytes and most of the error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

import onnx_ir as ir

from graphs.lowering.linear import is_stored_matrix, stored_weight

Width = Literal[4, 8]
Place = tuple[str, int]  # the file that a weight lies in, and where
HEAD, TOWER = "logits", "visual_embeds"  # the outputs that tell the decoder and the vision stage


def width_of(model: ir.Model, bits: Width, tables: Collection[Place] = ()) -> Callable[[ir.Value], Width]:
    """The rule for a stage's weights. tables: those of all stages, as a tied head is to be alike."""
    wide = {*tables, *_heads(model)}
    tower = any(output.name == TOWER for output in model.graph.outputs)
    return lambda weight: 8 if tower or place_of(weight) in wide else bits


def place_of(value: ir.Value) -> Place:
    """Where a stored weight lies."""
    held = value.const_value
    assert isinstance(held, ir.ExternalTensor)
    return str(held.path), held.offset or 0


def tables_of(model: ir.Model) -> set[Place]:
    """The stored matrices whose rows a node gathers."""
    tables = [node.inputs[0] for node in model.graph.all_nodes() if node.op_type == "Gather" and node.inputs]
    return {place_of(table) for table in tables if table is not None and is_stored_matrix(table)}


def _heads(model: ir.Model) -> set[Place]:
    """The weight whose product is the logits, a cast behind it or not."""
    outputs = [output.producer() for output in model.graph.outputs if output.name == HEAD]
    cast = [node.inputs[0] for node in outputs if node is not None and node.op_type == "Cast"]
    nodes = [*outputs, *(value.producer() for value in cast if value is not None)]
    return {place_of(weight) for node in nodes if node is not None and (weight := stored_weight(node)) is not None}

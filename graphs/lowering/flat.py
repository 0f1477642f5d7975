"""Bodies without a Loop.

TensorRT-RTX 1.7.1.116 parses a Loop and builds an op alone, but its compiler ends with signal 11 where a Loop stands
behind an attention of the same graph. So the ops that have a flat body get it, at the price of a map H·G·T whose G the
engine's profile bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from graphs.ops import DOMAIN, OPS, Op


class FlatBodies(ir.passes.InPlacePass):
    """Replace the attached bodies of the ops that have a flat one; names, inputs and outputs stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change in place."""
        return ir.passes.PassResult(
            model, exchange_bodies(model, lambda op: op.flat_function if op.flat_body else None)
        )


def exchange_bodies(model: ir.Model, other: Callable[[Op], Any]) -> bool:
    """Give the attached ops another body, and say whether any has one. other: an op's FunctionProto, or None."""
    known = [OPS[name] for domain, name, _ in model.functions if domain == DOMAIN and name in OPS]
    found = [body for body in map(other, known) if body is not None]
    for body in found:
        function = ir.serde.deserialize_function(body)
        function.opset_imports[""] = model.opset_imports[""]
        model.functions[function.identifier()] = function
    return bool(found)

"""Bodies without a Loop.

TensorRT-RTX 1.7.1.116 parses a Loop and builds an op alone, but its compiler ends with signal 11 where a Loop stands
behind an attention of the same graph. So the ops that have a flat body get it, at the price of a map H·G·T whose G the
engine's profile bounds.
"""

from __future__ import annotations

import onnx_ir as ir

from graphs.ops import DOMAIN, OPS


class FlatBodies(ir.passes.InPlacePass):
    """Replace the attached bodies of the ops that have a flat one; names, inputs and outputs stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change in place."""
        found = [key for key in model.functions if key[0] == DOMAIN and key[1] in OPS and OPS[key[1]].flat_body]
        for key in found:
            function = ir.serde.deserialize_function(OPS[key[1]].flat_function)
            function.opset_imports[""] = model.opset_imports[""]
            model.functions[function.identifier()] = function
        return ir.passes.PassResult(model, bool(found))

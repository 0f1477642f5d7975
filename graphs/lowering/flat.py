"""Bodies without a Loop.

TensorRT-RTX 1.7.1.116 parses a Loop and builds an op alone, but its compiler ends with signal 11 where a Loop stands
behind an attention of the same graph, and with an error about names of its own where a tower of 32 layers follows one.
So the ops that have a flat body get it: received attention at the price of a map H·G·T whose G the engine's profile
bounds, block attention as its formula, of which the compiler holds no map.
"""

from __future__ import annotations

import onnx_ir as ir

from graphs.ops import DOMAIN, OPS


class FlatBodies(ir.passes.InPlacePass):
    """Replace the attached bodies of the ops that have a flat one; names, inputs and outputs stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change in place."""
        known = [OPS[name] for domain, name, _ in model.functions if domain == DOMAIN and name in OPS]
        found = [op for op in known if op.flat_body]
        for op in found:
            function = ir.serde.deserialize_function(op.flat_function)
            function.opset_imports[""] = model.opset_imports[""]
            model.functions[function.identifier()] = function
        return ir.passes.PassResult(model, bool(found))

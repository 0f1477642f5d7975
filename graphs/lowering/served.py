"""Which nodes of our domain a plugin is asked to serve.

TensorRT-RTX takes a registered plugin for a node with ``plugin_namespace`` and the node's function body for one
without; ONNX Runtime ignores the attributes. What the parser made of it is read back after parsing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from graphs.ops import DOMAIN


class AskForPlugins(ir.passes.InPlacePass):
    """Set ``attributes`` on every node of our domain whose op is in ``ops``, and remove them from the others."""

    def __init__(self, ops: Collection[str], attributes: Mapping[str, str]) -> None:
        super().__init__()
        self.ops, self.attributes = frozenset(ops), dict(attributes)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change in place; functions are left alone, for a body is never served by another plugin."""
        modified = False
        for node in model.graph.all_nodes():
            if node.domain != DOMAIN:
                continue
            for name, value in self.attributes.items():
                if node.op_type in self.ops:
                    node.attributes[name] = ir.AttrString(name, value)
                    modified = True
                else:
                    modified |= node.attributes.pop(name, None) is not None
        return ir.passes.PassResult(model, modified)

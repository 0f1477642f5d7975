"""Patch embeddings as one product: a convolution whose kernel covers the whole of every sample.

Legend: M samples, C channels, N outputs.

    Conv(x [M,C,…], W [N,C,…]) [M,N,1,…], kernel = sample   →   Reshape(Gemm(Reshape(x) [M,C·…], W [N,C·…]ᵀ))

Qwen's towers embed patches so. ONNX Runtime has no fast convolution over three axes; the product took a fifth of its
time (benchmarks/LOG.md).
"""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from graphs.lowering.edit import before, constant, initializer, takes_over
from graphs.lowering.linear import sizes_of


class PatchesByProduct(ir.passes.InPlacePass):
    """Rewrite such convolutions of a weight in a file, which is read in its place under another shape."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        found = [node for node in model.graph if _covers_its_input(node)]
        for node in found:
            _rewrite(model, node)
        return ir.passes.PassResult(model, bool(found))


def _covers_its_input(node: ir.Node) -> bool:
    if node.op_type != "Conv" or node.domain or node.attributes.get_int("group", 1) != 1:
        return False
    x, weight = node.inputs[:2]
    if x is None or weight is None or x.shape is None or not isinstance(weight.const_value, ir.ExternalTensor):
        return False
    padded = any(node.attributes.get_ints("pads") or ()) or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
    spread = any(step != 1 for step in node.attributes.get_ints("dilations") or ())
    return not padded and not spread and tuple(x.shape[1:]) == sizes_of(weight)[1:]


def _rewrite(model: ir.Model, node: ir.Node) -> None:
    x, weight = node.inputs[:2]
    assert weight is not None
    held = weight.const_value
    assert isinstance(held, ir.ExternalTensor)
    n, *rest = sizes_of(weight)
    flat = ir.ExternalTensor(
        held.location,
        held.offset,
        held.length,
        held.dtype,
        shape=ir.Shape((n, prod(rest))),
        name=f"{weight.name}.flat",
        base_dir=held.base_dir,
    )
    rows = before(node, "Reshape", [x, constant(node, [-1, prod(rest)])])
    product = before(node, "Gemm", [rows, initializer(model, flat), *node.inputs[2:]], transB=1)
    if (known := node.outputs[0].shape) is not None:
        rows.type, rows.shape = node.outputs[0].type, ir.Shape([known[0], prod(rest)])
        product.type, product.shape = node.outputs[0].type, ir.Shape(known[:2])
    graph, out = node.graph, before(node, "Reshape", [product, constant(node, [-1, n, *(1 for _ in rest[1:])])])
    assert graph is not None
    takes_over(out, node.outputs[0])
    graph.remove(node, safe=True)

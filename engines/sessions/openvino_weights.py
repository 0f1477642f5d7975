"""External weights as OpenVINO's constants: they lie in the mapped files, none is copied, narrow ones stay narrow.

    DequantizeLinear(q, s)  →  Convert(q) · s,  q a constant of 8 or 4 bits, and of blocks, reshaped behind the product

OpenVINO's plugins keep that in front of a product or a gather as compressed weights; the frontend's own translation
reshapes q first, which is folded into a wide constant.
Legend: N outputs, K inputs of a layer, J blocks of a row, k values of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
from openvino import opset13 as ops

DEQUANTIZE = "DequantizeLinear"
WEIGHTS = ("Parameter", "Multiply", "Reshape")  # as it lies in a file, narrow in rows, narrow in blocks
HALVES: dict[int, ov.Type] = {onnx.TensorProto.INT4: ov.Type.i4}  # two values a byte, low half first, in both


def weights_as_inputs(proto: onnx.ModelProto, folder: Path) -> tuple[dict[str, ov.Tensor], list[mmap]]:
    """Make an input of every external tensor; return them as they lie in the files, and the files, mapped.

    OpenVINO maps external tensors itself only for a graph that lies beside them. It wants constants writable, so the
    mapping is private; nobody writes.
    """
    graph = proto.graph
    shapes = _shapes_of_quantised(graph)
    files: dict[str, mmap] = {}
    found: dict[str, ov.Tensor] = {}
    for tensor in [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where["location"] not in files:
            with (folder / where["location"]).open("rb") as opened:
                files[where["location"]] = mmap(opened.fileno(), 0, access=ACCESS_COPY)
        shape = shapes.get(tensor.name, tuple(tensor.dims))
        found[tensor.name] = _mapped(files[where["location"]], int(where.get("offset", 0)), tensor.data_type, shape)
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))
        graph.initializer.remove(tensor)
    return found, list(files.values())


def inputs_as_constants(model: ov.Model, weights: Mapping[str, ov.Tensor]) -> None:
    """Put constants in the place of the inputs that ``weights_as_inputs`` made."""
    for parameter in [p for p in model.get_parameters() if p.output(0).any_name in weights]:
        constant = ov.op.Constant(weights[parameter.output(0).any_name], shared_memory=True)
        constant.set_friendly_name(parameter.output(0).any_name)
        parameter.output(0).replace(constant.output(0))
        model.remove_parameter(parameter)


def read_as_they_lie(model: ov.Model) -> None:
    """MatMul(x, Transpose(w)) → MatMul with w turned, while w is no constant: OpenVINO would fold it into a copy."""
    for node in model.get_ops():
        if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_b"]:
            continue
        turned = node.input_value(1).get_node()
        if turned.get_type_name() != "Transpose" or turned.input_value(0).get_node().get_type_name() not in WEIGHTS:
            continue
        weight = turned.input_value(0)
        if weight.get_partial_shape().rank.get_length() == 2:
            wide = ops.matmul(node.input_value(0), weight, node.get_attributes()["transpose_a"], True)
            wide.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(wide.output(0))


def dequantised(node: Any) -> list[Any]:
    """What the frontend is given for a DequantizeLinear whose inputs have the shapes of ``_shapes_of_quantised``."""
    q, scale = node.get_input(0), node.get_input(1)
    wide = ops.multiply(ops.convert(q, scale.get_element_type().to_dtype()), scale)
    if node.get_attribute("block_size", 0):
        n, blocks, block = (size.get_length() for size in q.get_partial_shape())
        wide = ops.reshape(wide, ops.constant(np.array([n, blocks * block], np.int64)), False)
    return [wide.output(0)]


def _shapes_of_quantised(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """q and s of every dequantised weight, so that they multiply as they are: [N,J,k] and [N,J,1], [N,K] and [N,1]."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type != DEQUANTIZE:
            continue
        q, scale = node.input
        found[scale] = (*sizes[scale], 1)
        if len(sizes[scale]) == 2:
            found[q] = (*sizes[scale], sizes[q][1] // sizes[scale][1])
    return found


def _mapped(file: mmap, offset: int, kind: int, shape: tuple[int, ...]) -> ov.Tensor:
    if kind in HALVES:
        return ov.Tensor(np.frombuffer(file, np.uint8, prod(shape) // 2, offset), list(shape), HALVES[kind])
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    return ov.Tensor(np.frombuffer(file, dtype, prod(shape), offset).reshape(shape), shared_memory=True)

"""Run as a program with 'plugin' or 'body': parse and build one node of every op with kernels, in TensorRT-RTX.

Prints one JSON document: the type of the layer behind each node's output ('' where a body renamed it), the built
engine's bytes and the cubins in it. A process of its own, for a failure inside a plugin aborts.
"""

from __future__ import annotations

import json
import sys
import zlib
from typing import Any

import onnx
from onnx import TensorProto as T
from onnx.helper import make_attribute, make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from graphs.ops import DOMAIN, OPS, VERSION
from graphs.ops.op import BODY_OPSET
from plugins import registry
from plugins.cubin_file import MAGIC, unpack
from plugins.trt import load

SMS = (89, 120)
LARGEST = {"S": 2000, "G": 64, "K": 2000}


def model_of(served_by: str) -> onnx.ModelProto:
    """Received attention, plain and weighted, of a cache too → KeepTopK → CompactRows of hidden rows and of flags."""

    def node(op: str, inputs: list[str], output: str, **attributes: float) -> onnx.NodeProto:
        made = make_node(op, inputs, [output], domain=DOMAIN, name=output, **attributes)
        if served_by == "plugin":
            made.attribute.extend(make_attribute(k, v) for k, v in registry.NODE_ATTRIBUTES.items())
        return made

    value = make_tensor_value_info
    graph = make_graph(
        [
            node("AttentionReceived", ["q", "k", "guide"], "received", scale=0.3),
            node("RatedAttentionReceived", ["q", "k", "weight"], "rated", scale=0.3),
            node("ReceivedInCache", ["q", "k", "guide", "length"], "cached", scale=0.3),
            node("RatedReceivedInCache", ["q", "k", "weight", "length"], "rated_cached", scale=0.3),
            make_node("Sum", ["received", "rated", "cached", "rated_cached"], ["score"]),
            node("KeepTopK", ["score", "is_visual", "keep"], "kept"),
            node("CompactRows", ["x", "kept"], "compact"),
            node("CompactRows", ["is_visual", "kept"], "flags"),
        ],
        "every_op",
        [
            value("q", T.FLOAT16, [1, 4, "S", 16]),
            value("k", T.FLOAT16, [1, 2, "S", 16]),
            value("guide", T.INT32, ["G"]),
            value("weight", T.FLOAT, [1, "G"]),
            value("length", T.INT64, [1]),
            value("is_visual", T.BOOL, [1, "S"]),
            value("keep", T.INT32, ["K"]),
            value("x", T.FLOAT16, [1, "S", 32]),
        ],
        [value("kept", T.INT64, [1, "K"]), value("compact", T.FLOAT16, [1, "K", 32]), value("flags", T.BOOL, [1, "K"])],
    )
    opsets = [make_opsetid("", BODY_OPSET), make_opsetid(DOMAIN, VERSION)]
    bodies = [OPS[op].function for op in registry.ops_with_kernels()]
    return make_model(graph, opset_imports=opsets, functions=bodies, ir_version=11)


def build(served_by: str) -> dict[str, Any]:
    trt = load("tensorrt_rtx")
    registered = registry.register(trt, SMS)
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    model = model_of(served_by)
    assert parser.parse(model.SerializeToString()), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    behind = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for declared in model.graph.input:
        dims = [d.dim_param or d.dim_value for d in declared.type.tensor_type.shape.dim]
        shapes = [[d if isinstance(d, int) else pick(LARGEST[d]) for d in dims] for pick in (lambda n: 1, half, int)]
        profile.set_shape(declared.name, *shapes)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return {
        "registered": registered,
        "layers": {
            name: behind[name].type.name if name in behind else ""
            for name in ("received", "rated", "kept", "compact", "flags")
        },
        "plugins": sum(layer.type.name == "PLUGIN_V3" for layer in layers),
        "engine_bytes": engine.nbytes,
        "cubins": cubins_in(bytes(engine)),
    }


def half(count: int) -> int:
    return count // 2


def cubins_in(engine: bytes) -> list[list[Any]]:
    """[kernel, SM] of each cubin that the engine's bytes hold, found by the format's first line."""
    found: set[tuple[str, int]] = set()
    at = engine.find(MAGIC)
    while at >= 0:
        size = len(MAGIC) + _deflated(engine[at + len(MAGIC) :])
        found |= {(c.variant.kernel, c.sm) for c in unpack(engine[at : at + size])}
        at = engine.find(MAGIC, at + 1)
    return sorted(map(list, found))


def _deflated(data: bytes) -> int:
    """Length of the zlib stream that ``data`` begins with."""
    stream = zlib.decompressobj()
    stream.decompress(data)
    return len(data) - len(stream.unused_data)


if __name__ == "__main__":
    print(json.dumps(build(sys.argv[1])))  # noqa: T201

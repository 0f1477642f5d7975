"""A parsed TensorRT network, executed layer by layer in numpy: ``python -m tests.engines.rtx.interpreter JOB``.

Without a GPU no engine can be run, so what the parser made of a file is run instead, by the semantics that TensorRT
documents for each layer (``layers``). A layer kind or a mode that is not known there is an error. A plugin layer runs
its op's reference.

JOB is a JSON file: onnx, feeds (.npz), outputs (.npz, written), ops (node → op of ours), plugins (register them).
Legend: B batch, H query heads, V key-value heads, S rows, T keys, D head width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.engines.rtx.layers import KINDS, Values, dtype_of


def plugin(layer: Any, inputs: Values, op: str, scale: float | None) -> Values:
    """The op's meaning in torch."""
    import torch

    from graphs.ops import OPS

    tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in inputs]
    out = OPS[op].torch_op(*tensors, *([] if scale is None else [scale]))
    return [x.numpy() for x in (out if isinstance(out, tuple) else (out,))]


def in_order(network: Any, there: set[str]) -> Iterator[Any]:
    """The layers, each behind those that make its inputs; the parser adds some in another order."""
    waiting = [network.get_layer(i) for i in range(network.num_layers)]
    made = [layer.get_output(i).name for layer in waiting for i in range(layer.num_outputs) if layer.get_output(i)]
    assert len(made) == len(set(made)), "two tensors of one name"
    while waiting:
        later = []
        for layer in waiting:
            inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
            if all(tensor is None or tensor.name in there for tensor in inputs):
                there |= {layer.get_output(i).name for i in range(layer.num_outputs) if layer.get_output(i)}
                yield layer
            else:
                later.append(layer)
        assert len(later) < len(waiting), f"{later[0].name} waits for a tensor that no layer makes"
        waiting = later


def run(trt: Any, network: Any, feeds: dict[str, np.ndarray], ops: dict[str, tuple[str, float | None]]) -> Any:
    """All outputs of a network."""
    values = dict(feeds)
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        assert values[tensor.name].dtype == dtype_of(tensor.dtype), f"{tensor.name} is fed with another type"
    kinds = {k: (function, getattr(trt, function.binding)) for k, function in KINDS.items()}  # type: ignore[attr-defined]
    for layer in in_order(network, set(values)):
        name = layer.type.name
        inputs = [values[layer.get_input(j).name] for j in range(layer.num_inputs) if layer.get_input(j) is not None]
        if name == "PLUGIN_V3":
            node = str(layer.metadata).removeprefix("[ONNX Layer: ").rstrip("]")
            results = plugin(layer, inputs, *ops[node])
        elif name in kinds:
            function, binding = kinds[name]
            layer.__class__ = binding
            results = function(layer, inputs)
        else:
            raise NotImplementedError(f"layer {layer.name} is of kind {name}, which this interpreter does not know")
        for j, result in enumerate(results):
            output = layer.get_output(j)
            if output is None:
                continue
            assert result.dtype == dtype_of(output.dtype), f"{layer.name}: {result.dtype}, not {output.dtype}"
            said = tuple(output.shape)
            assert len(said) == result.ndim, f"{layer.name}: {result.shape}, not {said}"
            assert all(n in (-1, m) for n, m in zip(said, result.shape, strict=True)), f"{layer.name}: {result.shape}"
            values[output.name] = result
    return {network.get_output(i).name: values[network.get_output(i).name] for i in range(network.num_outputs)}


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    import tensorrt_rtx as trt

    if job["plugins"]:
        from plugins.registry import register

        register(trt, (89,))
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(job["onnx"]), parser.get_error(0)
    ops = {node: (op, scale) for node, (op, scale) in job["ops"].items()}
    for case, (feeds, outputs) in job["cases"].items():
        with np.errstate(over="ignore", divide="ignore"):
            got = run(trt, network, dict(np.load(feeds)), ops)
        np.savez(outputs, **got)
        sys.stdout.write(f"{case}\n")


if __name__ == "__main__":
    main(sys.argv[1])

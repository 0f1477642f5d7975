"""A program becomes an ONNX model: traced, our ops as opaque nodes, weights bound, bodies attached."""

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript.optimizer import optimize_ir
from onnxscript.values import Op as OnnxOp
from onnxscript.values import Opset

from exporter.attention import attention
from exporter.family import Tensors
from exporter.norm import rms_norm
from exporter.program import Program
from graphs.ops import DOMAIN, OPS, VERSION, Op
from graphs.ops.op import BODY_OPSET

standard = Opset("", BODY_OPSET)
TENSORS = [f"tensor({name})" for name in ("float", "float16", "bfloat16", "int32", "int64", "bool")]


def emit_attention(q: Any, k: Any, v: Any, past_k: Any, past_v: Any, scale: float) -> Any:
    """``saccade::attention`` in torch is the standard's own Attention in ONNX."""
    return standard.Attention(q, k, v, None, past_k, past_v, is_causal=1, scale=scale, _outputs=3)


def emit_rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    """``saccade::rms_norm`` in torch is the standard's own RMSNormalization in ONNX."""
    return standard.RMSNormalization(x, weight, axis=-1, epsilon=epsilon)


def emitter_of(op: Op) -> Callable[..., Any]:
    """What puts one opaque node of ours into the graph; its body is attached after optimisation.

    The torch op takes the body's inputs first, then its attributes, in the body's order.
    """
    body = op.function
    free = [(f"T_{n}", TENSORS, "") for n in (*body.input, *body.output)]
    schema = onnx.defs.OpSchema(
        op.name,
        DOMAIN,
        VERSION,
        inputs=[onnx.defs.OpSchema.FormalParameter(n, f"T_{n}") for n in body.input],
        outputs=[onnx.defs.OpSchema.FormalParameter(n, f"T_{n}") for n in body.output],
        type_constraints=free,
        attributes=[onnx.defs.OpSchema.Attribute(n, onnx.defs.OpSchema.AttrType.FLOAT, "") for n in body.attribute],
    )
    node = OnnxOp(Opset(DOMAIN, VERSION), op.name, schema)
    inputs = len(body.input)

    def emit(*args: Any) -> Any:
        return node(*args[:inputs], **dict(zip(body.attribute, args[inputs:], strict=True)))

    return emit


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch overloads of ours → the functions that emit their nodes."""
    table = {op.torch_op._opoverload: emitter_of(op) for op in OPS.values()}
    return {**table, attention._opoverload: emit_attention, rms_norm._opoverload: emit_rms_norm}


def onnx_from_program(program: Program, feed: Tensors, dims: Mapping[str, tuple[int | str, ...]]) -> ir.Model:
    """Trace ``program`` on ``feed``; ``dims`` names the dynamic axes of each input (ints are static).

    The model keeps checkpoint names for its initialisers and is not optimised yet.
    """
    symbols: dict[str, Any] = {}
    shapes = {
        name: {axis: dimension(dim, symbols) for axis, dim in enumerate(dims[name]) if isinstance(dim, str)}
        for name in feed
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        exported = torch.onnx.export(
            program.eval(),
            kwargs={"feed": feed},
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=list(feed),
            output_names=list(program.outputs),
            opset_version=BODY_OPSET,
            dynamic_shapes={"feed": shapes},
            custom_translation_table=translations(),
        )
    return cast("torch.onnx.ONNXProgram", exported).model


def dimension(name: str, symbols: dict[str, Any]) -> Any:
    """The dynamic dimension of a name, or of a multiple such as "4*V"."""
    times, _, base = name.rpartition("*")
    symbol = symbols.setdefault(base, torch.export.Dim(base, min=1, max=1 << 20))
    return int(times) * symbol if times else symbol


def reads_weight(node: ir.Node) -> bool:
    """Whether folding this node would put a second copy of a weight into the graph."""
    return any(value is not None and isinstance(value.const_value, ir.ExternalTensor) for value in node.inputs)


def finish(model: ir.Model) -> ir.Model:
    """Optimise without touching weights, attach the bodies of the ops in use, and declare our opset."""
    optimize_ir(model, should_fold=lambda node: False if reads_weight(node) else None)
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for name in OPS:
        if name in used:
            function = ir.serde.deserialize_function(OPS[name].function)
            model.functions[function.identifier()] = function
    ClearMetadataAndDocStringPass()(model)
    if used:
        model.opset_imports[DOMAIN] = VERSION
    return model

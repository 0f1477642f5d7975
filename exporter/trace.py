"""A program becomes an ONNX model: traced, our ops as opaque nodes, weights bound, bodies attached."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import rewriter
from onnxscript.optimizer import _constant_folding
from onnxscript.rewriter.rules.common import slice_split_rule
from onnxscript.values import Op as OnnxOp
from onnxscript.values import Opset

from exporter.attention import attention
from exporter.family import Tensors
from exporter.norm import rms_norm
from exporter.program import Program
from graphs.files import signals_wait
from graphs.ops import DOMAIN, OPS, VERSION, Op
from graphs.ops.op import BODY_OPSET

standard = Opset("", BODY_OPSET)
# Without SlicesSplit, which tries every pair of slices of the graph: most of the time for a deep decoder.
RULES = tuple(rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule is not slice_split_rule)
TENSORS = [f"tensor({name})" for name in ("float", "float16", "bfloat16", "int32", "int64", "bool")]


def emit_attention(q: Any, k: Any, v: Any, past_k: Any, past_v: Any, scale: float) -> Any:
    """``saccade::attention`` in torch is the standard's own Attention in ONNX."""
    return standard.Attention(q, k, v, None, past_k, past_v, is_causal=1, scale=scale, _outputs=3)


def emit_rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    """``saccade::rms_norm`` in torch is the standard's own RMSNormalization in ONNX."""
    return standard.RMSNormalization(x, weight, axis=-1, epsilon=epsilon)


def emit_cast(x: Any, dtype: int) -> Any:
    """``aten::to.dtype``, which torch.onnx knows in its decomposed form only."""
    return standard.Cast(x, to=dtype)


def emit_cast_on_device(x: Any, device: str, dtype: int) -> Any:
    """``aten::to.device``: an ONNX graph has no devices."""
    return standard.Cast(x, to=dtype)


def emit_conv(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int] = (1, 1),
    padding: str = "valid",
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Any:
    """``aten::conv2d.padding``, as towers cut their patches; torch.onnx knows it in its decomposed form only."""
    pad = {"valid": "NOTSET", "same": "SAME_UPPER"}[padding]
    return standard.Conv(x, weight, bias, strides=stride, auto_pad=pad, dilations=dilation, group=groups)


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
    aten = torch.ops.aten
    known: dict[Any, Any] = {
        aten.to.dtype: emit_cast,
        aten.to.device: emit_cast_on_device,
        aten.conv2d.padding: emit_conv,
    }
    return {**table, **known, attention._opoverload: emit_attention, rms_norm._opoverload: emit_rms_norm}


def onnx_from_program(program: Program, feed: Tensors, dims: Mapping[str, tuple[int | str, ...]]) -> ir.Model:
    """Trace ``program`` on ``feed``; ``dims`` names the dynamic axes of each input (ints are static).

    The model keeps checkpoint names for its initialisers and is not optimised yet.
    """
    symbols: dict[str, Any] = {}
    shapes = {
        name: {axis: dimension(dim, symbols) for axis, dim in enumerate(dims[name]) if isinstance(dim, str)}
        for name in feed
    }
    # Both as torch.onnx.export itself does: sizes of 0 and 1 stay dynamic, and no guard on a size fails the trace.
    dynamic = torch.fx.experimental._config.patch(backed_size_oblivious=True)
    with signals_wait(), torch.no_grad(), warnings.catch_warnings(), dynamic:
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        exported = torch.export.export(
            program.eval(),
            (),
            {"feed": feed},
            dynamic_shapes={"feed": shapes},
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        try:
            with undecomposed(exported):
                return translated(exported, program, shapes)
        except torch.onnx.OnnxExporterError:
            return translated(exported, program, shapes)


def translated(exported: torch.export.ExportedProgram, program: Program, shapes: dict[str, Any]) -> ir.Model:
    """The traced graph in ONNX's ops and ours, its dynamic axes named as in ``shapes``."""
    made = torch.onnx.export(
        exported,
        dynamo=True,
        optimize=False,
        verbose=False,
        input_names=list(shapes),
        output_names=list(program.outputs),
        opset_version=BODY_OPSET,
        dynamic_shapes={"feed": shapes},
        custom_translation_table=translations(),
    )
    return cast("torch.onnx.ONNXProgram", made).model


@contextmanager
def undecomposed(exported: torch.export.ExportedProgram) -> Iterator[None]:
    """Inside the block torch.onnx translates the ops as they were traced, or fails where one has no translation.

    Decomposing traces the whole graph a second time, which takes longer than the first. An op that writes into its
    input (its graph is no graph of values yet) is decomposed all the same.
    """
    nodes = [node for module in exported.graph_module.modules() for node in module.graph.nodes]
    if not any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in nodes):
        exported.run_decompositions = lambda table: exported
    try:
        yield
    finally:
        vars(exported).pop("run_decompositions", None)


def dimension(name: str, symbols: dict[str, Any]) -> Any:
    """The dynamic dimension of a name, or of a multiple such as "4*V"."""
    times, _, base = name.rpartition("*")
    symbol = symbols.setdefault(base, torch.export.Dim(base, min=1, max=1 << 20))
    return int(times) * symbol if times else symbol


def reads_weight(node: ir.Node) -> bool:
    """Whether folding this node would put a second copy of a weight into the graph."""
    return any(value is not None and isinstance(value.const_value, ir.ExternalTensor) for value in node.inputs)


def optimise(model: ir.Model) -> None:
    """What onnxscript's ``optimize_ir`` does, without touching weights and with ``RULES`` for its rewriting."""
    rounds = [
        _constant_folding.FoldConstantsPass(
            shape_inference=True,
            input_size_limit=_constant_folding.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
            output_size_limit=_constant_folding.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
            should_fold=lambda node: False if reads_weight(node) else None,
        ),
        rewriter.RewritePass(RULES),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    ]
    ir.passes.Sequential(
        common.InlinePass(),
        ir.passes.PassManager(rounds, steps=2, early_stop=True),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def finish(model: ir.Model) -> ir.Model:
    """Optimise, attach the bodies of the ops in use, and declare our opset."""
    optimise(model)
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for name in OPS:
        if name in used:
            function = ir.serde.deserialize_function(OPS[name].function)
            model.functions[function.identifier()] = function
    common.ClearMetadataAndDocStringPass()(model)
    if used:
        model.opset_imports[DOMAIN] = VERSION
    return model

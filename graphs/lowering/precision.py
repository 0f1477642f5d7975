"""One float type for weights, activations and caches, with islands of fp32, written out as casts.

N is the narrow type (fp16, bf16, or fp32 for none), W fp32. A network for TensorRT is strongly typed: what the file
says is what runs. A value is N where it comes from a weight, the cache or an embedding, and W where it comes from
positions, pixels or scores; where both meet, N, and the other side is cast. Islands, W whatever comes in:

* norms and softmax, cast back to N behind them, because sums of squares of N overflow at activations of 256 (fp16);
* the parts of a norm that was traced in pieces (Pow, ReduceMean, Sqrt, …), which stay W until they meet an N;
* scores: priorities and what our ops say that keys received;
* logits: the head's product is N, its result is cast to W.

In front of the decoder's Attention nothing is cast: its sums and softmax are fp32 inside TensorRT's kernels.
Works on the main graph; bodies of our ops cast inside themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphs.ops import DOMAIN, OPS

WIDE = ir.DataType.FLOAT
FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
NARROW_INPUTS = ("inputs_embeds", "past_", "deepstack_", "visual_")
WIDE_OUTPUTS = ("logits", "attention_received")
CAST_BACK = {"RMSNormalization", "LayerNormalization", "GroupNormalization", "Softmax", "LogSoftmax"}
PIECES = {"Pow", "ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare", "Sqrt", "Reciprocal", "Exp", "Log"}
FIXED_INPUTS = {"Resize": {1, 2}}

Rebind = Callable[[ir.ExternalTensor, ir.DataType], ir.ExternalTensor]


class Precision(ir.passes.InPlacePass):
    """Retype a stage to ``narrow``.

    rebind: gives the external tensor that holds a weight in another type (``graphs.lowering.weights``). Raises
    PassError for a graph with nested graphs or float values of unknown type, which the exporter does not write.
    """

    def __init__(self, narrow: ir.DataType, rebind: Rebind) -> None:
        super().__init__()
        self.narrow, self.rebind = narrow, rebind

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Retype in place."""
        _Retyping(model.graph, self.narrow, self.rebind).run()
        return ir.passes.PassResult(model, True)


class _Retyping:
    """One walk over a graph in order; ``narrow`` holds every float value's type once it is settled."""

    def __init__(self, graph: ir.Graph, narrow: ir.DataType, rebind: Rebind) -> None:
        self.graph, self.narrow, self.rebind = graph, narrow, rebind
        self.settled: dict[ir.Value, ir.DataType] = {}
        self.free: dict[ir.Value, np.ndarray] = {}  # small constants: they take the type of who reads them
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for value in self.graph.inputs:
            if value.dtype in FLOATS:
                self._settle(value, self.narrow if str(value.name).startswith(NARROW_INPUTS) else WIDE)
        for value in list(self.graph.initializers.values()):
            tensor = value.const_value
            if value.dtype not in FLOATS or tensor is None:
                continue
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = self.rebind(tensor, self.narrow)
                self._settle(value, self.narrow)
            else:
                self.free[value] = tensor.numpy().astype(np.float32)
        for node in list(self.graph):
            self._node(node)
        for i, value in enumerate(self.graph.outputs):
            if value in self.settled:
                wanted = WIDE if value.name in WIDE_OUTPUTS else self.narrow
                if self.settled[value] != wanted:
                    self._cast_output(i, value, wanted)
        for value in self.free:
            if value.is_initializer() and not value.uses():
                self.graph.initializers.pop(str(value.name))

    def _node(self, node: ir.Node) -> None:
        if any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            raise ir.passes.PassError(f"{node.name} holds a nested graph, so its types cannot be settled")
        if node.op_type == "Constant" and node.outputs[0].dtype in FLOATS:
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            assert tensor is not None
            self.free[node.outputs[0]] = tensor.numpy().astype(np.float32)
        elif node.op_type in ("Cast", "CastLike"):
            self._cast_node(node)
        elif node.domain == DOMAIN:
            self._ours(node)
        elif node.op_type in CAST_BACK:
            meets_narrow = self._meets_narrow(node)
            self._feed(node, WIDE)
            for output in node.outputs:
                self._settle_float(output, WIDE)
            if meets_narrow and self.narrow != WIDE:
                self._cast_back(node.outputs[0])
        else:
            result = self.narrow if self._meets_narrow(node) and node.op_type not in PIECES else WIDE
            self._feed(node, result, leave=FIXED_INPUTS.get(node.op_type, set()))
            for output in node.outputs:
                self._settle_float(output, result)

    def _cast_node(self, node: ir.Node) -> None:
        source, [output] = node.inputs[0], node.outputs
        if source in self.free:
            self._feed(node, WIDE)
        if output.dtype not in FLOATS:
            return
        if node.op_type == "CastLike":
            like = node.inputs[1]
            self._settle(output, self.settled.get(like, WIDE) if like is not None else WIDE)
            return
        to = WIDE if node.attributes.get_int("to", 0) == WIDE else self.narrow
        node.attributes["to"] = ir.AttrInt64("to", to.value)
        self._settle(output, to)

    def _ours(self, node: ir.Node) -> None:
        op = OPS[node.op_type]
        for i, value in enumerate(node.inputs):
            if value in self.free or value in self.settled:
                self._feed_one(node, i, WIDE if i in op.scores else self.settled.get(value, self.narrow))
        for i, output in enumerate(node.outputs):
            source = node.inputs[0] if op.carries and i == 0 else None
            if source is None or source in self.settled:
                self._settle_float(output, WIDE if source is None else self.settled[source])

    def _meets_narrow(self, node: ir.Node) -> bool:
        return any(value is not None and self.settled.get(value) == self.narrow for value in node.inputs)

    def _feed(self, node: ir.Node, dtype: ir.DataType, leave: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        for i, value in enumerate(node.inputs):
            if value is not None and (value in self.free or value in self.settled):
                self._feed_one(node, i, WIDE if i in leave else dtype)

    def _feed_one(self, node: ir.Node, i: int, dtype: ir.DataType) -> None:
        """Let a node read its i-th input in ``dtype``."""
        value = node.inputs[i]
        assert value is not None
        if value in self.free:
            node.replace_input_with(i, self._constant(value, dtype))
        elif self.settled[value] != dtype:
            if (value, dtype) not in self.casts:
                cast = ir.node("Cast", [value], {"to": dtype.value}, num_outputs=1)
                self.graph.insert_before(node, cast)
                self.casts[value, dtype] = self._typed(cast.outputs[0], dtype, value.shape)
            node.replace_input_with(i, self.casts[value, dtype])

    def _constant(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A small constant in ``dtype``; what N cannot hold becomes its largest number, not infinity."""
        if (value, dtype) not in self.casts:
            wide = self.free[value]
            limits = ml_dtypes.finfo(dtype.numpy())
            held = np.where(np.isfinite(wide), np.clip(wide, float(limits.min), float(limits.max)), wide)
            new = ir.Value(
                name=f"{value.name}_{dtype.name.lower()}", type=ir.TensorType(dtype), shape=ir.Shape(wide.shape)
            )
            new.const_value = ir.Tensor(held.astype(dtype.numpy()), dtype=dtype, name=new.name)
            self.graph.register_initializer(new)
            self.casts[value, dtype] = new
        return self.casts[value, dtype]

    def _cast_back(self, value: ir.Value) -> None:
        """Behind an island: everyone reads the narrow copy, which takes over the name."""
        node = value.producer()
        assert node is not None
        cast = ir.node("Cast", [value], {"to": self.narrow.value}, num_outputs=1)
        self.graph.insert_after(node, cast)
        new = cast.outputs[0]
        name, value.name = value.name, f"{value.name}_wide"
        new.name = name
        ir.convenience.replace_all_uses_with(value, new, replace_graph_outputs=True)
        cast.replace_input_with(0, value)
        self._typed(new, self.narrow, value.shape)
        self.settled[new] = self.narrow

    def _cast_output(self, i: int, value: ir.Value, dtype: ir.DataType) -> None:
        """A graph output in the type that the host reads, under its name."""
        node = value.producer()
        cast = ir.node("Cast", [value], {"to": dtype.value}, num_outputs=1)
        if node is None:
            self.graph.append(cast)
        else:
            self.graph.insert_after(node, cast)
        new = self._typed(cast.outputs[0], dtype, value.shape)
        name, value.name = value.name, f"{value.name}_uncast"
        new.name = name
        self.graph.outputs[i] = new

    def _settle_float(self, value: ir.Value, dtype: ir.DataType) -> None:
        if value.dtype in FLOATS:
            self._settle(value, dtype)
        elif value.dtype is None and value.name:
            raise ir.passes.PassError(f"the type of {value.name} is not known, so it cannot be settled")

    def _settle(self, value: ir.Value, dtype: ir.DataType) -> None:
        self.settled[value] = dtype
        value.type = ir.TensorType(dtype)

    @staticmethod
    def _typed(value: ir.Value, dtype: ir.DataType, shape: ir.Shape | None) -> ir.Value:
        value.type, value.shape = ir.TensorType(dtype), shape
        return value

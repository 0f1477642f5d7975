"""``tensorrt.plugin`` as far as ahead-of-time plugins need it, over IPluginV3 of TensorRT-RTX.

Nodes are parsed, shapes inferred and types settled by the real builder, from what our descriptions say; an engine gets
the kernel's PTX in a field where the real one has the kernel.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any

import numpy as np

import tensorrt as trt


class SymExprs(list[Any]):
    """Expressions of int32, one per argument or dimension."""

    def __init__(self, count: int) -> None:
        super().__init__([None] * count)


ShapeExprs = SymIntExprs = SymExprs
SymInt32 = int
KernelLaunchParams = types.SimpleNamespace


class TensorDesc:
    """A tensor as a plugin's functions see it."""

    def __init__(self, shape_expr: Any, dtype: Any, shape: tuple[int, ...] = ()) -> None:
        self.shape_expr, self.dtype, self.shape, self.ndim = shape_expr, dtype, shape, len(shape_expr)


_described: dict[str, Callable[..., Any]] = {}
_kept: list[Any] = []


def register(identity: str) -> Callable[..., Any]:
    """Remember what describes a plugin."""
    return lambda function: _described.setdefault(identity, function)


def aot_impl(identity: str) -> Callable[..., Any]:
    """Register a plugin whose description is known."""

    def decorate(implement: Callable[..., Any]) -> Callable[..., Any]:
        creator = _Creator(identity, _described[identity], implement)
        trt.get_plugin_registry().register_creator(creator, identity.partition("::")[0])
        _kept.append(creator)
        return implement

    return decorate


class _Creator(trt.IPluginCreatorV3One):  # type: ignore[name-defined,misc]
    def __init__(self, identity: str, describe: Callable[..., Any], implement: Callable[..., Any]) -> None:
        super().__init__()
        self.plugin_namespace, _, self.name = identity.partition("::")
        self.plugin_version, self.functions = "1", (describe, implement)
        parameters = inspect.signature(describe).parameters.values()
        self.attributes = [p.name for p in parameters if p.annotation is float]
        self.fields = [trt.PluginField(n, np.array([]), trt.PluginFieldType.FLOAT32) for n in self.attributes]
        self.field_names = trt.PluginFieldCollection(self.fields)

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
        found = {field.name: float(np.array(field.data).reshape(-1)[0]) for field in fields}
        return _Plugin(self.name, self.plugin_namespace, *self.functions, [found[name] for name in self.attributes])


class _Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[name-defined,misc]
    def __init__(self, name: str, namespace: str, describe: Any, implement: Any, attributes: list[float]) -> None:
        for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
            base.__init__(self)
        self.plugin_name, self.plugin_namespace, self.plugin_version = name, namespace, "1"
        self.describe, self.implement, self.attributes = describe, implement, attributes
        returned = inspect.signature(describe).return_annotation
        self.num_outputs = 1 if returned is TensorDesc else 2
        self.dtypes: list[Any] = []
        self.inputs: list[TensorDesc] = []
        self.serialized: Any = None

    def get_capability_interface(self, kind: Any) -> Any:
        return self

    def clone(self) -> Any:
        other = _Plugin(self.plugin_name, self.plugin_namespace, self.describe, self.implement, self.attributes)
        other.dtypes, other.inputs = self.dtypes, self.inputs
        return other

    def outputs(self, shapes: list[list[Any]]) -> list[TensorDesc]:
        descs = [TensorDesc(shape, dtype) for shape, dtype in zip(shapes, self.dtypes, strict=True)]
        made = self.describe(*descs, *self.attributes)
        return list(made) if isinstance(made, tuple) else [made]

    def get_output_data_types(self, input_types: Any) -> Any:
        self.dtypes = list(input_types)
        return [made.dtype for made in self.outputs([[1] * 4 for _ in self.dtypes])]

    def get_output_shapes(self, inputs: Any, shape_inputs: Any, expressions: Any) -> Any:
        self.dtypes = self.dtypes or [trt.DataType.FLOAT] * len(inputs)
        return [trt.DimsExprs(list(made.shape_expr)) for made in self.outputs([list(shape) for shape in inputs])]

    def supports_format_combination(self, position: int, tensors: Any, inputs: int) -> bool:
        return tensors[position].desc.format == trt.TensorFormat.LINEAR

    def configure_plugin(self, inputs: Any, outputs: Any) -> None:
        self.inputs = [TensorDesc(list(t.max), t.desc.type, tuple(t.desc.dims)) for t in inputs]

    def get_fields_to_serialize(self) -> Any:
        _, ptx, _, _ = self.implement(*self.inputs, *self.attributes, outputs=(), tactic=0)
        code = np.frombuffer(ptx.encode(), np.int8).copy()
        fields = [trt.PluginField("ptx", code, trt.PluginFieldType.INT8)]
        collection = trt.PluginFieldCollection(fields)
        self.serialized = code, fields, collection
        return collection

    def attach_to_context(self, context: Any) -> Any:
        return self.clone()

    def on_shape_change(self, inputs: Any, outputs: Any) -> None:
        """Nothing is kept."""

    def set_tactic(self, tactic: int) -> None:
        """There is one."""

    def get_valid_tactics(self) -> list[int]:
        return []

    def enqueue(self, *_: Any) -> None:
        raise NotImplementedError("a stand-in runs nothing")

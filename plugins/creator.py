"""Ops as TensorRT plugins: IPluginV3 (core, build, runtime) and IPluginCreatorV3One, one registration per op.

Legend: none; shapes are those of the op (``graphs/ops``).

At build a plugin learns its types and largest shapes, and its cubins go into the engine as one field; at run they come
from there, so the machine that runs needs neither torch nor Triton. ``trt`` is ``tensorrt`` or ``tensorrt_rtx``: the
classes are made for the module that is given, as both may be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from graphs.errors import BackendMissing
from graphs.ops import DOMAIN
from plugins.cubin_file import Cubin, pack, unpack
from plugins.launch import Launcher
from plugins.ops import ServedOp
from plugins.table import Variant, bits_of
from plugins.trt import VERSION, data_type, type_name

CUBINS_FIELD = "cubins"
ALIGNMENT = 256  # bytes; what TensorRT aligns tensors to, so that scratch pieces are aligned alike

# module name → the SMs that the next build compiles for; the creators of a module are registered once
_wanted_sms: dict[str, tuple[int, ...]] = {}
_creators: dict[str, list[Any]] = {}


def register_creators(trt: Any, sms: tuple[int, ...], served: Sequence[ServedOp]) -> tuple[str, ...]:
    """See ``plugins.registry.register``."""
    if sms:
        from plugins.cubins import check_sms

        check_sms(sms)
    _wanted_sms[trt.__name__] = sms
    if trt.__name__ not in _creators:
        creator_class = creator_class_of(trt)
        creators = [creator_class(op) for op in served]
        registry = trt.get_plugin_registry()
        refused = [c.name for c in creators if not registry.register_creator(c, DOMAIN)]
        if refused:
            raise BackendMissing(
                f"{trt.__name__} {trt.__version__} refused the plugins {', '.join(refused)}: build with --ops body"
            )
        _creators[trt.__name__] = creators
    return tuple(op.op for op in served)


@cache
def creator_class_of(trt: Any) -> Any:
    """The creator class for one TensorRT module."""
    plugin_class = plugin_class_of(trt)

    class SaccadeCreator(trt.IPluginCreatorV3One):
        """Makes the plugins of one op, from a node's attributes at build and from an engine's fields at run."""

        def __init__(self, served: ServedOp) -> None:
            super().__init__()
            self.served = served
            self.name, self.plugin_version, self.plugin_namespace = served.op, VERSION, DOMAIN
            self.fields = [
                trt.PluginField(name, np.array([]), trt.PluginFieldType.FLOAT32) for name in served.attributes
            ]
            self.field_names = trt.PluginFieldCollection(self.fields)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            """Return a plugin; at run its cubins come from the fields."""
            found = {field.name: np.array(field.data) for field in fields}
            attributes = {name: float(found[name].reshape(-1)[0]) for name in self.served.attributes}
            cubins: tuple[Cubin, ...] = ()
            if phase == trt.TensorRTPhase.RUNTIME:
                cubins = unpack(found[CUBINS_FIELD].view(np.int8).tobytes())
            return plugin_class(self.served, attributes, cubins, _wanted_sms[trt.__name__])

    return SaccadeCreator


@cache
def plugin_class_of(trt: Any) -> Any:
    """The plugin class for one TensorRT module."""

    class SaccadePlugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        """One node of ours, served by kernels."""

        def __init__(
            self, served: ServedOp, attributes: dict[str, float], cubins: tuple[Cubin, ...], sms: tuple[int, ...]
        ) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.served, self.attributes, self.cubins, self.sms = served, attributes, cubins, sms
            self.plugin_name, self.plugin_version, self.plugin_namespace = served.op, VERSION, DOMAIN
            self.num_outputs = 1
            self.variants: tuple[Variant, ...] = tuple(dict.fromkeys(cubin.variant for cubin in cubins))
            self.launcher: Launcher | None = None
            self.serialized: Any = None

        def get_capability_interface(self, kind: Any) -> Any:
            """One object is all three capabilities."""
            return self

        def clone(self) -> Any:
            """Return a copy with the same configuration."""
            other = SaccadePlugin(self.served, self.attributes, self.cubins, self.sms)
            other.variants = self.variants
            return other

        def get_output_data_types(self, input_types: Any) -> Any:
            """Return the op's output type."""
            return [data_type(trt, self.served.output_type([type_name(t) for t in input_types]))]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, expressions: Any) -> Any:
            """Return the op's shape rule over TensorRT's expressions."""
            return [trt.DimsExprs(list(self.served.output_shape([list(shape) for shape in inputs])))]

        def supports_format_combination(self, position: int, tensors: Any, inputs: int) -> bool:
            """Plain row-major tensors of the types that kernels exist for; types are checked at the last input."""
            desc = tensors[position].desc
            name = type_name(desc.type)
            if desc.format != trt.TensorFormat.LINEAR or not name:
                return False
            types = [type_name(tensors[i].desc.type) for i in range(min(position + 1, inputs))]
            if position < inputs - 1:
                return True
            return self.served.accepts(types) and (position < inputs or name == self.served.output_type(types))

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            """Fix the variants from the types and the largest shapes of the profile."""
            self.variants = self.served.variants(
                [type_name(t.desc.type) for t in inputs], [_largest(tuple(t.desc.dims), tuple(t.max)) for t in inputs]
            )

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            """Bytes of scratch at the largest shapes."""
            shapes = [_largest(tuple(t.desc.dims), tuple(t.max)) for t in inputs]
            return sum(_aligned(size) for size in self.served.scratch(shapes).values())

        def get_fields_to_serialize(self) -> Any:
            """The attributes, and the cubins for every wanted SM as one field of bytes."""
            floats = {name: np.array([value], np.float32) for name, value in self.attributes.items()}
            packed = np.frombuffer(pack(self.compiled()), np.int8).copy()
            kinds = trt.PluginFieldType
            fields = [
                *(trt.PluginField(name, value, kinds.FLOAT32) for name, value in floats.items()),
                trt.PluginField(CUBINS_FIELD, packed, kinds.INT8),
            ]
            collection = trt.PluginFieldCollection(fields)
            # TensorRT reads through bare pointers after this returns: whatever they point into lives as long as we do.
            self.serialized = floats, packed, fields, collection
            return collection

        def compiled(self) -> Any:
            """The cubins: the engine's, or made now at the build, which may run a plugin before it writes it."""
            if not self.cubins:
                from plugins.cubins import cubins_from_variants

                self.cubins = cubins_from_variants(self.variants, self.sms)
            return self.cubins

        def attach_to_context(self, context: Any) -> Any:
            """Each execution context has its own plugin."""
            return self.clone()

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            """Nothing is kept from one shape to the next: sizes are read at each call."""

        def set_tactic(self, tactic: int) -> None:
            """There is one tactic."""

        def get_valid_tactics(self) -> list[int]:
            """None of our own: TensorRT's default tactic 0 is the one."""
            return []

        def enqueue(
            self, inputs: Any, outputs: Any, pointers_in: Any, pointers_out: Any, workspace: int, stream: int
        ) -> None:
            """Launch the op's kernels on TensorRT's stream."""
            types, shapes = [type_name(t.type) for t in inputs], [tuple(t.dims) for t in inputs]
            if self.launcher is None:
                self.launcher = Launcher(self.compiled())
            values = dict(zip(self.served.inputs, pointers_in, strict=True)) | {self.served.output: pointers_out[0]}
            values |= {f"{name}_bits": bits_of(value) for name, value in self.attributes.items()}
            values["weight"] = values.get("weight", pointers_in[2 if len(pointers_in) > 2 else -1])
            at = workspace
            for name, size in self.served.scratch(shapes).items():
                values[name], at = at, at + _aligned(size)
            for variant in self.served.chosen(self.variants, shapes):
                self.launcher.launch(variant, values | dict(self.served.sizes(variant, types, shapes)), stream)

    return SaccadePlugin


def _largest(dims: tuple[int, ...], largest: tuple[int, ...]) -> tuple[int, ...]:
    """A profile's largest shape; a trailing axis that is dynamic stays −1, for its size is not known before the run."""
    return tuple(most if i < 2 or dim >= 0 else dim for i, (dim, most) in enumerate(zip(dims, largest, strict=True)))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

"""The kernels as ahead-of-time plugins of full TensorRT ≥ 10.9 (``tensorrt.plugin``): the engine needs no Python.

Legend: B batch, H query heads, T keys, G guide rows.

Such a plugin is one kernel in PTX, without scratch memory; its arguments are inputs, int32 expressions, outputs. So
AttentionReceived, two launches with the rows' sums between them, is two plugins, rated or not, and ``split_attention``
replaces a node by both. TensorRT-RTX has no ``tensorrt.plugin``. Attributes are not serialised: they are numbers in the
engine.

Written from NVIDIA's published interface and not yet run: TensorRT could not be installed where it was written. The
tests hold the contract (signatures, the PTX's parameter list, launch expressions) through a stand-in module. The Python
half of ``tensorrt.plugin`` 10.16.1 and 11.4.0, over stand-ins for its C++ half, took every plugin here and evaluated
shapes, types and launches to what those tests say.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Tuple, Union  # noqa: UP035

from graphs.errors import UsageError
from graphs.ops import DOMAIN
from plugins.cubins import check_sms, ptx_from_variant
from plugins.ops import SERVED, ServedOp
from plugins.ops.keep_topk import MOST_ROWS
from plugins.table import Variant, bits_of
from plugins.trt import data_type, type_name

NEWEST_SM = 90  # Triton's PTX for 10.0 and newer is of version 9.1, which driver 580 does not read
SCRATCH_POINTERS = 2
NARROW_SHARED = 48 * 1024


@dataclass(frozen=True)
class AheadOfTime:
    """One plugin: one of an op's launches.

    name: its ONNX op type. op: the op whose types, sizes and variants hold. launch: which of its variants, 0 or −1.
    inputs: their names. outputs(input shapes, input types): shape and type of each output.
    """

    name: str
    op: str
    launch: int
    inputs: tuple[str, ...]
    outputs: Callable[[Sequence[Any], Sequence[str]], list[tuple[Sequence[Any], str]]]

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the op's float attributes."""
        return SERVED[self.op].attributes

    def variant(self, types: Sequence[str], shapes: Sequence[Sequence[int]]) -> Variant:
        """The variant for these types; a size below 0 is dynamic. KeepTopK takes its widest: one kernel serves all."""
        served = SERVED[self.op]
        if not served.accepts(types):
            raise UsageError(f"{self.name} takes no {', '.join(types)}: build with --ops body")
        largest = [[MOST_ROWS if d < 0 else d for d in shape] if self.op == "KeepTopK" else shape for shape in shapes]
        return served.variants(types, largest)[self.launch]


def _row_sums(shapes: Sequence[Any], types: Sequence[str]) -> list[tuple[Sequence[Any], str]]:
    return [((shapes[0][0], shapes[0][1], shapes[2][-1]), "fp32")] * 2


def _plugins_of(served: ServedOp) -> tuple[AheadOfTime, ...]:
    """One plugin for an op of one launch; for an op with memory between two launches one for each."""

    def outputs(shapes: Sequence[Any], types: Sequence[str]) -> list[tuple[Sequence[Any], str]]:
        return [(served.output_shape(shapes), served.output_type(types))]

    between = tuple(served.scratch([[1] * 4, [1] * 4, [1] * 2]))
    if not between:
        return (AheadOfTime(served.op, served.op, -1, served.inputs, outputs),)
    return (
        AheadOfTime(f"{served.op}Sums", served.op, 0, served.inputs, _row_sums),
        AheadOfTime(f"{served.op}Shares", served.op, -1, (*served.inputs, *between), outputs),
    )


PLUGINS_OF = {op: _plugins_of(served) for op, served in SERVED.items()}
PLUGINS = tuple(plugin for plugins in PLUGINS_OF.values() for plugin in plugins)


def register(trt: Any, trtp: Any, sm: int) -> tuple[str, ...]:
    """Register every plugin with ``tensorrt.plugin`` for one SM (as 89) and return their ids, ``saccade::Name``.

    trt: the module ``tensorrt``, ≥ 10.9; trtp: ``tensorrt.plugin``. Triton compiles when TensorRT asks, at build.
    Errors: UsageError for an SM whose PTX drivers do not read yet, for which the Python plugins bring cubins.
    """
    check_sm(sm)
    for plugin in PLUGINS:
        _register_one(trt, trtp, sm, plugin)
    return tuple(f"{DOMAIN}::{plugin.name}" for plugin in PLUGINS)


def check_sm(sm: int) -> None:
    """UsageError for an SM whose PTX drivers do not read yet, or that no kernel is compiled for; see ``register``."""
    if sm > NEWEST_SM:
        raise UsageError(
            f"ahead-of-time plugins are PTX, which drivers read up to SM {NEWEST_SM}, not {sm}: use --plugins python"
        )
    check_sms((sm,))


def _register_one(trt: Any, trtp: Any, sm: int, plugin: AheadOfTime) -> None:
    identity, count, inputs = f"{DOMAIN}::{plugin.name}", len(plugin.inputs), plugin.inputs

    def split(arguments: Sequence[Any]) -> tuple[Sequence[Any], list[str], dict[str, int]]:
        descs, floats = arguments[:count], arguments[count : count + len(plugin.attributes)]
        bits = {f"{name}_bits": bits_of(float(value)) for name, value in zip(plugin.attributes, floats, strict=True)}
        return descs, [type_name(desc.dtype) for desc in descs], bits

    def describe(*arguments: Any) -> Any:
        descs, types, _ = split(arguments)
        shapes = [_expressions(desc) for desc in descs]
        made = [_desc(trt, trtp, shape, kind) for shape, kind in plugin.outputs(shapes, types)]
        return made[0] if len(made) == 1 else tuple(made)

    def implement(*arguments: Any) -> Any:
        descs, types, bits = split(arguments)
        variant = plugin.variant(types, [tuple(desc.shape) for desc in descs])
        ptx, metadata = ptx_from_variant(variant, sm)
        if metadata.shared > NARROW_SHARED:
            raise UsageError(
                f"{plugin.name} wants {metadata.shared} bytes of shared memory and PTX may have {NARROW_SHARED}: "
                "use --plugins python"
            )
        sizes = dict(SERVED[plugin.op].sizes(variant, types, [_expressions(desc) for desc in descs])) | bits
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = variant.grid(sizes)
        launch.block_x, launch.shared_mem = variant.warps * 32, metadata.shared
        numbers = [name for name, kind in variant.arguments.items() if not kind.startswith("*")]
        extra = trtp.SymIntExprs(len(numbers))
        for i, name in enumerate(numbers):
            extra[i] = trtp.SymInt32(sizes[name])
        return variant.kernel, without_scratch(ptx, variant.kernel, len(variant.arguments)), launch, extra

    tensors = [(name, trtp.TensorDesc) for name in inputs]
    attributes = [(name, float) for name in plugin.attributes]
    # TensorRT compares annotations with typing's own forms; tuple[…] and str | bytes are others to ==.
    outputs: Any = Tuple[trtp.TensorDesc]  # noqa: UP006
    several: Any = Tuple[trtp.TensorDesc, trtp.TensorDesc]  # noqa: UP006
    returned = several if plugin.outputs is _row_sums else trtp.TensorDesc
    text: Any = Union[str, bytes]  # noqa: UP007
    code: Any = Tuple[text, text, trtp.KernelLaunchParams, trtp.SymExprs]  # noqa: UP006
    trtp.register(identity)(_signed(describe, [*tensors, *attributes], returned))
    trtp.aot_impl(identity)(_signed(implement, [*tensors, *attributes, ("outputs", outputs), ("tactic", int)], code))


def _signed(function: Callable[..., Any], parameters: list[tuple[str, Any]], returned: Any) -> Callable[..., Any]:
    """Give a function the signature that TensorRT reads: names and annotations are its contract."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters],
        return_annotation=returned,
    )

    def called(*arguments: Any, **named: Any) -> Any:
        return function(*signature.bind(*arguments, **named).arguments.values())

    called.__signature__ = signature  # type: ignore[attr-defined]
    called.__annotations__ = dict(parameters) | {"return": returned}
    return called


def _expressions(desc: Any) -> list[Any]:
    return [desc.shape_expr[i] for i in range(desc.ndim)]


def _desc(trt: Any, trtp: Any, shape: Sequence[Any], kind: str) -> Any:
    expressions = trtp.ShapeExprs(len(shape))
    for i, size in enumerate(shape):
        expressions[i] = size
    return trtp.TensorDesc(expressions, dtype=data_type(trt, kind))


def without_scratch(ptx: str, kernel: str, arguments: int) -> str:
    """PTX without Triton's two trailing scratch pointers, which our kernels do not read.

    arguments: how many the kernel has by its table. Errors: UsageError where the parameter list is another one, or a
    scratch pointer is read after all.
    """
    found = re.search(rf"(\.entry {kernel}\()(.*?)(\n\))", ptx, re.DOTALL)
    parameters = found[2].split(",\n") if found else []
    if found is None or len(parameters) != arguments + SCRATCH_POINTERS:
        raise UsageError(
            f"{kernel}'s PTX has {len(parameters)} parameters instead of {arguments} and {SCRATCH_POINTERS} scratch "
            f"pointers: install the pinned Triton"
        )
    body = ptx[found.end() :]
    if any(f"{kernel}_param_{arguments + i}]" in body for i in range(SCRATCH_POINTERS)):
        raise UsageError(f"{kernel} reads a scratch pointer, which no plugin gives it: install the pinned Triton")
    return ptx[: found.start(2)] + ",\n".join(parameters[:arguments]) + ptx[found.start(3) :]


def split_attention(model: Any) -> dict[str, str]:
    """Replace each attention-received node of an onnx.ModelProto's graph by its two plugins' nodes.

    Returns the new nodes, name → op of the node that they replace.
    """
    from onnx.helper import make_node

    nodes, split = [], {}
    for node in model.graph.node:
        plugins = PLUGINS_OF.get(node.op_type, ()) if node.domain == DOMAIN else ()
        if len(plugins) < 2:
            nodes.append(node)
            continue
        sums = [f"{node.output[0]}_peak", f"{node.output[0]}_total"]
        row_sums, shares = (plugin.name for plugin in plugins)
        first = make_node(row_sums, list(node.input), sums, domain=DOMAIN, name=f"{node.name}_sums")
        second = make_node(shares, [*node.input, *sums], list(node.output), domain=DOMAIN, name=f"{node.name}_shares")
        for made in (first, second):
            # All of them: without plugin_namespace the parser would look for a body, and these have none.
            made.attribute.extend(node.attribute)
            nodes.append(made)
            split[made.name] = node.op_type
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return split

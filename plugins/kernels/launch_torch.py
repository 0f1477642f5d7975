"""The kernels on torch tensors, by the table that the plugins use: for tests (interpreted too) and timing."""

from collections.abc import Sequence
from importlib import import_module

import torch

from graphs.errors import UsageError
from plugins.ops import SERVED
from plugins.ops.served import Types
from plugins.table import KERNELS, Variant, bits_of

NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.bool: "i1",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def run(op: str, inputs: Sequence[torch.Tensor], attributes: Sequence[float] = ()) -> torch.Tensor:
    """The op's output, computed by its kernels on the inputs' device.

    inputs, attributes: in the order of the op's body (``graphs/ops``); tensors are made contiguous. Errors: UsageError
    for types or sizes that no kernel takes.
    """
    served = SERVED[op]
    inputs = [x.contiguous() for x in inputs]
    types, shapes = [NAMES[x.dtype] for x in inputs], [tuple(x.shape) for x in inputs]
    if not served.accepts(types):
        raise UsageError(f"{op}'s kernels do not take {', '.join(types)}: use the op's torch meaning")
    out = torch.empty(
        tuple(served.output_shape(shapes)), dtype=DTYPES[served.output_type(types)], device=inputs[0].device
    )
    values: dict[str, torch.Tensor | int] = dict(zip(served.inputs, inputs, strict=True)) | {served.output: out}
    values |= {f"{name}_bits": bits_of(value) for name, value in zip(served.attributes, attributes, strict=True)}
    values["weight"] = values.get("weight", inputs[2 if len(inputs) > 2 else -1])
    for name, size in served.scratch(shapes).items():
        values[name] = torch.empty(size // 4, dtype=torch.float32, device=out.device)
    for variant in served.chosen(served.variants(types, shapes), shapes):
        _launch(variant, types, values | dict(served.sizes(variant, types, shapes)))
    return out


def _launch(variant: Variant, types: Types, values: dict[str, torch.Tensor | int]) -> None:
    entry = KERNELS[variant.kernel]
    kernel = getattr(import_module(f"plugins.kernels.{entry.module}"), entry.name)
    arguments = []
    for name, declared in entry.arguments.items():
        value = values[name]
        if isinstance(value, torch.Tensor) and declared == "*E" and NAMES[value.dtype] != variant.element:
            value = value.view(-1).view(DTYPES[variant.element])
        arguments.append(value)
    kernel[variant.grid(values)](*arguments, **dict(variant.constants), num_warps=variant.warps)

"""What a plugin has to know of an op, without a runtime in sight: types, shapes, scratch memory and launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from plugins.table import Sizes, Variant

Shapes = Sequence[Sequence[Any]]  # per input: ints, or TensorRT's expressions of them
Types = Sequence[str]  # per tensor, Triton's name: fp32, fp16, bf16, i64, i32, i8, i1


@dataclass(frozen=True)
class ServedOp:
    """One op of domain ``saccade`` that kernels serve.

    op: its name. inputs, output: tensor names, as the kernels call them. attributes: names of its float attributes.
    accepts(input types): whether kernels exist for them. output_type, output_shape: of the one output.
    variants(input types, largest input shapes): every variant that a call within these shapes may launch; a size
    below 0 is not known yet. chosen(variants, input shapes): those of them that one call launches, in order.
    sizes(variant, input types, input shapes): the numbers that the variant's kernel and its grid take.
    scratch(input shapes): name → bytes of working memory.
    """

    op: str
    inputs: tuple[str, ...]
    output: str
    accepts: Callable[[Types], bool]
    output_type: Callable[[Types], str]
    output_shape: Callable[[Shapes], Sequence[Any]]
    sizes: Callable[[Variant, Types, Shapes], Sizes]
    variants: Callable[[Types, Shapes], tuple[Variant, ...]]
    chosen: Callable[[tuple[Variant, ...], Shapes], tuple[Variant, ...]] = lambda variants, _: variants
    scratch: Callable[[Shapes], dict[str, int]] = field(default=lambda _: {})
    attributes: tuple[str, ...] = ()

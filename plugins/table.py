"""The kernels as a table: arguments, blocks, warps and grid. Read by the plugins, the compiler and the launchers.

Legend: B batch, H query heads, V key-value heads, S rows, T keys, D head width, G guide rows, K kept rows,
C words of a row.

Neither Triton nor torch is imported here: a machine that runs an engine has neither. An argument's type is Triton's:
``*fp32`` a pointer, ``i32`` a number; ``*E`` points to the variant's element type, ``*W`` to that of its weight.
Every kernel takes inputs, then numbers, then outputs, for TensorRT passes them so to an ahead-of-time plugin.
Numbers are int32: an ahead-of-time plugin can pass no other; a float travels as its bits.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Sizes = Mapping[str, Any]  # name → int, or TensorRT's expression of one
Grid = tuple[Any, Any, Any]

ATTENTION_NUMBERS = dict.fromkeys(("scale_bits", "S", "T", "G", "H", "V", "D"), "i32")
SUMS = {"peak": "*fp32", "total": "*fp32"}


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel.

    name: the function, in ``plugins.kernels.<module>``. arguments: name → type, in order. constants: its
    compile-time constants. grid: (sizes, constants) → three numbers of programs.
    """

    name: str
    module: str
    arguments: dict[str, str]
    constants: tuple[str, ...]
    grid: Callable[[Sizes, Sizes], Grid]


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "attention_row_sums",
            "attention_received",
            {"q": "*E", "k": "*E", "weight": "*W", **ATTENTION_NUMBERS, **SUMS},
            ("BLOCK_R", "BLOCK_T", "BLOCK_D"),
            lambda n, c: (up(n["H"] // n["V"] * n["G"], c["BLOCK_R"]), n["V"], n["B"]),
        ),
        Kernel(
            "attention_shares",
            "attention_received",
            {"q": "*E", "k": "*E", "weight": "*W", **SUMS, **ATTENTION_NUMBERS, "received": "*fp32"},
            ("WEIGHTED", "BLOCK_R", "BLOCK_T", "BLOCK_D"),
            lambda n, c: (up(n["T"], c["BLOCK_T"]), n["B"], 1),
        ),
        Kernel(
            "cached_row_sums",
            "attention_received",
            {"q": "*E", "k": "*E", "weight": "*W", "length": "*i64", **ATTENTION_NUMBERS, **SUMS},
            ("BLOCK_R", "BLOCK_T", "BLOCK_D"),
            lambda n, c: (up(n["H"] // n["V"] * n["G"], c["BLOCK_R"]), n["V"], n["B"]),
        ),
        Kernel(
            "cached_shares",
            "attention_received",
            {
                "q": "*E",
                "k": "*E",
                "weight": "*W",
                "length": "*i64",
                **SUMS,
                **ATTENTION_NUMBERS,
                "received": "*fp32",
            },
            ("WEIGHTED", "BLOCK_R", "BLOCK_T", "BLOCK_D"),
            lambda n, c: (up(n["T"], c["BLOCK_T"]), n["B"], 1),
        ),
        Kernel(
            "keep_topk",
            "keep_topk",
            {"score": "*fp32", "is_visual": "*i1", "keep": "*i32", "S": "i32", "K": "i32", "kept": "*i64"},
            ("BLOCK_S",),
            lambda n, c: (n["B"], 1, 1),
        ),
        Kernel(
            "compact_rows",
            "compact_rows",
            {"x": "*E", "kept": "*i64", "S": "i32", "K": "i32", "C": "i32", "compact": "*E"},
            ("BLOCK",),
            lambda n, c: (up(n["K"] * n["C"], c["BLOCK"]), n["B"], 1),
        ),
    )
}


@dataclass(frozen=True)
class Variant:
    """A kernel with its types and constants fixed: what is compiled to one cubin per SM.

    element, weight: Triton's names of the types behind ``*E`` and ``*W``. warps of 32 threads a program.
    """

    kernel: str
    constants: tuple[tuple[str, int], ...]
    warps: int
    element: str = "fp32"
    weight: str = "i32"

    @cached_property
    def arguments(self) -> dict[str, str]:
        """Name → Triton type of each kernel argument, in order."""
        types = {"*E": f"*{self.element}", "*W": f"*{self.weight}"}
        return {name: types.get(kind, kind) for name, kind in KERNELS[self.kernel].arguments.items()}

    def grid(self, sizes: Sizes) -> Grid:
        """Programs along x, y and z for the sizes of one call."""
        return KERNELS[self.kernel].grid(sizes, dict(self.constants))


def up(count: Any, block: int) -> Any:
    """How many blocks hold ``count``: works on ints and on TensorRT's shape expressions."""
    return (count + (block - 1)) // block


def bits_of(number: float) -> int:
    """A float as the int32 that has its bits, which is how kernels take floats."""
    bits: int = struct.unpack("<i", struct.pack("<f", number))[0]
    return bits


def power_above(count: int, least: int) -> int:
    """The lowest power of two that is neither below ``count`` nor below ``least``."""
    return max(least, 1 << (count - 1).bit_length())

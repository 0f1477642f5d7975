"""AttentionReceived, RatedAttentionReceived and both over a cache's buffer, as two launches: row sums, then shares.

Legend: B batch, H query heads, V key-value heads, S rows, T keys, D head width, G guide rows, R = (H/V)·G the rows
that share a key-value head.

Blocks. Row sums: 16 rows (the least a tensor core takes) a program, so that short questions still make many programs.
Shares: 32 keys a program, which walks all heads and rows, so no two programs add to one number. fp32 takes blocks of
half the size, for its operands fill twice the registers. Head widths are padded to a power of two, 256 at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphs.errors import UsageError
from plugins.ops.served import ServedOp, Shapes, Types
from plugins.table import Sizes, Variant, power_above

WIDEST_HEAD = 256
ELEMENTS = ("fp32", "fp16", "bf16")


def _sizes(variant: Variant, types: Types, shapes: Shapes) -> Sizes:
    (b, h, s, d), (_, v, t, _), guide = shapes[0], shapes[1], shapes[2]
    return {"B": b, "H": h, "S": s, "D": d, "V": v, "T": t, "G": guide[-1]}


def _scratch(shapes: Shapes) -> dict[str, int]:
    rows = 4 * shapes[0][0] * shapes[0][1] * shapes[2][-1]
    return {"peak": rows, "total": rows}


def _variants_of(weighted: bool, kernels: tuple[str, str], types: Types, shapes: Shapes) -> tuple[Variant, ...]:
    width = shapes[0][3]
    if not 0 < width <= WIDEST_HEAD:
        raise UsageError(
            f"the heads are {width} wide, AttentionReceived's kernels take 1 to {WIDEST_HEAD}: build with --ops body"
        )
    block_d, narrow, weight = power_above(width, 16), types[0] == "fp32", types[2]
    sums = (("BLOCK_R", 16), ("BLOCK_T", 32 if narrow else 64), ("BLOCK_D", block_d))
    # In fp32 with heads of 128 fewer rows keep within the 48 KiB that a plugin ahead of time may have.
    block_r = 64 if not narrow else 32 if block_d < 128 else 16
    shares = (("WEIGHTED", int(weighted)), ("BLOCK_R", block_r), ("BLOCK_T", 32), ("BLOCK_D", block_d))
    return (
        Variant(kernels[0], sums, 4, types[0], weight),
        Variant(kernels[1], shares, 4, types[0], weight),
    )


def _served(op: str, third: str, third_types: tuple[str, ...], weighted: bool, cached: bool = False) -> ServedOp:
    kernels = CACHED if cached else WHOLE

    def accepts(types: Types) -> bool:
        fits = types[0] == types[1] and types[0] in ELEMENTS and types[2] in third_types
        return fits and (not cached or types[3] == "i64")

    def shape(shapes: Shapes) -> Sequence[Any]:
        return shapes[1][0], shapes[1][2]

    return ServedOp(
        op,
        ("q", "k", third, "length") if cached else ("q", "k", third),
        "received",
        accepts,
        lambda types: "fp32",
        shape,
        _sizes,
        lambda types, shapes: _variants_of(weighted, kernels, types, shapes),
        scratch=_scratch,
        attributes=("scale",),
    )


# their kernels: over all keys, over those that are filled
WHOLE, CACHED = ("attention_row_sums", "attention_shares"), ("cached_row_sums", "cached_shares")
PLAIN = _served("AttentionReceived", "guide", ("i32", "i64"), weighted=False)
RATED = _served("RatedAttentionReceived", "weight", ("fp32",), weighted=True)
PLAIN_CACHED = _served("ReceivedInCache", "guide", ("i32", "i64"), weighted=False, cached=True)
RATED_CACHED = _served("RatedReceivedInCache", "weight", ("fp32",), weighted=True, cached=True)

"""KeepTopK as one launch: a program per sequence, which holds all its rows in registers.

Legend: B batch, S rows, K kept rows.

Three widths are compiled, as far as the largest sequence needs them, so that a decode step of one row does not pay
for 16,384; a call takes the narrowest that holds its rows. Warps grow with the width: at most 32 rows a thread.
"""

from __future__ import annotations

from graphs.errors import UsageError
from plugins.ops.served import ServedOp, Shapes, Types
from plugins.table import Sizes, Variant

MOST_ROWS = 16_384
WARPS_OF_WIDTH = {1024: 4, 4096: 8, MOST_ROWS: 16}


def _sizes(variant: Variant, types: Types, shapes: Shapes) -> Sizes:
    return {"B": shapes[0][0], "S": shapes[0][1], "K": shapes[2][0]}


def _variants(types: Types, shapes: Shapes) -> tuple[Variant, ...]:
    rows = shapes[0][1]
    if not 0 < rows <= MOST_ROWS:
        raise UsageError(
            f"a sequence may have {rows} rows, KeepTopK's kernel takes 1 to {MOST_ROWS}: lower the largest sequence"
        )
    widths = list(WARPS_OF_WIDTH)
    enough = next(i for i, width in enumerate(widths) if width >= rows)
    return tuple(Variant("keep_topk", (("BLOCK_S", w),), WARPS_OF_WIDTH[w]) for w in widths[: enough + 1])


def _chosen(variants: tuple[Variant, ...], shapes: Shapes) -> tuple[Variant, ...]:
    rows = shapes[0][1]
    fitting = [variant for variant in variants if dict(variant.constants)["BLOCK_S"] >= rows]
    if not fitting:
        raise UsageError(f"a sequence has {rows} rows, more than this engine was built for: build it for more")
    return (fitting[0],)


SERVED = ServedOp(
    "KeepTopK",
    ("score", "is_visual", "keep"),
    "kept",
    lambda types: types[0] == "fp32" and types[1] == "i1" and types[2] in ("i32", "i64"),
    lambda types: "i64",
    lambda shapes: (shapes[0][0], shapes[2][0]),
    _sizes,
    _variants,
    _chosen,
)

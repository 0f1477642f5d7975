"""CompactRows as one launch over the flat output, in the widest words that a row divides into.

Legend: B batch, S rows, K kept rows, … trailing axes, C words of a row.

A gather moves bits, so a word of 8, 4, 2 or 1 bytes serves every type, NaN payloads included. Where a trailing axis is
not known before the run, words are as wide as one element.
"""

from __future__ import annotations

from math import prod
from typing import Any

from plugins.ops.served import ServedOp, Shapes, Types
from plugins.table import Sizes, Variant

BYTES = {"i64": 8, "fp32": 4, "i32": 4, "fp16": 2, "bf16": 2, "i8": 1, "i1": 1}
WORDS = {8: "i64", 4: "i32", 2: "i16", 1: "i8"}
WORD_BYTES = {word: width for width, word in WORDS.items()}
BLOCK = 1024


def _sizes(variant: Variant, types: Types, shapes: Shapes) -> Sizes:
    x, kept, word, width = shapes[0], shapes[1], WORD_BYTES[variant.element], BYTES[types[0]]
    elements = _product(x[2:])
    return {"B": x[0], "S": x[1], "K": kept[1], "C": elements if word == width else elements * width // word}


def _product(sizes: Any) -> Any:
    total = 1
    for size in sizes:
        total = size * total
    return total


def word_bytes(element: str, trailing: tuple[int, ...]) -> int:
    """Bytes of the widest word that divides a row, given its element type; a trailing axis below 0 is not known."""
    width = BYTES[element]
    if any(size < 0 for size in trailing):
        return width
    return next(word for word in WORDS if prod(trailing) * width % word == 0)


def _variants(types: Types, shapes: Shapes) -> tuple[Variant, ...]:
    word = word_bytes(types[0], tuple(shapes[0][2:]))
    return (Variant("compact_rows", (("BLOCK", BLOCK),), 4, WORDS[word]),)


SERVED = ServedOp(
    "CompactRows",
    ("x", "kept"),
    "compact",
    lambda types: types[0] in BYTES and types[1] == "i64",
    lambda types: types[0],
    lambda shapes: (shapes[0][0], shapes[1][1], *shapes[0][2:]),
    _sizes,
    _variants,
)

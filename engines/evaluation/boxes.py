"""Boxes in answers: how models write where something is, and how much two boxes overlap.

A box is (left, top, right, bottom) as shares of the image's width and height. Read are, in this order, the first
`(x1,y1),(x2,y2)` (Qwen-VL, Qwen2-VL) and the first four numbers in brackets, `[x1, y1, x2, y2]` (InternVL's
`<box>[[…]]</box>`, LLaVA, Shikra, `"bbox_2d": […]` of Qwen3-VL). Numbers that are all at most 1 are shares, others
thousandths. Pixels (Qwen2.5-VL) cannot be told from thousandths and are not read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

Box: TypeAlias = tuple[float, float, float, float]
NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
CORNERS = re.compile(rf"\({NUMBER},{NUMBER}\)\s*,\s*\({NUMBER},{NUMBER}\)")
BRACKETS = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")
ENOUGH = 0.5  # of intersection over union


def box_in(answer: str) -> Box | None:
    """The box that an answer gives, None where it gives none."""
    found = CORNERS.search(answer) or BRACKETS.search(answer)
    if not found:
        return None
    numbers = [float(number) for number in found.groups()]
    scale = 1 if max(numbers) <= 1 else 1000
    left, top, right, bottom = (number / scale for number in numbers)
    return left, top, right, bottom


def written(box: Sequence[float]) -> str:
    """A box as ``box_in`` reads it."""
    return f"[{', '.join(f'{share:.6f}' for share in box)}]"


def overlap(a: Box, b: Box) -> float:
    """Intersection over union, in [0, 1]; 0 for a box whose corners are in the wrong order."""
    if min(_area(a), _area(b)) <= 0:
        return 0.0
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return shared / (_area(a) + _area(b) - shared)


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

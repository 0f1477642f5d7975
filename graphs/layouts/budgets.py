"""Budgets per image where images are packed behind each other: what KeepPerImage and MergeContextWithin are told.

Legend: V visual tokens of all images, K that stay, M merged.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphs.plan import VisionPoint
from graphs.spec import VisualGrid


def image_of(tokens: Sequence[int]) -> np.ndarray:
    """The image of every visual token, int64 [V]; tokens: how many each image has."""
    return np.repeat(np.arange(len(tokens), dtype=np.int64), np.asarray(tokens, np.int64))


def places(before: Sequence[int], kept: Sequence[int], text: int = 0) -> np.ndarray:
    """Places, in an order by image and score, of the rows that stay: all text, then each image's best; int64 [K]."""
    starts = text + np.cumsum([0, *before])[: len(before)]
    best = [start + np.arange(count) for start, count in zip(starts, kept, strict=True)]
    return np.concatenate([np.arange(text), *best]).astype(np.int64)


def targets(rests: Sequence[int], merges: Sequence[int]) -> np.ndarray:
    """Which of the tokens that are not dominant become contextual ones, by their place among those; int64 [M]."""
    starts = np.cumsum([0, *rests])[: len(rests)]
    each = [s + np.arange(m) * (r // m) for s, r, m in zip(starts, rests, merges, strict=True)]
    return np.concatenate(each).astype(np.int64)


def vision_feeds(
    point: VisionPoint, grid: VisualGrid, tokens: Sequence[int], keep: float | None = None
) -> dict[str, np.ndarray]:
    """Inputs of a pruned vision stage beside the family's.

    tokens: visual tokens of each image. keep: a share instead of the point's own. Raises UsageError for a number that
    cannot be had. Images of one tile size have shape carriers (keep_vision, merge_vision: only the length is read);
    packed ones say which token is whose (visual_image [V]), and per image which places stay (pick_vision [K]).
    """
    total = sum(tokens)
    if grid.tokens_alike:
        lengths = point.carriers(total, total // grid.tokens, keep)
        return {name: np.zeros(length, np.int32) for name, length in lengths.items()}
    feeds = {"visual_image": image_of(tokens)} if reads_image(point) else {}
    if not point.per_image:
        return feeds | {"keep_vision": np.zeros(point.carriers(total, 1, keep)["keep_vision"], np.int32)}
    each = [point.carriers(n, 1, keep) for n in tokens]
    kept = [lengths["keep_vision"] for lengths in each]
    feeds["pick_vision"] = places(tokens, kept)
    if point.merge:
        rests = [n - k for n, k in zip(tokens, kept, strict=True)]
        feeds["target_vision"] = targets(rests, [lengths["merge_vision"] for lengths in each])
    return feeds


def reads_image(point: VisionPoint) -> bool:
    """Whether a packed vision stage has to know which token is of which image."""
    return point.per_image or point.score in ("received", "zip")

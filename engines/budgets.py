"""How many rows go on behind each prune point of the decoder, and the graph inputs that say so.

Legend: S rows of the chunk, S_i rows behind prune point i−1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphs.layouts.budgets import places
from graphs.plan import PruningPlan, kept_count


@dataclass(frozen=True, eq=False)
class Cut:
    """rows: S_{i+1}. feeds: the point's inputs: keep_i, merge_i and recycle_i, or pick_i."""

    rows: int
    feeds: Mapping[str, np.ndarray]


def cuts_of(
    plan: PruningPlan, text: int, before: Sequence[int], original: Sequence[int], ratios: Sequence[float] | None
) -> tuple[Cut, ...]:
    """Return every point's cut of a chunk with ``text`` text rows.

    before: visual rows of each image that are here; original: how many each had at first; none for text alone.
    ratios: shares of the original instead of the plan's own. No more stay than are left; behind a point that is
    not per image nobody knows whose they are.
    """
    cuts, left, total, whole = [], list(before), sum(before), sum(original)
    for i, point in enumerate(plan.points):
        if point.per_image:
            wanted = [point.kept_of(n) if ratios is None else kept_count(n, ratios[i]) for n in original]
            kept = [min(a, b) for a, b in zip(left, wanted, strict=True)]
            cuts.append(Cut(text + sum(kept), {f"pick_{i}": places(left, kept, text)}))
            left, total = kept, sum(kept)
            continue
        count = min(total, point.kept_of(whole) if ratios is None else kept_count(whole, ratios[i]))
        lengths = {f"keep_{i}": text + count}
        if point.merge:
            lengths |= dict(zip((f"merge_{i}", f"recycle_{i}"), point.merging(total, count), strict=True))
        cuts.append(Cut(text + count, {name: np.zeros(n, np.int32) for name, n in lengths.items()}))
        total = count
    return tuple(cuts)


def image_index(is_visual_S: np.ndarray, image_of: np.ndarray | None) -> np.ndarray:
    """Return the image of every row, int64 [S], −1 for text; None: all visual rows are of one image."""
    index_S = np.full(len(is_visual_S), -1, np.int64)
    index_S[is_visual_S] = 0 if image_of is None else image_of
    return index_S

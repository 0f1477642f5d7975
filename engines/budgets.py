"""How many rows go on behind each prune point of the decoder, by what priority, and the graph inputs that say so.

Legend: S rows of the chunk, S_i rows behind prune point i−1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import TypeAlias

import numpy as np

from graphs.errors import UsageError
from graphs.layouts.budgets import places
from graphs.plan import PruningPlan, kept_count

Keep: TypeAlias = float | Sequence[float] | None


@dataclass(frozen=True, eq=False)
class Cut:
    """rows: S_{i+1}. feeds: the point's inputs: keep_i, merge_i and recycle_i, or pick_i."""

    rows: int
    feeds: Mapping[str, np.ndarray]


def keep_ratios(plan: PruningPlan, keep: Keep, visual_tokens: int = 0) -> tuple[float, ...]:
    """Return one share of the original visual tokens per prune point, the vision stage's first; None: the plan's own.

    visual_tokens: what a plan's count is a share of.
    Raises UsageError for a share outside (0, 1], for shares that grow, for another number of them
    than there are prune points, and for any share below 1 where nothing can be pruned.
    """
    if keep is None:
        return tuple(p.share_of(visual_tokens) for p in plan.budgets)
    ratios = (float(keep),) if isinstance(keep, Real) else tuple(float(r) for r in keep)  # type: ignore[union-attr]
    for ratio in ratios:
        kept_count(1, ratio)
    if not plan.budgets and all(r == 1 for r in ratios):
        return ()
    if len(ratios) != len(plan.budgets):
        raise UsageError(
            f"{len(ratios)} keep ratios were given, but plan {plan.name} has {len(plan.budgets)} prune points; "
            "give one for each, or export with another plan"
        )
    if any(b > a for a, b in pairwise(ratios)):
        raise UsageError(
            f"keep ratios {list(ratios)} grow with depth, but dropped tokens do not come back; "
            "list them in decreasing order"
        )
    return ratios


def cuts_behind(
    plan: PruningPlan,
    is_visual_S: np.ndarray,
    keep: Keep,
    visual_tokens: int | None = None,
    images: Sequence[int] = (),
    image_of: np.ndarray | None = None,
) -> tuple[Cut, ...]:
    """Return what every prune point of the decoder is told; the arguments are those of a ``Chunk`` and of ``run``."""
    visual = int(is_visual_S.sum())
    ratios = keep_ratios(plan, keep)[len(plan.budgets) - len(plan.points) :]
    if not visual and keep is not None and any(r < 1 for r in ratios):
        raise UsageError("a chunk without an image has nothing to prune; leave keep out")
    original = tuple(images) or ((visual_tokens or visual,) if visual else ())
    here = np.zeros(visual, np.int64) if image_of is None else image_of
    before = np.bincount(here, minlength=len(original)).tolist() if visual else []
    return cuts_of(plan, len(is_visual_S) - visual, before, original, None if keep is None else ratios)


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


def checked_priority(priority_S: np.ndarray | None, is_visual_S: np.ndarray, prunes: bool) -> np.ndarray:
    """Return the graph's ``priority``, float32 [1, S]; UsageError where it is needed and missing, or misshapen."""
    if priority_S is None:
        if prunes:
            raise UsageError(
                "this model is pruned by guidance from a small model, and none was given; "
                "build a bundle of both, or give a priority"
            )
        return np.zeros((1, len(is_visual_S)), np.float32)
    if priority_S.shape != is_visual_S.shape:
        raise UsageError(
            f"the priority has shape {priority_S.shape}, but the chunk has {len(is_visual_S)} rows; give one for each"
        )
    return priority_S.astype(np.float32)[None]


def image_index(is_visual_S: np.ndarray, image_of: np.ndarray | None) -> np.ndarray:
    """Return the image of every row, int64 [S], −1 for text; None: all visual rows are of one image."""
    index_S = np.full(len(is_visual_S), -1, np.int64)
    index_S[is_visual_S] = 0 if image_of is None else image_of
    return index_S

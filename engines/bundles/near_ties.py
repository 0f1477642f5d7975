"""A golden case beside what came out of it, where rounding may have kept another row.

In types narrower than fp32 two scores that attention gave may change places at a cut. Such a set of kept rows agrees
where it is ascending, within the rows in front of the cut, holds every row of text, and no more than a tenth of its
visual rows, or one, are others. Visual features are compared in the rows that both keep then; what a decoder gives
behind the cut cannot agree, so of that only type, shape and finite numbers are. Towers that merge rows (VisionZip,
ToMe) are held to their numbers all the same: an average of other rows is another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from graphs.compare import TOLERANCES, Comparison, compare, kept_overlap
from graphs.plan import BY_ATTENTION
from graphs.spec import ExportSpec, present_names

KEPT, IS_VISUAL = "kept_", "is_visual"
OTHERS = 0.1
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One run of one stage: what goes in and what must come out."""

    stage: str
    name: str
    inputs: Tensors
    outputs: Tensors


def kept_first(name: str) -> tuple[bool, int, str]:
    """Sorts outputs: rows kept in the order of the cuts, for where they differ, that is why every later number does."""
    number = name.removeprefix(KEPT)
    return not name.startswith(KEPT), int(number) if number.isdigit() else -1, name


def compared(case: Case, got: Tensors, spec: ExportSpec, allowed: float) -> Iterator[Comparison]:
    """Compare every tensor with its reference. got: by name, as ``kept_first`` sorts. allowed: the largest error."""
    both: tuple[np.ndarray, np.ndarray] | None = None
    behind: set[str] = set()
    for name, value in got.items():
        wanted = case.outputs[name]
        if name in behind:
            yield _uncompared(name, value, wanted, allowed)
        elif name.startswith(KEPT) and allowed > TOLERANCES["float32"] and _is_near_tie(name, value, case, spec):
            yield Comparison(name, allowed, overlap=kept_overlap(value, wanted))
            if case.stage == "vision":
                _, *places = np.intersect1d(value, wanted, return_indices=True)
                both = places[0], places[1]
            else:
                behind |= _behind(int(name.removeprefix(KEPT)), case, spec)
        elif both and value.shape[:1] == wanted.shape[:1] == got["kept_vision"].shape:
            whole = _uncompared(name, value, wanted, allowed)
            yield compare(name, value[both[0]], wanted[both[1]], allowed) if whole.agrees else whole
        else:
            yield compare(name, value, wanted, allowed)


def _is_near_tie(name: str, kept: np.ndarray, case: Case, spec: ExportSpec) -> bool:
    """Whether rows that are kept differ from the reference's, but only as rounding of scores can make them."""
    wanted = case.outputs[name]
    if kept.dtype != wanted.dtype or kept.shape != wanted.shape or np.array_equal(kept, wanted):
        return False
    rows, reference = kept.ravel(), wanted.ravel()
    if (np.diff(rows) <= 0).any() or rows[0] < 0:
        return False
    must: np.ndarray = np.zeros(0, np.int64)
    if case.stage != "vision":
        point = int(name.removeprefix(KEPT))
        if spec.plan.points[point].score not in BY_ATTENTION or IS_VISUAL not in case.inputs:
            return False
        visual = case.inputs[IS_VISUAL][0]
        for before in range(point):
            visual = visual[case.outputs[f"{KEPT}{before}"][0]]
        if rows[-1] >= len(visual):
            return False
        must = np.flatnonzero(~visual)
    others = int((~np.isin(rows, reference)).sum())
    return bool(np.isin(must, rows).all()) and others <= max(1, OTHERS * (len(rows) - len(must)))


def _behind(point: int, case: Case, spec: ExportSpec) -> set[str]:
    """What a decoder gives behind a prune point: all but the caches of the layers before it, and rows kept so far."""
    before = spec.plan.segments(spec.language.layers)[: point + 1]
    caches = {name for segment in before for layer in segment for name in present_names(layer)}
    return set(case.outputs) - caches - {f"{KEPT}{i}" for i in range(point + 1)}


def _uncompared(name: str, value: np.ndarray, wanted: np.ndarray, allowed: float) -> Comparison:
    """Held to the reference's type and shape, and to be finite, only."""
    if (value.dtype, value.shape) == (wanted.dtype, wanted.shape) and wanted.dtype.kind in "iub":
        return Comparison(name, allowed, compared=False)
    found = compare(name, value, wanted, math.inf)
    return replace(found, tolerance=allowed, error=None, compared=False)

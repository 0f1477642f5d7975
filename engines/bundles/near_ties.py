"""A golden case beside what came out of it, where rounding may have kept or merged another row.

In types narrower than fp32 two scores that attention gave may change places at a cut. Such a set of kept rows agrees
where it is ascending, in a decoder within the rows in front of the cut, holds every row of text, and no more than a
tenth of its visual rows, or one, are others. Visual features are compared in the rows that both keep then; what a
decoder gives behind the cut cannot agree, so of that only type, shape and finite numbers are. A tower that merges rows
(VisionZip, ToMe) decides of every row which other one it joins, ToMe in every layer, and one decision changes two
averages and what follows: two fifths of the first and of the last half of its rows (so of each of two images) must be
those of the reference, and none much shorter or longer than the reference's are; the share that agrees is told.
Legend: R rows that both keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from graphs.compare import TOLERANCES, Comparison, compare, kept_overlap, scale_of
from graphs.plan import BY_ATTENTION
from graphs.spec import ExportSpec, present_names

KEPT, KEPT_VISION, IS_VISUAL = "kept_", "kept_vision", "is_visual"
OTHERS = 0.1
# A CLIP-L of 24 layers, random weights: in fp16 (against a computation in fp32) 0.997 of VisionZip's rows and 0.775 of
# ToMe's were the reference's, in bf16 0.78 and 0.65.
SAME_OF_MERGED = 0.4
LIKE_OTHERS = 2.0  # how many times smaller or larger than any row of the reference a row may be
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
    if allowed <= TOLERANCES["float32"]:
        return _exactly(case, got, allowed)
    return (_of_tower if KEPT_VISION in got else _of_decoder)(case, got, spec, allowed)


def _exactly(case: Case, got: Tensors, allowed: float) -> Iterator[Comparison]:
    """Without near-ties."""
    return (compare(name, value, case.outputs[name], allowed) for name, value in got.items())


def _of_decoder(case: Case, got: Tensors, spec: ExportSpec, allowed: float) -> Iterator[Comparison]:
    """Numbers as far as rows are kept alike."""
    behind: set[str] = set()
    for name, value in got.items():
        wanted = case.outputs[name]
        if name in behind:
            yield _uncompared(name, value, wanted, allowed)
        elif name.startswith(KEPT) and _is_near_tie(name, value, case, spec):
            behind |= _behind(int(name.removeprefix(KEPT)), case, spec)
            yield Comparison(name, allowed, overlap=kept_overlap(value, wanted))
        else:
            yield compare(name, value, wanted, allowed)


def _of_tower(case: Case, got: Tensors, spec: ExportSpec, allowed: float) -> Iterator[Comparison]:
    """Features in the rows that both keep; of a tower that merges, how many are alike."""
    kept, wanted = got[KEPT_VISION], case.outputs[KEPT_VISION]
    merges = spec.plan.vision is not None and spec.plan.vision.merges
    if not (merges and _is_placed(kept, wanted)) and not _is_near_tie(KEPT_VISION, kept, case, spec):
        yield from _exactly(case, got, allowed)
        return
    yield Comparison(KEPT_VISION, allowed, overlap=kept_overlap(kept, wanted))
    _, ours, theirs = np.intersect1d(kept, wanted, return_indices=True)
    for name, value in got.items():
        reference = case.outputs[name]
        if name == KEPT_VISION:
            continue
        whole = _uncompared(name, value, reference, allowed)
        if not whole.agrees or value.shape[:1] != kept.shape:
            yield compare(name, value, reference, allowed)
        elif merges:
            yield _merged(name, value, reference, (ours, theirs), allowed)
        else:
            yield compare(name, value[ours], reference[theirs], allowed)


def _merged(
    name: str, got: np.ndarray, reference: np.ndarray, both: tuple[np.ndarray, np.ndarray], allowed: float
) -> Comparison:
    """Features row by row. both: where the rows that both keep are in either."""
    ours, theirs = both
    rows, wanted = (x.reshape(len(x), -1).astype(np.float64) for x in (got, reference))
    error_R = np.abs(rows[ours] - wanted[theirs]).max(axis=1, initial=0.0) / scale_of(wanted)
    same = np.zeros(len(reference), bool)
    same[theirs[error_R <= allowed]] = True
    share = float(same.mean()) if len(same) else 1.0
    halves = [half for half in np.array_split(same, 2) if len(half)]
    if any(half.mean() < SAME_OF_MERGED for half in halves):
        problem = (
            f"{int(same.sum())} of its {len(same)} rows agree within {allowed:g}, "
            f"and {SAME_OF_MERGED:.0%} of either half must"
        )
        return Comparison(name, allowed, overlap=share, problem=problem)
    size, sizes = (np.linalg.norm(x, axis=1) for x in (rows, wanted))
    if len(size) and (size.min() < sizes.min() / LIKE_OTHERS or size.max() > sizes.max() * LIKE_OTHERS):
        problem = (
            f"its rows are {size.min():.3g} to {size.max():.3g} long, the reference's {sizes.min():.3g} to "
            f"{sizes.max():.3g}"
        )
        return Comparison(name, allowed, overlap=share, problem=problem)
    return Comparison(name, allowed, error=float(error_R[error_R <= allowed].max(initial=0.0)), overlap=share)


def _is_near_tie(name: str, kept: np.ndarray, case: Case, spec: ExportSpec) -> bool:
    """Whether rows that are kept differ from the reference's, but only as rounding of scores can make them."""
    wanted = case.outputs[name]
    if not _is_placed(kept, wanted) or np.array_equal(kept, wanted):
        return False
    rows, reference = kept.ravel(), wanted.ravel()
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


def _is_placed(kept: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether rows are as many as the reference's, of its type, and in their order."""
    rows = kept.ravel()
    alike = kept.dtype == wanted.dtype and kept.shape == wanted.shape
    return alike and bool(rows.size) and not (np.diff(rows) <= 0).any() and bool(rows[0] >= 0)


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

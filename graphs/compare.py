"""The one comparison of tensors and the one tolerance table.

error = max |got − wanted| / max |wanted|, in float64, the divisor at least 0.001. Integer and boolean
tensors must be equal. For a set of kept rows the share in common is told beside it: a near-tie flips
one row, and then every later number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# dtype → largest error between two right implementations: other order of sums, other fused kernels.
# fp16 covers runtimes that compute in fp16 against a reference that may compute in fp32.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "float64": 1e-9}


@dataclass(frozen=True)
class Comparison:
    """How one tensor compares with its reference.

    error: see the module; None where it cannot be had (other shape or dtype) or does not apply (integers).
    overlap: for kept rows, the share of the reference's rows that were kept; for features of a tower that merges rows,
    the share that agrees, and error is theirs. compared: False where rows kept before it differ by a near-tie, behind
    which no number can agree. problem: None if they agree.
    """

    name: str
    tolerance: float
    error: float | None = None
    overlap: float | None = None
    compared: bool = True
    problem: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether got and wanted are the same within tolerance."""
        return self.problem is None

    def document(self) -> dict[str, object]:
        """As JSON writes it."""
        return {
            "tensor": self.name,
            "max_error": self.error,
            "tolerance": self.tolerance,
            "kept_overlap": self.overlap,
            "compared": self.compared,
            "problem": self.problem,
        }


SMALLEST_SCALE = 1e-3


def compare(name: str, got: np.ndarray, wanted: np.ndarray, tolerance: float | None = None) -> Comparison:
    """Compare a tensor with its reference; ``tolerance`` overrides the table's for the reference's dtype."""
    allowed = TOLERANCES.get(wanted.dtype.name, 0.0) if tolerance is None else tolerance
    if got.dtype != wanted.dtype:
        return Comparison(name, allowed, problem=f"it is {got.dtype.name}, wanted {wanted.dtype.name}")
    if got.shape != wanted.shape:
        return Comparison(name, allowed, problem=f"its shape is {list(got.shape)}, wanted {list(wanted.shape)}")
    if wanted.dtype.kind in "iub":
        return _compare_exactly(name, got, wanted)
    if not wanted.size:
        return Comparison(name, allowed, error=0.0)
    return _compare_within(name, got, wanted, allowed)


def scale_of(wanted: np.ndarray) -> float:
    """What an error is told in parts of: max |wanted|, at least 0.001."""
    return max(SMALLEST_SCALE, float(np.abs(wanted).max(initial=0.0)))


def kept_overlap(got: np.ndarray, wanted: np.ndarray) -> float:
    """The share of the wanted rows that are among the kept ones; 1 where nothing was wanted."""
    return float(np.isin(wanted, got).mean()) if wanted.size else 1.0


def _compare_exactly(name: str, got: np.ndarray, wanted: np.ndarray) -> Comparison:
    different = int((got != wanted).sum())
    overlap = kept_overlap(got, wanted) if name.startswith("kept_") else None
    if not different:
        return Comparison(name, 0.0, overlap=overlap)
    problem = f"{different} of {wanted.size} values differ"
    if overlap is not None:
        others = max(int((~np.isin(a, b)).sum()) for a, b in ((wanted, got), (got, wanted)))
        problem = f"{others} of {wanted.size} kept rows are others; numbers behind this point cannot agree"
    return Comparison(name, 0.0, overlap=overlap, problem=problem)


def _compare_within(name: str, got: np.ndarray, wanted: np.ndarray, tolerance: float) -> Comparison:
    got64, wanted64 = got.astype(np.float64), wanted.astype(np.float64)
    for values, whose in ((wanted64, "the reference has"), (got64, "it has")):
        if bad := int((~np.isfinite(values)).sum()):
            return Comparison(name, tolerance, problem=f"{whose} {bad} values that are NaN or infinite")
    difference = np.abs(got64 - wanted64)
    error = float(difference.max() / scale_of(wanted64))
    if error <= tolerance:
        return Comparison(name, tolerance, error=error)
    at = [int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape)]
    where = tuple(at)
    problem = (
        f"error {error:.2g} is above {tolerance:.2g} ({got64[where]:.6g} instead of {wanted64[where]:.6g} at {at})"
    )
    return Comparison(name, tolerance, error=error, problem=problem)

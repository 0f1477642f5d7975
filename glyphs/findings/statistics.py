"""Intervals and paired tests. N questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest


def share(right_N: np.ndarray) -> dict[str, Any]:
    """How many are right, their share, and its 95 % interval (Clopper–Pearson)."""
    right, n = int(right_N.sum()), len(right_N)
    interval = binomtest(right, n).proportion_ci(0.95, method="exact")
    return {"right": right, "share": right / n, "low": round(interval.low, 4), "high": round(interval.high, 4)}


def paired(a_N: np.ndarray, b_N: np.ndarray) -> dict[str, Any]:
    """McNemar's exact test of two settings on the same questions, two-sided."""
    only_a, only_b = int((a_N & ~b_N).sum()), int((b_N & ~a_N).sum())
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return {"difference": (only_a - only_b) / len(a_N), "only_first": only_a, "only_second": only_b, "p": float(p)}


def holm(tests: Sequence[dict[str, Any]]) -> None:
    """Adds ``p_holm`` to tests of one table: Holm's step-down correction for their number."""
    worst = 0.0
    for rank, test in enumerate(sorted(tests, key=lambda t: t["p"])):
        worst = max(worst, min(1.0, test["p"] * (len(tests) - rank)))
        test["p_holm"] = float(f"{worst:.3g}")
    for test in tests:
        test["p"] = float(f"{test['p']:.3g}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and greatest of a few repetitions."""
    return {"mean": float(np.mean(values)), "min": float(min(values)), "max": float(max(values))}


def mean_interval(values_N: np.ndarray) -> dict[str, float]:
    """A mean over questions and its 95 % interval by the normal approximation."""
    half = 1.96 * float(values_N.std(ddof=1)) / len(values_N) ** 0.5
    mean = float(values_N.mean())
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}

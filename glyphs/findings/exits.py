"""Finding iv: by which score of its own the small model should let the large one answer.

Of N questions, the c with the lowest score are the large model's; the accuracy over c/N is a curve, and the mean over
all c its area. Sources: SGL, arXiv 2412.03324, §3.3 (S and its two parts); entropy and quantile of the tokens'
probabilities after Gupta et al., arXiv 2404.10136. All of the small model's own greedy answer, its end token included.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glyphs.findings.guidance import Source, cuts_of
from glyphs.findings.work import Heard, Work

SAMPLES = 2000
POINTS = 10


def scores_of(heard: Heard) -> dict[str, np.ndarray]:
    """Each score, [N], the higher the surer."""
    confidence = np.exp(np.nanmean(heard.log_prob, 1))
    consistency, at_20, at_35 = np.exp(heard.consistency).T
    return {
        "S": (confidence + consistency) / 2,
        "S_confidence": confidence,
        "S_consistency": consistency,
        "S, second look at 20%": (confidence + at_20) / 2,
        "S, second look at 35%": (confidence + at_35) / 2,
        "S_consistency at 35%": at_35,
        "product": np.exp(np.nansum(heard.log_prob, 1)),
        "entropy": -np.nanmean(heard.entropy, 1),
        "quantile 0": np.nanmin(heard.log_prob, 1),
        "quantile 0.5": np.nanquantile(heard.log_prob, 0.5, axis=1),
    }


def curve(score_N: np.ndarray, small_N: np.ndarray, large_N: np.ndarray) -> np.ndarray:
    """Accuracy with 0, 1, … N calls of the large model, [N+1]; of equal scores the first question goes first."""
    order = np.argsort(score_N, kind="stable")
    gain = large_N[order].astype(int) - small_N[order]
    right: np.ndarray = (small_N.sum() + np.concatenate([[0], np.cumsum(gain)])) / len(score_N)
    return right


def resampled_areas(order_N: np.ndarray, small_N: np.ndarray, large_N: np.ndarray, weight_MN: np.ndarray) -> np.ndarray:
    """The curve's area over each of M resamples, [M]; weight_MN: how often each question is in it."""
    weight = weight_MN[:, order_N].astype(np.float64)
    gain = weight * (large_N[order_N].astype(int) - small_N[order_N])
    # A question of weight w is w calls in a row, each of which adds its gain once to all points behind it.
    calls_behind = weight.sum(1, keepdims=True) - np.cumsum(weight, 1) + (weight + 1) / 2
    total = weight.sum(1)
    areas: np.ndarray = ((weight_MN @ small_N) + (gain * calls_behind).sum(1) / (total + 1)) / total
    return areas


def exits(work: Work, small: list[str]) -> dict[str, Any]:
    """Every score's curve and area for each small model, with the large one whole and at three retentions."""
    weight_MN = np.random.default_rng(20261124).multinomial(work.n, [1 / work.n] * work.n, SAMPLES)
    rows, tests = [], []
    for name in small:
        heard = work.heard(name)
        for large, large_N in large_answers(work, name).items():
            scores = scores_of(heard)
            ways = {**scores, "best possible": -(large_N.astype(int) - heard.right)}
            areas = {
                way: resampled_areas(np.argsort(s, kind="stable"), heard.right, large_N, weight_MN)
                for way, s in ways.items()
            }
            for way, score_N in ways.items():
                line = curve(score_N, heard.right, large_N)
                low, high = np.quantile(areas[way], [0.025, 0.975])
                points = np.interp(np.linspace(0, work.n, POINTS + 1), range(work.n + 1), line)
                rows.append(_row(name, large, way, float(line.mean()), low, high, points))
            ends = np.array([heard.right.mean(), large_N.mean()])
            rows.append(
                _row(name, large, "random", float(ends.mean()), None, None, np.linspace(ends[0], ends[1], POINTS + 1))
            )
            for way in list(scores)[1:]:
                gap = areas["S"] - areas[way]
                low, high = np.quantile(gap, [0.025, 0.975])
                difference = (
                    curve(scores["S"], heard.right, large_N).mean() - curve(scores[way], heard.right, large_N).mean()
                )
                tests.append(
                    {
                        "small": name,
                        "large": large,
                        "against": way,
                        "difference": round(float(difference), 5),
                        "low": round(float(low), 5),
                        "high": round(float(high), 5),
                    }
                )
    return {"rows": rows, "tests": tests, "samples": SAMPLES}


def large_answers(work: Work, small: str) -> dict[str, np.ndarray]:
    """What the large model gets right: whole, and cut by this small model's guidance."""
    layers, visual = work.heard("large").received.shape[1::2]
    source = Source(small, tuple(range(work.heard(small).received.shape[1])))
    cuts = cuts_of(layers, visual)[:3]
    return {"100%": work.heard("large").right, **{cut.name: source.rights(work, cut) for cut in cuts}}


def _row(small: str, large: str, way: str, area: float, low: Any, high: Any, points: np.ndarray) -> dict[str, Any]:
    edges = {} if low is None else {"low": round(float(low), 4), "high": round(float(high), 4)}
    row = {"small": small, "large": large, "score": way, "area": round(area, 4), **edges}
    return {**row, "curve": [round(float(p), 4) for p in points]}

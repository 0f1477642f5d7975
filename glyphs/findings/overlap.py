"""Finding iii: how many of the large model's top visual tokens the small one names too.

Source: SGL, arXiv 2412.03324, §3.1. N questions, V visual tokens.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import rankdata

from glyphs.findings.guidance import cuts_of, shares_of
from glyphs.findings.models import best_visual
from glyphs.findings.statistics import mean_interval
from glyphs.findings.work import Work


def common(a_NV: np.ndarray, b_NV: np.ndarray, count: int) -> np.ndarray:
    """Share of the ``count`` best tokens of either that are among those of both, [N]."""
    chosen = [np.zeros(a_NV.shape, bool) for _ in range(2)]
    for mask, scores in zip(chosen, (a_NV, b_NV), strict=True):
        np.put_along_axis(mask, best_visual(scores, count), True, 1)
    shared_N: np.ndarray = (chosen[0] & chosen[1]).sum(1) / count
    return shared_N


def rank_correlation(a_NV: np.ndarray, b_NV: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each question's scores, [N]."""
    ranks = [rankdata(scores, axis=1) for scores in (a_NV, b_NV)]
    a, b = (r - r.mean(1, keepdims=True) for r in ranks)
    rho_N: np.ndarray = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return rho_N


def overlap(work: Work, small: list[str]) -> dict[str, Any]:
    """The overlap of several maps with the large model's over all layers, at the counts kept; chance is count/V."""
    large, visual = work.heard("large"), work.heard("large").received.shape[-1]
    every = tuple(range(large.received.shape[1]))
    whole_NV = large.scores(every, "both")
    counts = sorted({cut.count for cut in cuts_of(len(every), visual)}, reverse=True)
    maps: dict[str, np.ndarray] = {}
    for name in small:
        heard = work.heard(name)
        for part, layers in shares_of(heard.received.shape[1]).items():
            maps[f"{name}: {part}"] = heard.scores(layers, "both")
        for i in range(heard.received.shape[1]):
            maps[f"{name}: layer {i}"] = heard.scores((i,), "both")
    for i in every:
        maps[f"large: layer {i}"] = large.scores((i,), "both")
    maps["random"] = np.random.default_rng([0, 20261123]).random(whole_NV.shape)
    pairs = [(name, scores, whole_NV) for name, scores in maps.items()]
    pairs += [(f"{a} and {b}", maps[f"{a}: all"], maps[f"{b}: all"]) for a, b in combinations(small, 2)]
    rows = [
        {
            "maps": name,
            "at": [mean_interval(common(a, b, count)) for count in counts],
            "rank_correlation": mean_interval(rank_correlation(a, b)),
        }
        for name, a, b in pairs
    ]
    return {"counts": counts, "chance": [count / visual for count in counts], "rows": rows}

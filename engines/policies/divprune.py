"""DivPrune: the tokens that lie farthest from each other, by cosine distance; text-free.

    first: argmax_v min_{u ≠ v} d(v, u);   then: argmax_v min_{chosen u} d(v, u);   d = 1 − cosine

Source: DivPrune, arXiv 2503.02175, max–min diversity, solved greedily; ties go to the lower index.
Legend: V visual tokens, D width, K tokens that stay, P rows of a piece.
"""

from __future__ import annotations

import numpy as np

PIECE = 1024


def chosen(embeds_VD: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` tokens that stay, int64 ascending. No V×V map is kept: only the first step looks at all pairs."""
    unit_VD = unit(embeds_VD)
    nearest_V = np.empty(len(unit_VD))
    for start in range(0, len(unit_VD), PIECE):
        distance_PV = 1 - unit_VD[start : start + PIECE] @ unit_VD.T
        rows = np.arange(len(distance_PV))
        distance_PV[rows, start + rows] = np.inf
        nearest_V[start : start + PIECE] = distance_PV.min(axis=1)
    order = [int(nearest_V.argmax())]
    distance_V = np.full(len(unit_VD), np.inf)
    while len(order) < count:
        distance_V = np.minimum(distance_V, 1 - unit_VD @ unit_VD[order[-1]])
        distance_V[order] = -np.inf
        order.append(int(distance_V.argmax()))
    return np.sort(order)


def unit(x_VD: np.ndarray) -> np.ndarray:
    """Rows of length 1 in float64; a row of zeros stays one."""
    wide_VD = x_VD.astype(np.float64)
    norm_V1 = np.linalg.norm(wide_VD, axis=1, keepdims=True)
    return np.asarray(wide_VD / np.where(norm_V1 > 0, norm_V1, 1))

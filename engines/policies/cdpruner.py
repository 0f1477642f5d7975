"""CDPruner: tokens that are relevant to the question and unlike each other, by greedy MAP of a DPP.

    L_ij = r_i · cosine(i, j) · r_j;   each step takes the token of largest conditional variance
    r = (s − min s + 1e-6) / (max s − min s),   s_i = mean_g cosine(visual_i, text_g)

Source: CDPruner, arXiv 2506.10967, authors' code Theia-4869/CDPruner ed9c12d. Theirs takes s from CLIP's text tower
(negated, as CLIP's patches want it); here it is the language model's own: projected visual embeddings against
the embeddings of the text behind the image, not negated. Legend: V visual tokens, D width, G text rows, K that stay.
"""

from __future__ import annotations

import numpy as np

from engines.policies.divprune import unit

SMALLEST = 1e-10


def chosen(embeds_VD: np.ndarray, text_GD: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` tokens that stay, int64 ascending; rows of the kernel are made as they are needed."""
    unit_VD = unit(embeds_VD)
    relevance_V = relevance(unit_VD, unit(text_GD))
    variance_V = relevance_V**2
    factor_KV = np.zeros((count, len(unit_VD)))
    order: list[int] = []
    for i in range(count):
        best = int(variance_V.argmax())
        kernel_V = relevance_V[best] * (unit_VD @ unit_VD[best]) * relevance_V
        new_V = kernel_V - factor_KV[:i, best] @ factor_KV[:i]
        factor_KV[i] = new_V / np.sqrt(max(variance_V[best], SMALLEST))
        variance_V = variance_V - factor_KV[i] ** 2
        order.append(best)
        variance_V[order] = -np.inf
    return np.sort(order)


def relevance(unit_VD: np.ndarray, unit_GD: np.ndarray) -> np.ndarray:
    """Mean cosine to the text, stretched to [0, 1]; 1 for all where there is no text or no difference."""
    if not len(unit_GD):
        return np.ones(len(unit_VD))
    score_V = (unit_VD @ unit_GD.T).mean(axis=1)
    spread = score_V.max() - score_V.min()
    return np.asarray((score_V - score_V.min() + 1e-6) / spread) if spread > 0 else np.ones(len(unit_VD))

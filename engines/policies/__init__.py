"""Policies that the host runs between the vision and the embed stage, in numpy; one file each.

A greedy loop of V' steps, each waiting for the last one's argmax, is V' small kernels on a device and one line here;
what it reads is the visual embeddings, a few megabytes. So the graph gives every token, and the host chooses.
Legend: V visual tokens, D width, G text rows, K tokens that stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engines.policies import cdpruner, divprune
from graphs.errors import OperationFailed
from graphs.plan import VisionPoint


def chosen(
    point: VisionPoint, embeds_VD: np.ndarray, text_GD: np.ndarray, tokens: Sequence[int], keep: float | None = None
) -> np.ndarray:
    """The visual tokens that stay, int64 ascending, by the point's score; ``keep`` instead of its own share.

    tokens: how many of the V each image has, in order; their sum is V.
    """
    if not np.isfinite(embeds_VD).all():
        raise OperationFailed("visual embeddings are not numbers (NaN or infinite); replay them with: saccade verify")
    everything = np.arange(len(embeds_VD))
    parts = np.split(everything, np.cumsum(tokens)[:-1]) if point.per_image else [everything]
    kept = []
    for image, part in enumerate(parts):
        count = point.carriers(len(part), 1, keep)["keep_vision"]
        kept.append(part[_of_one(point, embeds_VD[part], text_GD, count, image)])
    return np.concatenate(kept)


def _of_one(point: VisionPoint, embeds_VD: np.ndarray, text_GD: np.ndarray, count: int, image: int) -> np.ndarray:
    if point.score == "divprune":
        return divprune.chosen(embeds_VD, count)
    if point.score == "cdpruner":
        return cdpruner.chosen(embeds_VD, text_GD, count)
    draw = np.random.default_rng([point.seed, image])
    return np.sort(draw.permutation(len(embeds_VD))[:count])

"""The ops written plainly in numpy, one number at a time where that is clearest; and drawn inputs.

Legend: B batch, H query heads, V key-value heads, S rows, T keys, D head width, G guide rows, K kept rows.
"""

from __future__ import annotations

import numpy as np
import torch

SCALE = 0.37


def received(q: np.ndarray, k: np.ndarray, weight_BG: np.ndarray) -> np.ndarray:
    """Σ over heads and guide rows of the softmax row times its weight, in float64."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    (batch, heads, rows, _), (_, groups, keys, _), guides = q.shape, k.shape, weight_BG.shape[1]
    out = np.zeros((batch, keys))
    for b in range(batch):
        for h in range(heads):
            for g in range(guides):
                seen = keys - guides + g + 1
                logit = k[b, h // (heads // groups), :seen] @ q[b, h, rows - guides + g] * SCALE
                share = np.exp(logit - logit.max())
                out[b, :seen] += weight_BG[b, g] * share / share.sum()
    return out


def kept(score_BS: np.ndarray, is_visual_BS: np.ndarray, keep: int) -> np.ndarray:
    """Text before visual, then the higher score, then the lower index; in order."""
    out = []
    for score, visual in zip(score_BS.tolist(), is_visual_BS.tolist(), strict=True):
        finite = [-np.inf if np.isnan(x) else min(x, np.finfo(np.float32).max) for x in score]
        places = sorted(range(len(score)), key=lambda i: (True, -finite[i], i) if visual[i] else (False, 0.0, i))
        out.append(sorted(places[:keep]))
    return np.array(out, np.int64)


def drawn(*shape: int, seed: int = 0, dtype: str = "fp32", spread: float = 2.0) -> np.ndarray:
    """Normal numbers, rounded to ``dtype`` and given as fp32."""
    numbers = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(spread)
    return rounded(numbers, dtype)


def rounded(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 numbers that ``dtype`` holds exactly."""
    return torch.from_numpy(numbers).to(TORCH[dtype]).float().numpy()


def typed(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """The same numbers in ``dtype``; bf16 as its bits."""
    tensor = torch.from_numpy(numbers).to(TORCH[dtype])
    return (tensor.view(torch.uint16) if dtype == "bf16" else tensor).numpy()


TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def carrier(length: int) -> np.ndarray:
    """Its values must never be read."""
    return np.full(length, 7, np.int32)

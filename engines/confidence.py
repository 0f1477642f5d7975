"""Is the small model's answer good enough? SGL's early exit (arXiv 2412.03324 §3.3).

Legend: N tokens of the small model's own greedy answer (end token included), V vocabulary.

    S_confidence  = exp(1/N · Σ log p(x_i)),   from the run that made the answer
    S_consistency = Π p(x_i) = exp(Σ log p(x_i)),   from one teacher-forced pass whose visual tokens
                    were cut to 5 % at layer 0 by the guidance
    S = ½ · (S_confidence + S_consistency)

All in float64 from float32 logits; a product is a sum of logs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from engines.decoder import Chunk, following
from engines.guidance import top_visual

if TYPE_CHECKING:
    from engines.model import Model
    from engines.talk.prompt import Prompt

CONSISTENCY_KEEP = 0.05


@dataclass(frozen=True)
class Confidence:
    """The two scores of an answer and their mean."""

    confidence: float
    consistency: float

    @property
    def score(self) -> float:
        """S, what the exit threshold is held against."""
        return 0.5 * (self.confidence + self.consistency)


def log_probs(logits_NV: np.ndarray, tokens_N: Sequence[int]) -> np.ndarray:
    """Return log softmax(logits)[i, token i], float64 [N]."""
    below_NV = np.subtract(logits_NV, logits_NV.max(axis=-1, keepdims=True), dtype=np.float64)
    chosen_N: np.ndarray = below_NV[np.arange(len(tokens_N)), np.asarray(tokens_N)]
    return chosen_N - np.log(np.exp(below_NV, out=below_NV).sum(axis=-1))


def confidence_of(log_prob_N: np.ndarray) -> float:
    """Return S_confidence of an answer's log-probabilities."""
    return float(np.exp(log_prob_N.mean()))


def consistency_of(
    model: Model, prompt: Prompt, tokens: Sequence[int], guidance_V: np.ndarray, keep: float = CONSISTENCY_KEEP
) -> float:
    """Return S_consistency: the answer's probability when only the best visual tokens are there at all.

    The rows are dropped before layer 0, on the host, and keep their original positions; the answer
    but for its last token follows the prompt, and the last N rows score it. A cache in front of the chunk that holds
    text alone stays what it is; otherwise every row is fed again.
    """
    past = None if prompt.visual_before else prompt.past
    whole = prompt.chunk if past else prompt.whole or prompt.chunk
    positions, is_visual_S = cast(np.ndarray, whole.positions), whole.is_visual
    stays_S = ~is_visual_S
    stays_S[np.flatnonzero(is_visual_S)[top_visual(guidance_V, keep)]] = True
    rows = np.flatnonzero(stays_S)
    prompt_embeds = model.to_host(whole.inputs_embeds)[:, rows]
    fed = list(tokens[:-1])
    parts = [prompt_embeds, model.to_host(model.embed_text(fed))] if fed else [prompt_embeds]
    chunk = Chunk(
        inputs_embeds=np.concatenate(parts, axis=1),
        is_visual=np.concatenate([is_visual_S[rows], np.zeros(len(fed), bool)]),
        positions=np.concatenate([positions[..., rows], following(positions, len(fed))], axis=-1),
        deepstack={name: _rows_of(model.to_host(x), rows, len(fed)) for name, x in whole.deepstack.items()},
    )
    step = model.decoder.run(chunk, past, tail=len(tokens), guided=False)
    return float(np.exp(log_probs(step.logits, tokens).sum()))


def _rows_of(feature_1SD: np.ndarray, rows: np.ndarray, text: int) -> np.ndarray:
    """The given rows, and rows of zeros for text behind them."""
    return np.pad(feature_1SD[:, rows], ((0, 0), (0, text), (0, 0)))

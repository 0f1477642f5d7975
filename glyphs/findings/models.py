"""A LLaVA of the pair under eager PyTorch: whole and pruned passes over lines, and the maps of every layer.

A pruned token's rows are physically gone from a layer on and the others keep their positions. An answer is right
where every token of it is the most likely one behind the tokens before it, which is when greedy decoding gives it; so
one pass over question and answer stands for a generation.
Legend: N questions, B of them in a batch, L layers, R rows, P prefix rows, T tail rows, V visual tokens, K kept ones,
G groups of guide rows, D width, H heads, d head width, W words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from glyphs.data import Question
from glyphs.findings.lines import Lines
from glyphs.packed import pixels_from_images, visual_tokens

ATTENTION = "glyphs_findings"
BATCH = 50


class Watch:
    """What the attention of the layers that run now gives each row from groups of the last rows; summed over heads.

    groups: [B,G,T] of zeros and ones, or None where nobody watches; received: one [B,G,R] per layer.
    """

    def __init__(self) -> None:
        self.groups: torch.Tensor | None = None
        self.received: list[torch.Tensor] = []

    @contextmanager
    def on(self, groups_BGT: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Watch until the block ends."""
        self.groups, self.received = groups_BGT, []
        try:
            yield self.received
        finally:
            self.groups = None

    def take(self, q_BHRd: torch.Tensor, k_BHRd: torch.Tensor, scaling: float) -> None:
        """Add one layer's sums."""
        assert self.groups is not None
        rows, tail = k_BHRd.shape[2], self.groups.shape[2]
        logits_BHTR = q_BHRd[:, :, -tail:] @ k_BHRd.transpose(2, 3) * scaling
        later = torch.ones(tail, rows, dtype=torch.bool).triu(rows - tail + 1)
        map_BTR = logits_BHTR.masked_fill(later, -torch.inf).softmax(-1).sum(1)
        self.received.append(self.groups @ map_BTR)


WATCH = Watch()


def attention(module, query, key, value, attention_mask, scaling: float, **_) -> tuple[torch.Tensor, None]:
    """Causal in the decoder, everything to everything in the tower; [B,R,H,d]."""
    causal = hasattr(module, "num_key_value_groups")
    if causal and module.num_key_value_groups > 1:
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    if causal and WATCH.groups is not None:
        WATCH.take(query, key, scaling)
    out = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)


class Seer:
    """A checkpoint and the visual tokens of all questions, [N,V,D]."""

    def __init__(self, checkpoint: Path, questions: list[Question]) -> None:
        self.hf = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.hf.set_attn_implementation(ATTENTION)
        self.language = self.hf.model.language_model
        self.layers = len(self.language.layers)
        with torch.inference_mode():
            parts = []
            for at in range(0, len(questions), BATCH):
                pixels = np.stack([np.asarray(q.image) for q in questions[at : at + BATCH]])
                parts.append(visual_tokens(self.hf, pixels_from_images(pixels)))
            self.visual_NVD = torch.cat(parts)

    def start(self, lines: Lines, part: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [B,P+T,D] before layer 0 and their positions [B,P+T]."""
        words_PD = self.language.embed_tokens(lines.prefix)
        head_BPD = words_PD.expand(len(part), -1, -1).clone()
        visual_BVD = self.visual_NVD[torch.as_tensor(part)]
        head_BPD[:, lines.first : lines.first + visual_BVD.shape[1]] = visual_BVD
        rows_BRD = torch.cat((head_BPD, self.language.embed_tokens(lines.tail_ids(part))), 1)
        return rows_BRD, torch.arange(rows_BRD.shape[1]).expand(len(part), -1)

    def run(self, rows_BRD: torch.Tensor, positions_BR: torch.Tensor, layers: range) -> torch.Tensor:
        """The rows behind the last of ``layers``."""
        rotary = self.language.rotary_emb(rows_BRD, position_ids=positions_BR)
        for i in layers:
            rows_BRD = self.language.layers[i](
                rows_BRD,
                attention_mask=None,
                position_embeddings=rotary,
                position_ids=positions_BR,
                use_cache=False,
            )
        return rows_BRD

    def log_probs(self, rows_BRD: torch.Tensor, lines: Lines, part: np.ndarray) -> list[torch.Tensor]:
        """For each line the distributions of its answer's tokens, [n,W], from the rows behind the last layer."""
        tail = max(len(lines.tails[i]) for i in part)
        logits_BTW = self.hf.lm_head(self.language.norm(rows_BRD[:, -tail:])).double().log_softmax(-1)
        return [logits_BTW[b, lines.prompt_rows(i) - 1 : len(lines.tails[i])] for b, i in enumerate(part)]


def kept_rows(lines: Lines, kept_BK: torch.Tensor, rows: int, visual: int) -> torch.Tensor:
    """Which of ``rows`` rows stay, int64 [B,R'], ascending; kept_BK: visual tokens, ascending."""
    every = torch.arange(rows).expand(len(kept_BK), -1)
    return torch.cat((every[:, : lines.first], kept_BK + lines.first, every[:, lines.first + visual :]), 1)


def gathered(rows_BRD: torch.Tensor, index_BK: torch.Tensor) -> torch.Tensor:
    """The rows of ``index_BK``."""
    return rows_BRD.gather(1, index_BK[..., None].expand(-1, -1, rows_BRD.shape[2]))


def best_visual(scores_NV: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` visual tokens of highest score of each row, ascending, int64 [N,count]; of equals the first."""
    order = np.argsort(-scores_NV.astype(np.float64), axis=1, kind="stable")
    return np.sort(order[:, :count], axis=1)

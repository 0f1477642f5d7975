"""A decoder written plainly in float64 torch: whole maps, rows really dropped, no cache, nothing of the tool's.

Legend: S rows, H heads, D width, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class Rows:
    """What a policy may look at before it cuts: the rows that are alive, as indices into the prompt's.

    attention: [H, S, S], softmaxed, causal, of the layer before, over its rows (which are these). hidden: [S, D], what
    enters the layer behind the cut. embeds: [S, D], what entered the decoder, of all prompt rows. plain: the decoder.
    """

    layer: int
    alive: torch.Tensor
    is_visual: torch.Tensor  # of all prompt rows
    positions: torch.Tensor
    hidden: torch.Tensor
    embeds: torch.Tensor
    attention: torch.Tensor
    plain: PlainDecoder = field(repr=False)

    @property
    def visual(self) -> torch.Tensor:
        """bool over the alive rows."""
        return self.is_visual[self.alive]

    @property
    def text_after(self) -> torch.Tensor:
        """bool over the alive rows: text behind the last image."""
        last = int(self.is_visual.nonzero().max())
        return self.alive > last


Score = Callable[[Rows], torch.Tensor]  # one value per alive row; text rows' are not read


class PlainDecoder:
    """The language model of a transformers LVLM in float64."""

    def __init__(self, language: torch.nn.Module, lm_head: torch.nn.Module, config) -> None:
        self.language, self.lm_head, self.c = language.double(), lm_head.double(), config
        self.d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @torch.no_grad()
    def run(self, embeds_SD, is_visual, cuts: dict[int, tuple[Score | None, int]], positions=None, forced=None):
        """Logits [S', V] and the alive rows behind each cut.

        cuts: layer → (score, how many visual tokens stay), or a function of the score and the ``Rows``: it says which
        rows stay, and what stands in all of them then. forced: the rows to keep at each cut instead.
        """
        alive = torch.arange(len(embeds_SD))
        positions = alive if positions is None else torch.as_tensor(positions)
        x_SD, kept, map_HSS = embeds_SD.double(), [], None
        embeds_SD = x_SD
        for i, layer in enumerate(self.language.layers):
            if i in cuts:
                score, count = cuts[i]
                if forced is not None:
                    stays = torch.isin(alive, forced[len(kept)])
                else:
                    rows = Rows(i, alive, is_visual, positions, x_SD, embeds_SD, map_HSS, self)
                    if callable(count):
                        stays, x_SD = count(score(rows), rows)
                    else:
                        stays = chosen(score(rows), rows.visual, count)
                x_SD, alive = x_SD[stays], alive[stays]
                kept.append(alive)
            q, k, v = self.qkv(i, x_SD, positions[alive])
            map_HSS = self.attention_map(q, k)
            h = (map_HSS @ v).transpose(0, 1).reshape(len(alive), -1)
            x_SD = x_SD + layer.self_attn.o_proj(h)
            x_SD = x_SD + layer.mlp(layer.post_attention_layernorm(x_SD))
        return self.lm_head(self.language.norm(x_SD)), kept

    def qkv(self, i, x_SD, positions):
        """Of layer i, keys and values repeated to all heads: [H, S, d] each."""
        layer, a = self.language.layers[i], self.language.layers[i].self_attn
        y, s = layer.input_layernorm(x_SD), len(x_SD)
        q, k, v = (p(y).view(s, -1, self.d).transpose(0, 1) for p in (a.q_proj, a.k_proj, a.v_proj))
        if hasattr(a, "q_norm"):
            q, k = a.q_norm(q), a.k_norm(k)
        theta = self.c.rope_parameters["rope_theta"]
        angle = positions[:, None].double() * theta ** (-torch.arange(0, self.d, 2).double() / self.d)
        q, k = (turned(z, angle.cos(), angle.sin()) for z in (q, k))
        times = q.shape[0] // k.shape[0]
        return q, k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)

    def attention_map(self, q, k):
        logit = q @ k.transpose(1, 2) / self.d**0.5
        hidden = ~torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
        return logit.masked_fill(hidden, -torch.inf).softmax(-1)


def turned(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def chosen(score_S, visual, count):
    """Text, and the ``count`` visual rows of highest score by plain sorting; of equals the first."""
    rows = visual.nonzero()[:, 0].tolist()
    best = sorted(rows, key=lambda r: (-float(score_S[r]), r))[:count]
    stays = ~visual
    stays[best] = True
    return stays


def share(tokens: int, keep: float) -> int:
    """int(N·r) of exact decimals, at least 1."""
    from fractions import Fraction

    return max(1, int(Fraction(str(keep)) * tokens))


def numpy(x):
    return np.asarray(x)

"""A Llama decoder by hand in float64: plain attention maps, original positions, pruned rows as masked columns.

Legend: T rows of the whole sequence, D width, H heads, d head width.
"""

from collections.abc import Callable

import torch

Maps = list[torch.Tensor]  # per layer [H, T, T]


def forward(
    model: torch.nn.Module,
    x_TD: torch.Tensor,
    dropped_before: Callable[[int, Maps], torch.Tensor | None] = lambda _, __: None,
) -> tuple[torch.Tensor, Maps]:
    """Logits [T, vocab] and every layer's map, of embeddings in float64.

    ``dropped_before(layer, maps so far)`` gives bool [T], the rows nobody sees from this layer on.
    """
    llama, c = model.model.language_model, model.config.text_config
    h, v = c.num_attention_heads, c.num_key_value_heads
    t, d = x_TD.shape[0], c.hidden_size // h
    angle = torch.arange(t).double()[:, None] / c.rope_parameters["rope_theta"] ** (torch.arange(0, d, 2).double() / d)
    cos, sin = angle.cos(), angle.sin()
    seen_TT = torch.ones(t, t, dtype=torch.bool).tril()
    maps: Maps = []

    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt()

    for i, layer in enumerate(llama.layers):
        dropped_T = dropped_before(i, maps)
        if dropped_T is not None:
            seen_TT = seen_TT & ~dropped_T | torch.eye(t, dtype=torch.bool)
        a, m = layer.self_attn, layer.mlp
        y = normed(x_TD, layer.input_layernorm.weight)
        q, k, u = (p(y).view(t, -1, d).transpose(0, 1) for p in (a.q_proj, a.k_proj, a.v_proj))
        k, u = turned(k).repeat_interleave(h // v, 0), u.repeat_interleave(h // v, 0)
        map_HTT = (turned(q) @ k.transpose(1, 2) / d**0.5).masked_fill(~seen_TT, -torch.inf).softmax(-1)
        maps.append(map_HTT)
        x_TD = x_TD + a.o_proj((map_HTT @ u).transpose(0, 1).reshape(t, -1))
        y = normed(x_TD, layer.post_attention_layernorm.weight)
        x_TD = x_TD + m.down_proj(torch.nn.functional.silu(m.gate_proj(y)) * m.up_proj(y))
    return model.lm_head(normed(x_TD, llama.norm.weight)), maps


def best(score_T: torch.Tensor, among: list[int], count: int) -> list[int]:
    """The ``count`` rows of highest score, ascending; of equals the first."""
    return sorted(sorted(among, key=lambda i: (-float(score_T[i]), i))[:count])

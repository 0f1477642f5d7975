"""A pruned decoder written with plain attention maps: Hugging Face's own layers, eager, over the whole sequence.

No cache, no gather: a dropped row stays where it is and is hidden by the mask from its layer on. One forward
pass per generated token. Legend: T rows of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from graphs.plan import PruningPlan


@dataclass
class Reference:
    """Logits of the last row, and the rows that are visible behind each prune point."""

    logits: torch.Tensor
    kept: list[list[int]]


@torch.no_grad()
def pruned_forward(
    language: Any,
    head: Any,
    embeds_1TD: torch.Tensor,
    positions: torch.Tensor,
    is_visual_T: torch.Tensor,
    plan: PruningPlan,
    keep: tuple[int, ...],
    priority_T: torch.Tensor,
    prompt: int,
    kept: list[list[int]] | None = None,
    deepstack: list[torch.Tensor] | None = None,
) -> Reference:
    """One pass. prompt: rows that are the prompt; ``kept``: rows chosen in the prompt's own pass, None to choose."""
    language.config._attn_implementation = "eager"
    rows = embeds_1TD.shape[1]
    hidden, visible = embeds_1TD, torch.ones(rows, dtype=torch.bool)
    rotary = language.rotary_emb(hidden, positions)
    maps: list[torch.Tensor] = []
    chosen: list[list[int]] = []
    hooks = [layer.self_attn.register_forward_hook(lambda _, __, out: maps.append(out[1])) for layer in language.layers]
    last_visual = int(is_visual_T[:prompt].nonzero()[-1]) if is_visual_T.any() else -1
    try:
        for i, layer in enumerate(language.layers):
            for number, point in enumerate(plan.points):
                if point.layer != i:
                    continue
                if kept is None:
                    guides = {"text": range(last_visual + 1, prompt), "last": range(prompt - 1, prompt)}[point.rows]
                    score = maps[-1][0][:, list(guides)].sum((0, 1)) if point.score == "attention" else priority_T
                    candidates = [t for t in range(prompt) if visible[t] and is_visual_T[t]]
                    best = sorted(candidates, key=lambda t: (-float(score[t]), t))[: keep[number]]
                    stay = sorted([*best, *(t for t in range(prompt) if not is_visual_T[t])])
                else:
                    stay = kept[number]
                chosen.append(stay)
                visible = torch.ones(rows, dtype=torch.bool)
                visible[[t for t in range(prompt) if t not in stay]] = False
            seen_TT = torch.ones(rows, rows, dtype=torch.bool).tril() & visible | torch.eye(rows, dtype=torch.bool)
            mask = torch.zeros(rows, rows, dtype=hidden.dtype).masked_fill(~seen_TT, torch.finfo(hidden.dtype).min)
            out = layer(hidden, attention_mask=mask[None, None], position_ids=None, position_embeddings=rotary)
            hidden = out if isinstance(out, torch.Tensor) else out[0]
            if deepstack is not None and i < len(deepstack):
                hidden = hidden + deepstack[i]
    finally:
        for hook in hooks:
            hook.remove()
    return Reference(head(language.norm(hidden[:, -1:]))[0, 0], chosen)


@torch.no_grad()
def guidance_of(
    language: Any,
    embeds_1TD: torch.Tensor,
    positions: torch.Tensor,
    is_visual_T: torch.Tensor,
    deepstack: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """SGL's A: attention that each visual row receives from all rows behind the last image, over layers and heads."""
    language.config._attn_implementation = "eager"
    rows, hidden, received = embeds_1TD.shape[1], embeds_1TD, torch.zeros(embeds_1TD.shape[1])
    guides = torch.arange(rows) > int(is_visual_T.nonzero()[-1])
    rotary = language.rotary_emb(hidden, positions)
    mask = torch.full((rows, rows), torch.finfo(hidden.dtype).min).triu(1)[None, None]
    maps: list[torch.Tensor] = []
    hooks = [layer.self_attn.register_forward_hook(lambda _, __, out: maps.append(out[1])) for layer in language.layers]
    try:
        for i, layer in enumerate(language.layers):
            out = layer(hidden, attention_mask=mask, position_ids=None, position_embeddings=rotary)
            hidden = out if isinstance(out, torch.Tensor) else out[0]
            if deepstack is not None and i < len(deepstack):
                hidden = hidden + deepstack[i]
    finally:
        for hook in hooks:
            hook.remove()
    for attention in maps:
        received += attention[0][:, guides].sum((0, 1))
    return received[is_visual_T]

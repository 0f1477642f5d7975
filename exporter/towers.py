"""Vision towers whose inside a pruning policy looks at: hidden states, class token, q and k of a layer.

Legend: N images, T tokens of an image, C tower width, H heads, d head width.
Only CLIP towers of LLaVA are known here: one tower token is one visual token there, which InternVL's pixel
shuffle, anyres' unpadding and Qwen's merger do not give, and the published methods define nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from exporter.family import Family
from graphs.errors import UsageError
from graphs.plan import PruningPlan, VisionPoint

NEEDS_TOWER = ("cls", "zip", "tome")


@dataclass(frozen=True)
class ClipTower:
    """A CLIP tower behind LLaVA's projector. chosen: indices of the hidden states that the projector takes."""

    model: Any

    @property
    def layers(self) -> Sequence[Any]:
        """The encoder's layers."""
        return self.model.model.vision_tower.encoder.layers

    @property
    def chosen(self) -> tuple[int, ...]:
        """Which hidden states the projector takes, counted from 0 (the embeddings)."""
        named = self.model.config.vision_feature_layer
        named = (named,) if isinstance(named, int) else tuple(named)
        return tuple(i % (len(self.layers) + 1) for i in named)

    @property
    def watched(self) -> int:
        """The layer whose output is the last of the chosen: its attention is looked at."""
        return max(self.chosen) - 1

    def embedded(self, pixels: torch.Tensor) -> torch.Tensor:
        """What enters layer 0: [N,1+T,C], the class token first."""
        tower = self.model.model.vision_tower
        return tower.pre_layrnorm(tower.embeddings(pixels))

    def features(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """The chosen hidden states side by side, without the class token: [N,T,C]."""
        return torch.cat([hidden[i][:, 1:] for i in self.chosen], dim=-1)

    def hidden_states(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """What enters each layer, and the output of the last one that matters; each [N,1+T,C]."""
        hidden = [self.embedded(pixels)]
        for layer in self.layers[: max(self.chosen)]:
            hidden.append(layer(hidden[-1], None))
        return hidden

    def queries_and_keys(self, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """q of the class token [N,H,1,d], k of all [N,H,1+T,d] in this layer, and the scale."""
        block = self.layers[layer]
        y = block.layer_norm1(hidden)
        return self.heads(block.self_attn.q_proj(y[:, :1])), self.keys(layer, y), block.self_attn.scale

    def keys(self, layer: int, normed: torch.Tensor) -> torch.Tensor:
        """k of a layer for its normed input: [N,H,1+T,d]."""
        return self.heads(self.layers[layer].self_attn.k_proj(normed))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """[N,S,C] → [N,H,S,d]."""
        return x.unflatten(2, (-1, self.layers[0].self_attn.head_dim)).transpose(1, 2)

    def projected(self, features: torch.Tensor) -> torch.Tensor:
        """[N,T,C] → [N,T,D]."""
        return self.model.model.multi_modal_projector(features)


def tower_for(family: str, model: Any, point: VisionPoint) -> ClipTower | None:
    """The tower a vision point looks into, None where it needs none; UsageError where this family has no such."""
    if point.score not in NEEDS_TOWER:
        return None
    if family != "llava":
        raise UsageError(
            f"score {point.score!r} looks into a tower with one token per visual token and a class token (CLIP, in "
            f"LLaVA-1.5), which {family} has not; use score 'received', which every family has"
        )
    tower = model.model.vision_tower
    if not hasattr(getattr(tower, "embeddings", None), "class_embedding"):
        raise UsageError(
            f"score {point.score!r} needs a vision tower with a class token, and {type(tower).__name__} has none; "
            "use score 'received'"
        )
    clip = ClipTower(model)
    if point.score == "tome" and len(clip.chosen) > 1:
        raise UsageError(
            "score 'tome' merges tokens from layer to layer, so features of several layers do not fit together, and "
            f"this checkpoint takes {list(clip.chosen)}; use another policy"
        )
    return clip


def with_tower(plan: PruningPlan, model: Any, family: Family) -> PruningPlan:
    """The plan with what a runtime has to know of the tower; UsageError where this family's tower does not serve."""
    if not plan.vision:
        return plan
    tower = tower_for(family.name, model, plan.vision)
    if not tower or plan.vision.score != "tome":
        return plan
    return plan.model_copy(update={"vision": plan.vision.model_copy(update={"tower_layers": max(tower.chosen)})})

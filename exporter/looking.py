"""What a pruning policy sees of a vision tower: attention of a layer, and how patches become visual tokens.

Legend: N images or tiles, L rows of a tower, P patches of them, T visual tokens of each, V visual tokens of all
images, C width, H heads, d head width, m patches of a visual token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def as_they_are(x: torch.Tensor) -> torch.Tensor:
    """For families where nothing is to be done."""
    return x


@dataclass(frozen=True)
class Look:
    """One run of a family's vision stage, and what its last whole-image layer of use attended to.

    out: the family's outputs. query, key: [N,H,L,d] of that layer, with its scale. classed: row 0 of L is a class
    token. parts: m where the patches of all images are one row (N = 1), else 0. tokens_of: one value per patch,
    [N,P,C], as the mean of each visual token's patches, [N,T,C] or [1,V,C]; zero where a token has none (newlines).
    features: [N,T,C], what enters the projector, where it takes token by token; finish: the projector.
    """

    out: Tensors
    query: torch.Tensor
    key: torch.Tensor
    scale: float
    classed: bool = False
    parts: int = 0
    tokens_of: Callable[[torch.Tensor], torch.Tensor] = as_they_are
    features: torch.Tensor | None = None
    finish: Callable[[torch.Tensor], torch.Tensor] = as_they_are


@dataclass(frozen=True)
class MergingTower:
    """A tower whose visual tokens can be merged between attention and MLP of each layer (ToMe).

    embedded: pixels → [N,L,C], patches of one visual token (``parts`` of them) behind each other, a class token first
    where ``classed``. attend: (layer, x, additive mask) → x behind the attention and that layer's k [N,H,L,d].
    feed_forward: (layer, x) → x behind the MLP. finished: [N,T,parts·C] → [N,T,D].
    """

    layers: Sequence[Any]
    classed: bool
    parts: int
    embedded: Callable[[torch.Tensor], torch.Tensor]
    attend: Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    feed_forward: Callable[[Any, torch.Tensor], torch.Tensor]
    finished: Callable[[torch.Tensor], torch.Tensor]


class Watch:
    """Inside the block: what the given modules give, or what is given to them, by name."""

    def __init__(self, gives: dict[str, Any], takes: dict[str, Any] | None = None) -> None:
        self.gives, self.takes = gives, takes or {}

    def __enter__(self) -> Tensors:
        seen: Tensors = {}

        def note(name: str, value: torch.Tensor) -> None:
            seen[name] = value

        self.handles = [
            module.register_forward_hook(lambda _, __, out, name=name: note(name, out))
            for name, module in self.gives.items()
        ] + [
            module.register_forward_pre_hook(lambda _, given, name=name: note(name, given[0]))
            for name, module in self.takes.items()
        ]
        return seen

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def in_heads(x: torch.Tensor, width: int) -> torch.Tensor:
    """[N,L,H·d] → [N,H,L,d]."""
    return x.unflatten(2, (-1, width)).transpose(1, 2)


def feature_layers(config: Any, layers: int) -> tuple[int, ...]:
    """Which hidden states a projector takes, counted from 0 (the embeddings)."""
    named = config.vision_feature_layer
    return tuple(i % (layers + 1) for i in ((named,) if isinstance(named, int) else named))


def clip_like(model: Any, run: Callable[[], Tensors], **more: Any) -> Look:
    """A look into the CLIP or SigLIP tower of LLaVA and its successors while ``run`` runs it."""
    tower = model.model.vision_tower
    layers = tower.encoder.layers
    attention = layers[max(feature_layers(model.config, len(layers))) - 1].self_attn
    with Watch({"q": attention.q_proj, "k": attention.k_proj}, {"features": model.model.multi_modal_projector}) as seen:
        out = run()
    q, k = (in_heads(seen[name], attention.head_dim) for name in "qk")
    classed = hasattr(tower.embeddings, "class_embedding")
    return Look(out, q, k, attention.scale, classed, **more, features=seen["features"])


def shuffled_order(shuffle: Callable[[torch.Tensor], torch.Tensor], patches: int) -> torch.Tensor:
    """The patches of each visual token in the order in which a pixel shuffle puts them, int64 [T,m].

    shuffle: [1,P,1] → [1,T,m].
    """
    return shuffle(torch.arange(patches, dtype=torch.float32)[None, :, None])[0].to(torch.int64)

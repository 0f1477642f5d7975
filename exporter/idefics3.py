"""Idefics3 and SmolVLM: a SigLIP-like tower over tiles, pixel shuffle, a Llama decoder (transformers models/idefics3).

The image processor makes every tile and the whole view full squares of the tower's size, so the tower's
position ids are one constant row and no tile has padding; they are computed once, by transformers' own formula.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from exporter.family import Family, Tensors, class_of
from exporter.looking import Look, MergingTower, Watch, in_heads, shuffled_order
from graphs.errors import UsageError
from graphs.spec import VisualGrid


def position_ids(side: int) -> torch.Tensor:
    """Rows of the position table for a full side × side tile, int64 [side²] (Idefics3VisionEmbeddings)."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    fractions = (torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))).clamp(max=1.0 - 1e-6)
    bucket = torch.bucketize(fractions, boundaries, right=True)
    return (bucket[:, None] * side + bucket).flatten()


def embedded(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What enters the tower's first layer: [N,3,H,W] → [N,P,C]."""
    embeddings = model.model.vision_model.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    return patches + embeddings.position_embedding(embeddings.saccade_position_ids)


def visual(model: Any, feed: Tensors) -> Tensors:
    """Tower without masks and connector: [N,3,H,W] → [V,D]."""
    tower, hidden = model.model.vision_model, embedded(model, feed["pixel_values"])
    for layer in tower.encoder.layers:
        hidden = layer(hidden, None)
    return {"visual_embeds": model.model.connector(tower.post_layernorm(hidden)).flatten(0, 1)}


def parts_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Patches put together as the pixel shuffle does: [N,P,C] → [N,T,m,C]."""
    connector = model.model.connector
    shuffled = connector.pixel_shuffle(x, connector.scale_factor)
    return shuffled.unflatten(2, (connector.scale_factor**2, -1))


def look(model: Any, feed: Tensors) -> Look:
    """The attention of the tower's last layer; a visual token's value is the mean of its patches'."""
    attention = model.model.vision_model.encoder.layers[-1].self_attn
    with Watch({"q": attention.q_proj, "k": attention.k_proj}) as seen:
        out = visual(model, feed)
    q, k = (in_heads(seen[name], attention.head_dim) for name in "qk")
    return Look(out, q, k, attention.scale, tokens_of=lambda x: parts_of(model, x).mean(2))


def merging(model: Any) -> MergingTower:
    """The whole tower; what is merged are whole visual tokens, patch by patch."""
    tower, connector = model.model.vision_model, model.model.connector
    order = shuffled_order(lambda x: parts_of(model, x)[..., 0], tower.embeddings.num_patches)

    def attend(block: Any, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed, attention = block.layer_norm1(x), block.self_attn
        return x + attention(normed, mask)[0], in_heads(attention.k_proj(normed), attention.head_dim)

    def finished(features: torch.Tensor) -> torch.Tensor:
        normed = tower.post_layernorm(features.unflatten(2, (order.shape[1], -1))).flatten(2)
        return connector.modality_projection(normed)

    return MergingTower(
        layers=tower.encoder.layers,
        classed=False,
        parts=order.shape[1],
        embedded=lambda pixels: embedded(model, pixels).index_select(1, order.flatten().to(pixels.device)),
        attend=attend,
        feed_forward=lambda block, x: x + block.mlp(block.layer_norm2(x)),
        finished=finished,
    )


def prepare(model: Any) -> None:
    """Put the constant position ids beside the tower's table."""
    embeddings = model.model.vision_model.embeddings
    ids = position_ids(embeddings.num_patches_per_side)
    embeddings.register_buffer("saccade_position_ids", ids, persistent=False)


def grid(config: Any) -> VisualGrid:
    """Square tiles; a token is scale_factor × scale_factor patches."""
    vision = config.vision_config
    patches = vision.image_size // vision.patch_size
    side = patches // config.scale_factor
    if side * config.scale_factor != patches:
        raise UsageError(
            f"the tower's {patches}×{patches} patches do not divide by scale_factor {config.scale_factor}; "
            "config.json does not describe a grid of visual tokens, download the checkpoint again"
        )
    return VisualGrid(
        image_height=vision.image_size, image_width=vision.image_size, rows=side, columns=side, kind="tiles"
    )


record = partial(
    Family,
    language=lambda model: model.model.text_model,
    visual=visual,
    grid=grid,
    look=look,
    merging=merging,
    prepare=prepare,
)
FAMILIES = tuple(
    record(name=name, architecture=architecture, model_class=class_of(architecture))
    for name, architecture in (
        ("idefics3", "Idefics3ForConditionalGeneration"),
        ("smolvlm", "SmolVLMForConditionalGeneration"),
    )
)

"""Idefics3 and SmolVLM: a SigLIP-like tower over tiles, pixel shuffle, a Llama decoder (transformers models/idefics3).

The image processor makes every tile and the whole view full squares of the tower's size, so the tower's
position ids are one constant row and no tile has padding; they are computed once, by transformers' own formula.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from exporter.family import Family, Tensors, class_of
from graphs.errors import UsageError
from graphs.spec import VisualGrid


def position_ids(side: int) -> torch.Tensor:
    """Rows of the position table for a full side × side tile, int64 [side²] (Idefics3VisionEmbeddings)."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    fractions = (torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))).clamp(max=1.0 - 1e-6)
    bucket = torch.bucketize(fractions, boundaries, right=True)
    return (bucket[:, None] * side + bucket).flatten()


def visual(model: Any, feed: Tensors) -> Tensors:
    """Tower without masks and connector: [N,3,H,W] → [V,D]."""
    tower = model.model.vision_model
    embeddings = tower.embeddings
    hidden = embeddings.patch_embedding(feed["pixel_values"]).flatten(2).transpose(1, 2)
    hidden = hidden + embeddings.position_embedding(embeddings.saccade_position_ids)
    for layer in tower.encoder.layers:
        hidden = layer(hidden, None)
    return {"visual_embeds": model.model.connector(tower.post_layernorm(hidden)).flatten(0, 1)}


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
            "config.json does not describe a grid of visual tokens"
        )
    return VisualGrid(
        image_height=vision.image_size, image_width=vision.image_size, rows=side, columns=side, kind="tiles"
    )


record = partial(
    Family,
    language=lambda model: model.model.text_model,
    visual=visual,
    grid=grid,
    prepare=prepare,
)
FAMILIES = tuple(
    record(name=name, architecture=architecture, model_class=class_of(architecture))
    for name, architecture in (
        ("idefics3", "Idefics3ForConditionalGeneration"),
        ("smolvlm", "SmolVLMForConditionalGeneration"),
    )
)

"""LLaVA-1.5: a CLIP tower, a two-layer projector, a Llama-like decoder (transformers models/llava)."""

from __future__ import annotations

from typing import Any

import torch

from exporter.family import Family, Tensors, refuse_no_grid, tower_features
from exporter.looking import Look, MergingTower, clip_like, feature_layers, in_heads
from graphs.errors import UsageError
from graphs.spec import VisualGrid


def model_class() -> Any:
    """The transformers class, imported late."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration


def visual(model: Any, feed: Tensors) -> Tensors:
    """Tower and projector: [N,3,H,W] → [V,D]."""
    features = model.model.multi_modal_projector(tower_features(model, feed["pixel_values"]))
    return {"visual_embeds": features.flatten(0, 1)}


def look(model: Any, feed: Tensors) -> Look:
    """One tower token is one visual token, and the projector takes them one by one."""
    return clip_like(model, lambda: visual(model, feed), finish=model.model.multi_modal_projector)


def merging(model: Any) -> MergingTower:
    """The CLIP tower; UsageError where the projector takes several layers."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    chosen = feature_layers(model.config, len(tower.encoder.layers))
    if len(chosen) > 1:
        raise UsageError(
            "score 'tome' merges tokens from layer to layer, so features of several layers do not fit together, and "
            f"this checkpoint takes {list(chosen)}; use another policy"
        )

    def attend(block: Any, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed, attention = block.layer_norm1(x), block.self_attn
        return x + attention(normed, mask)[0], in_heads(attention.k_proj(normed), attention.head_dim)

    return MergingTower(
        layers=tower.encoder.layers[: chosen[0]],
        classed=True,
        parts=1,
        embedded=lambda pixels: tower.pre_layrnorm(tower.embeddings(pixels)),
        attend=attend,
        feed_forward=lambda block, x: x + block.mlp(block.layer_norm2(x)),
        finished=projector,
    )


def grid(config: Any) -> VisualGrid:
    """A square grid of patches; UsageError for a tower whose features are none."""
    refuse_no_grid(config)
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    return VisualGrid(image_height=vision.image_size, image_width=vision.image_size, rows=side, columns=side)


FAMILY = Family(
    name="llava",
    architecture="LlavaForConditionalGeneration",
    model_class=model_class,
    language=lambda model: model.model.language_model,
    visual=visual,
    grid=grid,
    look=look,
    merging=merging,
)

"""LLaVA-1.5: a CLIP tower, a two-layer projector, a Llama-like decoder (transformers models/llava)."""

from __future__ import annotations

from typing import Any

from exporter.family import Family, Tensors, tower_features
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


def grid(config: Any) -> VisualGrid:
    """A square grid of patches; strategy "full" adds the class token, which has no place on a grid."""
    if config.vision_feature_select_strategy != "default":
        raise UsageError(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}, but only 'default' "
            "gives a grid of visual tokens; export a checkpoint with that strategy"
        )
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
)

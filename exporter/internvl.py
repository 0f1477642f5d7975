"""InternVL, the ``-hf`` checkpoints of 2.5, 3 and 3.5: an InternViT tower, pixel shuffle, any decoder.

An image is a thumbnail and the tiles it is cut into; each tile is one item of the batch, so tile counts
and numbers of images are one dynamic dimension.
"""

from __future__ import annotations

from typing import Any

from exporter.family import Family, Tensors, class_of
from graphs.errors import UsageError
from graphs.spec import VisualGrid


def visual(model: Any, feed: Tensors) -> Tensors:
    """Tower, pixel shuffle and projector: [N,3,H,W] → [V,D]."""
    config = model.config
    features = model.model.get_image_features(
        pixel_values=feed["pixel_values"],
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    ).pooler_output
    return {"visual_embeds": features.flatten(0, 1)}


def grid(config: Any) -> VisualGrid:
    """Tiles of a fixed size, their patches merged by the pixel shuffle."""
    vision = config.vision_config
    if config.vision_feature_select_strategy != "default":
        raise UsageError(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}, but only 'default' "
            "gives a grid of visual tokens; export a checkpoint with that strategy"
        )
    (height, width), (patch_height, patch_width) = vision.image_size, vision.patch_size
    return VisualGrid(
        image_height=height,
        image_width=width,
        rows=int(height // patch_height * config.downsample_ratio),
        columns=int(width // patch_width * config.downsample_ratio),
        kind="tiles",
    )


FAMILY = Family(
    name="internvl",
    architecture="InternVLForConditionalGeneration",
    model_class=class_of("InternVLForConditionalGeneration"),
    language=lambda model: model.model.language_model,
    visual=visual,
    grid=grid,
)

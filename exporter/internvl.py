"""InternVL, the ``-hf`` checkpoints of 2.5, 3 and 3.5: an InternViT tower, pixel shuffle, any decoder.

An image is a thumbnail and the tiles it is cut into; each tile is one item of the batch, so tile counts
and numbers of images are one dynamic dimension.
"""

from __future__ import annotations

from typing import Any

import torch

from exporter.family import Family, Tensors, class_of
from exporter.looking import Look, MergingTower, Watch, feature_layers, in_heads, shuffled_order
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


def parts_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Patches put together as the pixel shuffle does: [N,P,C] → [N,T,m,C]."""
    vision = model.config.vision_config
    height, width = (a // b for a, b in zip(vision.image_size, vision.patch_size, strict=True))
    ratio = model.config.downsample_ratio
    shuffled = model.model.pixel_shuffle(x.unflatten(1, (height, width)), scale_factor=ratio)
    return shuffled.flatten(1, 2).unflatten(2, (round(ratio**-2), -1))


def look(model: Any, feed: Tensors) -> Look:
    """The attention of the layer whose output is taken; a visual token's value is the mean of its patches'."""
    layers, width = model.model.vision_tower.encoder.layer, model.model.vision_tower.encoder.layer[0].attention.head_dim
    attention = layers[max(feature_layers(model.config, len(layers))) - 1].attention
    projector = model.model.multi_modal_projector
    with Watch({"q": attention.q_norm, "k": attention.k_norm}, {"features": projector}) as seen:
        out = visual(model, feed)
    return Look(
        out,
        in_heads(seen["q"], width),
        in_heads(seen["k"], width),
        attention.scale,
        classed=True,
        tokens_of=lambda x: parts_of(model, x).mean(2),
        features=seen["features"],
        finish=projector,
    )


def merging(model: Any) -> MergingTower:
    """The InternViT; what is merged are whole visual tokens, patch by patch."""
    tower, config = model.model.vision_tower, model.config
    layers = tower.encoder.layer
    used = max(feature_layers(config, len(layers)))
    patches = tower.embeddings.patch_embeddings.num_patches
    order = shuffled_order(lambda x: parts_of(model, x)[..., 0], patches)

    def embedded(pixels: torch.Tensor) -> torch.Tensor:
        x = tower.embeddings(pixels)
        return torch.cat([x[:, :1], x[:, 1:].index_select(1, order.flatten().to(x.device))], 1)

    def attend(block: Any, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed, attention = block.layernorm_before(x), block.attention
        key = attention.k_norm(attention.k_proj(normed))
        return x + block.lambda_1 * attention(normed, mask)[0], in_heads(key, attention.head_dim)

    def finished(features: torch.Tensor) -> torch.Tensor:
        whole = config.vision_feature_layer == -1
        normed = tower.layernorm(features.unflatten(2, (order.shape[1], -1))).flatten(2) if whole else features
        return model.model.multi_modal_projector(normed)

    return MergingTower(
        layers=layers[:used],
        classed=True,
        parts=order.shape[1],
        embedded=embedded,
        attend=attend,
        feed_forward=lambda block, x: x + block.lambda_2 * block.mlp(block.layernorm_after(x)),
        finished=finished,
    )


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
    look=look,
    merging=merging,
)

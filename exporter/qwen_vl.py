"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images at their own resolution as packed patches (transformers models/qwen*_vl).

Everything that depends on the grids (rotary coordinates, blocks of attention, taps of the position table) is
computed on the host (graphs/layouts/patches.py), so one graph serves every resolution and number of images.
Qwen2.5-VL's windowed layers attend inside blocks of one window, the others inside blocks of one image; patches
are not put in window order first, as transformers does, since attention does not care and every patch keeps its angle.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from exporter.attention import Blocks, register_blocks
from exporter.family import SEED, Dims, Family, Tensors, class_of
from exporter.looking import Look
from graphs.layouts.patches import patch_feeds
from graphs.spec import VisualGrid

PATCHES = {1: [(10, 14)], 2: [(10, 14), (4, 18)]}


Seen = list[tuple[torch.Tensor, torch.Tensor, float]]


def visual(model: Any, feed: Tensors, seen: Seen | None = None) -> Tensors:
    """The tower's blocks with host-computed layouts, then the merger: [P, 3·frames·patch²] → [V,D].

    seen: takes q, k and the scale of the last layer that sees whole images.
    """
    tower = model.model.visual
    hidden = tower.patch_embed(feed["pixel_values"])
    if "table_rows" in feed:
        taps = tower.pos_embed(feed["table_rows"]) * feed["table_weights"][:, :, None]
        hidden = hidden + taps.sum(1).to(hidden.dtype)
    angles = tower.rotary_pos_emb(hidden, feed["patch_coordinates"])
    images = Blocks(feed["image_rows"], feed["image_place"])
    windows = Blocks(feed["window_rows"], feed["window_place"]) if "window_rows" in feed else images
    whole = getattr(tower, "fullatt_block_indexes", range(len(tower.blocks)))
    watched = Blocks(images.rows, images.place, seen)
    last = max(i for i in range(len(tower.blocks)) if i in whole)
    deep_layers = getattr(tower, "deepstack_visual_indexes", ())
    out: dict[str, Any] = {}
    for i, block in enumerate(tower.blocks):
        hidden = block(
            hidden,
            cu_seqlens=None,
            max_seqlen=0,
            position_embeddings=angles,
            saccade_blocks=watched if i == last else images if i in whole else windows,
        )
        if i in deep_layers:
            number = list(deep_layers).index(i)
            out[f"visual_deepstack_{len(out)}"] = tower.deepstack_merger_list[number](hidden)
    return {"visual_embeds": tower.merger(hidden), **out}


def look(model: Any, feed: Tensors) -> Look:
    """The attention of the last layer that sees whole images; a visual token's value is the mean of its patches'."""
    seen: Seen = []
    out = visual(model, feed, seen)
    query, key, scale = seen[0]
    parts = model.config.vision_config.spatial_merge_size**2
    return Look(out, query, key, scale, parts=parts, tokens_of=lambda x: x.unflatten(1, (-1, parts)).mean(2))


def grid(config: Any) -> VisualGrid:
    """Patches, merged merge × merge; Qwen2.5-VL's windows; Qwen3-VL's learned position table."""
    vision = config.vision_config
    merge, window = vision.spatial_merge_size, getattr(vision, "window_size", 0)
    return VisualGrid(
        image_height=0,
        image_width=0,
        rows=0,
        columns=0,
        kind="patches",
        patch=vision.patch_size,
        frames=vision.temporal_patch_size,
        merge=merge,
        window=window // merge // vision.patch_size * merge,
        position_side=int((getattr(vision, "num_position_embeddings", None) or 0) ** 0.5),
    )


def dims(grid: VisualGrid) -> Dims:
    """Pixels by patch, and the layouts of ``graphs.layouts.patches``."""
    patches = f"{grid.merge**2}*V"
    named: Dims = {
        "pixel_values": (patches, 3 * grid.frames * grid.patch**2),
        "patch_coordinates": (patches, 2),
        "image_rows": ("I", "K"),
        "image_place": (patches,),
    }
    if grid.window:
        named |= {"window_rows": ("W", grid.window**2), "window_place": (patches,)}
    if grid.position_side:
        named |= {"table_rows": (patches, 4), "table_weights": (patches, 4)}
    return named


def shapes_of(grid: VisualGrid, images: int) -> list[tuple[int, int]]:
    """Rows and columns of patches of one or two images."""
    return [(h // 2 * grid.merge, w // 2 * grid.merge) for h, w in PATCHES[images]]


def counts(grid: VisualGrid, images: int) -> list[int]:
    """Visual tokens of each image of ``example``."""
    return [h * w // grid.merge**2 for h, w in shapes_of(grid, images)]


def example(grid: VisualGrid, images: int) -> Tensors:
    """One or two images of different shapes."""
    shapes = shapes_of(grid, images)
    draw = torch.Generator().manual_seed(SEED)
    patches = sum(h * w for h, w in shapes)
    pixels = torch.randn(patches, 3 * grid.frames * grid.patch**2, generator=draw)
    feeds = {"pixel_values": pixels} | {k: torch.from_numpy(v) for k, v in patch_feeds(shapes, grid).items()}
    return {name: feeds[name] for name in dims(grid)}


def prepare(model: Any) -> None:
    """Let the tower attend by blocks."""
    model.model.visual.config._attn_implementation = register_blocks()


def deepstack(config: Any) -> int:
    """How many of the tower's layers go into decoder layers of their own."""
    return len(getattr(config.vision_config, "deepstack_visual_indexes", ()))


record = partial(
    Family,
    language=lambda model: model.model.language_model,
    visual=visual,
    grid=grid,
    dims=dims,
    example=example,
    counts=counts,
    look=look,
    position_axes=3,
    deepstack=deepstack,
    prepare=prepare,
)
FAMILIES = tuple(
    record(name=name, architecture=architecture, model_class=class_of(architecture))
    for name, architecture in (
        ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
        ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    )
)

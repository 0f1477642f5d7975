"""LLaVA-NeXT and LLaVA-OneVision: a whole view and tiles of it, joined into one map (transformers models/llava_next,
models/llava_onevision).

transformers packs the tiles' features image by image with reshapes; here a gather with host-computed rows
(graphs/layouts/anyres.py) does it, so one graph serves every size, tile count and number of images.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from exporter.family import Dims, Family, Tensors, class_of, refuse_no_grid, tiles, tower_features
from exporter.looking import Look, clip_like
from graphs.layouts.anyres import anyres_feeds, tile_count
from graphs.spec import VisualGrid

SHRINKS = 1.1**2  # of OneVision's most tiles, as an area: transformers shrinks maps whose sides are beyond 1.1


def visual(model: Any, feed: Tensors) -> Tensors:
    """Tower and projector on tiles [T,3,H,W], a newline row before their features, and the gather: → [V,D]."""
    features = model.model.multi_modal_projector(tower_features(model, feed["pixel_values"]))
    return {"visual_embeds": packed(model.model.image_newline.to(features.dtype), features, feed)}


def packed(newline_C: torch.Tensor, x: torch.Tensor, feed: Tensors) -> torch.Tensor:
    """One value per feature of a tile, [T,L,C], and the newline's, gathered into tokens: [V,C]."""
    table, rows = torch.cat([newline_C[None], x.flatten(0, 1)]), feed["token_rows"]
    if rows.dim() == 1:
        return table.index_select(0, rows)
    # In float32 and cast back by hand: torch.onnx makes a float16 sum a float32 output.
    taps = table.index_select(0, rows.flatten()).unflatten(0, (-1, 4)).float() * feed["token_weights"][..., None]
    return taps.sum(1).to(table.dtype)


def look(model: Any, feed: Tensors) -> Look:
    """Each tile's attention is its own; a shrunk token's value is that of its four taps, a newline's is zero."""
    look = clip_like(
        model,
        lambda: visual(model, feed),
        tokens_of=lambda x: packed(x.new_zeros(x.shape[2]), x, feed)[None],
    )
    return replace(look, features=None)


def counts(grid: VisualGrid, images: int) -> list[int]:
    """Visual tokens of each image of ``example``."""
    return anyres_feeds(sizes_of(grid, images), grid)[1]


def sizes_of(grid: VisualGrid, images: int) -> list[tuple[int, int]]:
    """The (height, width) of one or two images of few tiles: of counts that differ, and the second is shrunk if any is.

    OneVision's largest pinpoint makes 37 tiles, which the golden tensors would be computed on.
    """
    by_tiles = sorted(grid.pinpoints, key=lambda size: tile_count(size, grid))
    few, most = by_tiles[0], by_tiles[-1]
    shrunk = [size for size in by_tiles if grid.max_tiles and tile_count(size, grid) - 1 > grid.max_tiles * SHRINKS]
    more = [size for size in by_tiles if tile_count(size, grid) > tile_count(few, grid)]
    return [(h - 1, w) for h, w in [few, next(iter(shrunk or more), most)][:images]]


def grid(config: Any) -> VisualGrid:
    """Square tiles on the configuration's pinpoints; OneVision shrinks maps of more than some tiles."""
    refuse_no_grid(config)
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    aspect = getattr(config, "vision_aspect_ratio", "")
    return VisualGrid(
        image_height=vision.image_size,
        image_width=vision.image_size,
        rows=side,
        columns=side,
        kind="anyres",
        pinpoints=tuple((int(h), int(w)) for h, w in config.image_grid_pinpoints),
        max_tiles=int(aspect.removeprefix("anyres_max_")) if aspect else 0,
    )


def dims(grid: VisualGrid) -> Dims:
    """Tiles, and which features become tokens."""
    named: Dims = {"pixel_values": ("N", 3, grid.image_height, grid.image_width)}
    if grid.max_tiles:
        return named | {"token_rows": ("V", 4), "token_weights": ("V", 4)}
    return named | {"token_rows": ("V",)}


def example(grid: VisualGrid, images: int) -> Tensors:
    """One or two images of different tile counts."""
    sizes = sizes_of(grid, images)
    feeds, _ = anyres_feeds(sizes, grid)
    pixels = tiles(grid, sum(tile_count(size, grid) for size in sizes))
    return {"pixel_values": pixels} | {name: torch.from_numpy(value) for name, value in feeds.items()}


record = partial(
    Family,
    language=lambda model: model.model.language_model,
    visual=visual,
    grid=grid,
    dims=dims,
    example=example,
    counts=counts,
    look=look,
)
FAMILIES = tuple(
    record(name=name, architecture=architecture, model_class=class_of(architecture))
    for name, architecture in (
        ("llava_next", "LlavaNextForConditionalGeneration"),
        ("llava_onevision", "LlavaOnevisionForConditionalGeneration"),
    )
)

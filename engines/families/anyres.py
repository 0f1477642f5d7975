"""LLaVA-NeXT and LLaVA-OneVision: the whole image, then its tiles joined into one map."""

from __future__ import annotations

import numpy as np

from engines.families.family import HostFamily, Processed, Seen, seen_tiles
from graphs.layouts.anyres import anyres_feeds, tile_count
from graphs.spec import VisualGrid


def seen(processed: Processed, grid: VisualGrid) -> Seen:
    """pixel_values [I,T,3,H,W], T padded to the image of most tiles, and image_sizes [I,2] as given.

    OneVision's processor cuts a lone image only (batch_num_images).
    """
    padded = np.asarray(processed["pixel_values"])
    sizes = [(int(h), int(w)) for h, w in np.asarray(processed["image_sizes"])]
    whole_only = "batch_num_images" in processed and len(sizes) > 1
    tiles = [1 if whole_only else tile_count(size, grid) for size in sizes]
    pixels = np.concatenate([image[:n] for image, n in zip(padded, tiles, strict=True)])
    feeds, counts = anyres_feeds(sizes, grid, whole_only)
    tiled = seen_tiles(pixels, tiles, grid, whole_last=False)
    return Seen({**tiled.feeds, **feeds}, tuple(counts), tiled.shapes, tiled.whole, tiled.view)


FAMILY = HostFamily(seen=seen)

"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images at their own resolution, positions on three axes."""

from __future__ import annotations

import numpy as np

from engines.families.family import HostFamily, Processed, Seen
from graphs.layouts.patches import axes_positions, patch_feeds
from graphs.spec import VisualGrid


def seen(processed: Processed, grid: VisualGrid) -> Seen:
    """pixel_values [P, 3·frames·patch²] and image_grid_thw [I,3] in patches; an image has one moment."""
    patches = [(int(h), int(w)) for _, h, w in np.asarray(processed["image_grid_thw"])]
    shapes = tuple((h // grid.merge, w // grid.merge) for h, w in patches)
    pixels = np.asarray(processed["pixel_values"]).astype(np.float32, copy=False)
    return Seen(
        {"pixel_values": pixels, **patch_feeds(patches, grid)},
        tuple(h * w for h, w in shapes),
        shapes,
        tuple(np.arange(h * w).reshape(h, w) for h, w in shapes),
        lambda i: _unpatched(pixels, patches, i, grid),
    )


def _unpatched(pixels: np.ndarray, patches: list[tuple[int, int]], i: int, grid: VisualGrid) -> np.ndarray:
    """The i-th image as [3,H,W], the first of its equal frames."""
    (h, w), m, p = patches[i], grid.merge, grid.patch
    start = sum(a * b for a, b in patches[:i])
    blocks = pixels[start : start + h * w].reshape(h // m, w // m, m, m, 3, grid.frames, p, p)[:, :, :, :, :, 0]
    return blocks.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, h * p, w * p)


def positions(is_visual_S: np.ndarray, seen: Seen | None, start: int) -> np.ndarray:
    """Time, row and column, int64 [3,1,S]."""
    return axes_positions(is_visual_S, seen.shapes if seen else (), start)


FAMILY = HostFamily(seen=seen, positions=positions)

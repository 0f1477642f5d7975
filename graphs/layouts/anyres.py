"""Images of any resolution as tiles on a grid (LLaVA-NeXT, LLaVA-OneVision): which feature becomes which token.

Legend: V visual tokens of all images, L = rows × columns features of a tile, T tiles of all images.

The vision stage makes a table: row 0 is the newline token, row 1 + t·L + l feature l of tile t. An image's
tokens are its whole view (tile 0), then the map of its tiles joined, the padding cut off, a newline behind
every row. transformers does it with reshapes per image (pack_image_features); as a gather one graph serves
every size, tile count and number of images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from graphs.spec import VisualGrid

Size = tuple[int, int]


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The (height, width) that keeps most of an image's pixels, then wastes least (select_best_resolution)."""
    height, width = size
    best, best_fit = pinpoints[0], (0, -math.inf)
    for high, wide in pinpoints:
        scale = min(wide / width, high / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        if (used, -(wide * high - used)) > best_fit:
            best, best_fit = (high, wide), (used, -(wide * high - used))
    return best


def tiles_across(size: Size, grid: VisualGrid) -> Size:
    """How many tiles down and across an image of this (height, width) is cut into."""
    high, wide = best_resolution(size, grid.pinpoints)
    return high // grid.image_height, wide // grid.image_width


def tile_count(size: Size, grid: VisualGrid) -> int:
    """Tiles of an image, its whole view included."""
    down, across = tiles_across(size, grid)
    return 1 + down * across


def unpadded(size: Size, shape: Size) -> tuple[slice, slice]:
    """Rows and columns of a map of this shape that are image and not padding (unpad_image)."""
    (height, width), (rows, columns) = size, shape
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(padding, columns - padding)


def joined_map(size: Size, grid: VisualGrid, first: int) -> np.ndarray:
    """Table rows of an image's joined tiles without their padding, int64 [rows, columns]; ``first`` is its tile 0."""
    down, across = tiles_across(size, grid)
    y, x = np.indices((down * grid.rows, across * grid.columns))
    tile = y // grid.rows * across + x // grid.columns + first + 1
    table = 1 + tile * grid.tokens + y % grid.rows * grid.columns + x % grid.columns
    return table[unpadded(size, table.shape)]


def shrunk_taps(table: np.ndarray, grid: VisualGrid) -> tuple[np.ndarray, np.ndarray]:
    """Four rows and weights per token of a map, shrunk where it has more than ``max_tiles`` tiles' worth of tokens.

    Bilinear, half-pixel centres, as F.interpolate(align_corners=False). Returns [rows, columns, 4] twice.
    """
    (h, w), rows, weights = table.shape, [], []
    ratio = math.sqrt(h * w / (grid.max_tiles * grid.rows**2))
    shape = (int(h // ratio), int(w // ratio)) if ratio > 1.1 else (h, w)
    for old, new in zip((h, w), shape, strict=True):
        at = np.maximum((np.arange(new) + 0.5) * (old / max(new, 1)) - 0.5, 0)
        low = at.astype(np.int64)
        rows.append(np.stack([low, np.minimum(low + 1, old - 1)], -1))
        weights.append(np.stack([1 - (at - low), at - low], -1))
    taps = table[rows[0][:, None, :, None], rows[1][None, :, None, :]]
    shares = weights[0][:, None, :, None] * weights[1][None, :, None, :]
    return taps.reshape(*shape, 4), shares.reshape(*shape, 4)


def anyres_feeds(
    sizes: Sequence[Size], grid: VisualGrid, whole_only: bool = False
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Inputs of a vision stage of kind ``anyres`` beside the pixels, and the number of tokens of each image.

    sizes: (height, width) of the images as given. whole_only: the images were not cut (OneVision, several at once).
    Feeds: ``token_rows`` int64 [V], or [V,4] with ``token_weights`` fp32 [V,4] where maps may be shrunk.
    """
    rows, weights, counts, first = [], [], [], 0
    for size in sizes:
        whole = 1 + first * grid.tokens + np.arange(grid.tokens)
        taps = [whole[:, None].repeat(4, 1)]
        shares = [np.tile([1.0, 0, 0, 0], (grid.tokens, 1))]
        if whole_only:
            taps.append(np.zeros((1, 4), np.int64))
            shares.append(np.array([[1.0, 0, 0, 0]]))
        else:
            table = joined_map(size, grid, first)
            tap, share = shrunk_taps(table, grid) if grid.max_tiles else _plain(table)
            taps.append(np.pad(tap, ((0, 0), (0, 1), (0, 0))).reshape(-1, 4))
            newline = np.broadcast_to([1.0, 0, 0, 0], (len(share), 1, 4))
            shares.append(np.concatenate([share, newline], axis=1).reshape(-1, 4))
        rows += taps
        weights += shares
        counts.append(sum(len(t) for t in taps))
        first += 1 if whole_only else tile_count(size, grid)
    all_rows = np.concatenate(rows)
    if not grid.max_tiles:
        return {"token_rows": all_rows[:, 0].copy()}, counts
    return {"token_rows": all_rows, "token_weights": np.concatenate(weights).astype(np.float32)}, counts


def _plain(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return table[..., None].repeat(4, -1), np.broadcast_to([1.0, 0, 0, 0], (*table.shape, 4))

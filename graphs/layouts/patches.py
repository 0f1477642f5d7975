"""Images at their own resolution as one packed row of patches (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).

Legend: P patches of all images, I images, K patches of the longest image, W windows, s window side.

Patches come in blocks of merge × merge, as the image processor cuts them, so that a visual token is a run
of consecutive patches. Attention goes by blocks: ``*_rows`` [B,K] says which patch stands at each place of
each block (−1: padding), ``*_place`` [P] where each patch has gone. No map or mask over all patches exists;
a window's mask has s² entries. transformers permutes the patches into window order and back instead
(get_vision_window_index), which gives the same, as every patch keeps its own rotary angle.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphs.spec import VisualGrid

Shape = tuple[int, int]


def patch_feeds(shapes: Sequence[Shape], grid: VisualGrid) -> dict[str, np.ndarray]:
    """Every input of a vision stage of kind ``patches`` beside the pixels.

    shapes: (rows, columns) of patches of each image, multiples of ``grid.merge``.
    """
    coordinates = [patch_coordinates(shape, grid.merge) for shape in shapes]
    feeds = {"patch_coordinates": np.concatenate(coordinates)}
    if grid.position_side:
        taps = [table_taps(c, shape, grid.position_side) for c, shape in zip(coordinates, shapes, strict=True)]
        feeds["table_rows"] = np.concatenate([rows for rows, _ in taps])
        feeds["table_weights"] = np.concatenate([weights for _, weights in taps])
    image_P = np.repeat(np.arange(len(shapes)), [len(c) for c in coordinates])
    feeds["image_rows"], feeds["image_place"] = blocks_of(image_P, max(len(c) for c in coordinates))
    if grid.window:
        window_P = window_of(coordinates, shapes, grid.window)
        feeds["window_rows"], feeds["window_place"] = blocks_of(window_P, grid.window**2)
    return feeds


def patch_coordinates(shape: Shape, merge: int) -> np.ndarray:
    """Row and column of every patch in packed order, int64 [P,2] (transformers' get_vision_position_ids)."""
    h, w = shape
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    blocks = (h // merge, merge, w // merge, merge)
    return np.stack([x.reshape(blocks).transpose(0, 2, 1, 3).ravel() for x in (rows, columns)], axis=-1)


def window_of(coordinates: Sequence[np.ndarray], shapes: Sequence[Shape], side: int) -> np.ndarray:
    """The window of every patch, int64 [P], numbered over all images; windows at the right and bottom are smaller."""
    before, numbers = 0, []
    for at, (h, w) in zip(coordinates, shapes, strict=True):
        across = -(-w // side)
        numbers.append(before + at[:, 0] // side * across + at[:, 1] // side)
        before += across * -(-h // side)
    return np.concatenate(numbers)


def blocks_of(block_P: np.ndarray, places: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches gathered by block: rows [B,K] (−1 where nothing stands) and the place of each patch [P], int64."""
    order = np.argsort(block_P, kind="stable")
    counts = np.bincount(block_P)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.full((len(counts), places), -1, np.int64)
    rows[block_P[order], rank] = order
    place = np.empty(len(order), np.int64)
    place[order] = block_P[order] * places + rank
    return rows, place


def table_taps(coordinates: np.ndarray, shape: Shape, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Four rows of a learned side × side table per patch and their weights, [P,4] int64 and fp32.

    Bilinear with aligned corners, in fp32 as transformers' get_vision_interpolation_indices_and_weights.
    """
    taps, weights = [], []
    for axis, size in enumerate(shape):
        at = coordinates[:, axis].astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        low = np.floor(at)
        taps.append(np.clip(low.astype(np.int64)[:, None] + np.arange(2), 0, side - 1))
        weights.append(np.maximum(1 - np.abs((at - low)[:, None] - np.arange(2, dtype=np.float32)), 0))
    rows = (taps[0][:, :, None] * side + taps[1][:, None]).reshape(-1, 4)
    return rows, (weights[0][:, :, None] * weights[1][:, None]).reshape(-1, 4).astype(np.float32)


def axes_positions(is_visual_S: np.ndarray, shapes: Sequence[Shape], start: int = 0) -> np.ndarray:
    """Time, row and column position of every row of a prompt, int64 [3,1,S] (transformers' get_rope_index).

    shapes: (rows, columns) of *tokens* of each image, in the order of the prompt. Text counts on from the
    largest position so far; all tokens of an image share one time.
    """
    positions = np.empty((3, len(is_visual_S)), np.int64)
    at, images, now = 0, iter(shapes), start
    while at < len(is_visual_S):
        if is_visual_S[at]:
            h, w = next(images)
            grid = np.indices((h, w)).reshape(2, -1)
            positions[:, at : at + h * w] = now + np.concatenate([np.zeros((1, h * w), np.int64), grid])
            at, now = at + h * w, now + max(h, w)
        else:
            positions[:, at] = now
            at, now = at + 1, now + 1
    return positions[:, None]

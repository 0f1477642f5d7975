"""Idefics3 and SmolVLM: a grid of tiles, each named by its row and column in the prompt, then the whole image."""

from __future__ import annotations

from typing import Any

import numpy as np

from engines.families.family import HostFamily, Processed, Seen, seen_tiles
from graphs.spec import VisualGrid

FENCE, WHOLE = "<fake_token_around_image>", "<global-img>"


def seen(processed: Processed, grid: VisualGrid) -> Seen:
    """pixel_values [1,N,3,H,W] of all images in order; rows and cols of each, 0 where it is not cut."""
    shapes = [
        (int(r), int(c))
        for r, c in zip(np.asarray(processed["rows"]).ravel(), np.asarray(processed["cols"]).ravel(), strict=True)
    ]
    pixels = np.asarray(processed["pixel_values"])[0]
    tiled = seen_tiles(pixels, [r * c + 1 for r, c in shapes], grid, whole_last=True)
    return Seen(tiled.feeds, tiled.tokens, tuple(shapes), tiled.whole, tiled.view)


def text(seen: Seen, i: int, token: str, tokenizer: Any) -> str:
    """As the Processor writes it: every tile behind its name, line by line, then the whole image."""
    rows, columns = seen.shapes[i]
    tile = token * (seen.tokens[i] // (rows * columns + 1))
    fence = getattr(tokenizer, "fake_image_token", FENCE)
    lines = "".join(
        "".join(f"{fence}<row_{r + 1}_col_{c + 1}>{tile}" for c in range(columns)) + "\n" for r in range(rows)
    )
    whole = f"{fence}{getattr(tokenizer, 'global_image_token', WHOLE)}{tile}{fence}"
    return f"{lines}\n{whole}" if rows and columns else whole


FAMILY = HostFamily(seen=seen, text=text, options={"return_row_col_info": True})

"""InternVL: tiles, then the whole image as a thumbnail where there is more than one tile (InternVLProcessor)."""

from __future__ import annotations

from typing import Any

import numpy as np

from engines.families.family import HostFamily, Processed, Seen, seen_tiles
from graphs.spec import VisualGrid


def seen(processed: Processed, grid: VisualGrid) -> Seen:
    """pixel_values [N,3,H,W] and num_patches, the tiles of each image."""
    return seen_tiles(
        np.asarray(processed["pixel_values"]),
        [int(n) for n in np.asarray(processed["num_patches"]).ravel()],
        grid,
        whole_last=True,
    )


def text(seen: Seen, i: int, token: str, tokenizer: Any) -> str:
    """The placeholders between the image's own brackets."""
    return f"{tokenizer.start_image_token}{token * seen.tokens[i]}{tokenizer.end_image_token}"


FAMILY = HostFamily(seen=seen, text=text, options={"crop_to_patches": True})

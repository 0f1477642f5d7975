"""LLaVA-1.5: one tile per image."""

from __future__ import annotations

import numpy as np

from engines.families.family import HostFamily, Processed, Seen, seen_tiles
from graphs.spec import VisualGrid


def seen(processed: Processed, grid: VisualGrid) -> Seen:
    """pixel_values [I,3,H,W]."""
    pixels = np.asarray(processed["pixel_values"])
    return seen_tiles(pixels, [1] * len(pixels), grid, whole_last=False)


FAMILY = HostFamily(seen=seen)

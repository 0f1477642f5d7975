"""What a family's host half is: from the image processor's output to vision inputs, prompt text and positions.

Pure numpy; no torch, no model class. Legend: V visual tokens, S prompt rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from graphs.spec import VisualGrid

Processed = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Seen:
    """Images as the vision stage takes them.

    feeds: its inputs by name. tokens: visual tokens of each image, in order. shapes: per image what the
    family lays out in rows and columns (tokens, or tiles). whole: per image the visual tokens of its whole
    view, int64 [rows, columns], indices into the image's own; view: the i-th image's whole view as the tower
    gets it, float32 [3,H,W]. Both are for pictures.
    """

    feeds: dict[str, np.ndarray]
    tokens: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    whole: tuple[np.ndarray, ...]
    view: Callable[[int], np.ndarray]

    def without_pixels(self) -> Seen:
        """What a conversation needs of it once the vision stage has run: places, not what the tower gets."""
        return replace(self, feeds={}, view=_gone)


@dataclass(frozen=True)
class HostFamily:
    """One record per family name in spec.json.

    seen: the image processor's output (numpy, one prompt's images) → the vision stage's inputs.
    text: what replaces the i-th image's placeholder: (seen, i, placeholder text, tokenizer) → text.
    positions: (is_visual [S], seen, first position) → int64 [1,S] or [3,1,S].
    options: what the HF Processor class passes to its image processor.
    """

    seen: Callable[[Processed, VisualGrid], Seen]
    text: Callable[[Seen, int, str, Any], str] = lambda seen, i, token, tokenizer: token * seen.tokens[i]
    positions: Callable[[np.ndarray, Seen | None, int], np.ndarray] = lambda is_visual, seen, start: in_line(
        len(is_visual), start
    )
    options: Mapping[str, Any] = field(default_factory=dict)


def _gone(i: int) -> np.ndarray:
    raise LookupError(f"image {i} was seen and its pixels were dropped; let the processor look again")


def in_line(rows: int, start: int) -> np.ndarray:
    """Consecutive positions, int64 [1,S]."""
    return np.arange(start, start + rows, dtype=np.int64)[None]


def seen_tiles(pixels: np.ndarray, tiles: Sequence[int], grid: VisualGrid, whole_last: bool) -> Seen:
    """Images that are each some tiles of equal size; the whole view is the last or the first of them."""
    counts = [n * grid.tokens for n in tiles]
    view = np.arange(grid.tokens).reshape(grid.rows, grid.columns)
    whole = tuple(view + (count - grid.tokens if whole_last else 0) for count in counts)
    shapes = tuple((grid.rows, grid.columns) for _ in tiles)
    feeds = {"pixel_values": pixels.astype(np.float32, copy=False)}
    at = np.cumsum(tiles) - 1 if whole_last else np.cumsum([0, *tiles[:-1]])
    return Seen(feeds, tuple(counts), shapes, whole, lambda i: pixels[at[i]])


def expanded(text: str, token: str, texts: Sequence[str]) -> str:
    """The prompt with its i-th placeholder replaced by the i-th text; the caller has counted them."""
    parts = text.split(token)
    return parts[0] + "".join(a + b for a, b in zip(texts, parts[1:], strict=True))


def folded(text: str, token: str) -> tuple[str, list[int]]:
    """The prompt with every run of placeholders as one, and how long each was."""
    run = re.compile(f"(?:{re.escape(token)})+")
    return run.sub(lambda _: token, text), [len(found[0]) // len(token) for found in run.finditer(text)]

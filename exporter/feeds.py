"""Inputs of one decoder run, for tracing and for golden tensors alike.

Legend: S rows of the chunk, P_j past rows of segment j.
"""

from dataclasses import dataclass

import numpy as np
import torch

from exporter.family import SEED, Tensors
from exporter.program import DecoderProgram
from graphs.layouts.budgets import places
from graphs.plan import PruningPlan
from graphs.spec import LanguageModel, past_names


@dataclass(frozen=True)
class Lengths:
    """Of the shape carriers: guide rows, rows behind each prune point, rows with logits.

    merging: of merge_i and recycle_i; None: the plan's own.
    """

    guide: int
    keep: tuple[int, ...]
    tail: int
    merging: tuple[int, int] | None = None


def carrier(length: int) -> torch.Tensor:
    """A shape carrier of this length."""
    return torch.zeros(length, dtype=torch.int32)


def decoder_feed(
    program: DecoderProgram, embedded: Tensors, past: Tensors, positions: torch.Tensor, lengths: Lengths
) -> Tensors:
    """All inputs of one decoder run, in the program's order. embedded: what the embed stage gives for its rows."""
    rows = embedded["inputs_embeds"].shape[1]
    draw = torch.Generator().manual_seed(SEED + rows)
    ready = {
        **embedded,
        "position_ids": positions,
        "guide": carrier(lengths.guide),
        "tail": carrier(lengths.tail),
        "priority": torch.rand(1, rows, generator=draw),
        "image_index": embedded["is_visual"].to(torch.int64) - 1,
        **_budgets(program.plan, embedded["is_visual"], lengths),
        **past,
    }
    return {name: ready[name] for name in program.inputs}


def _budgets(plan: PruningPlan, is_visual: torch.Tensor, lengths: Lengths) -> Tensors:
    """What says how many rows stay at each point, for a chunk of at most one image."""
    before = int(is_visual.sum())
    text, feed = is_visual.shape[1] - before, {}
    for i, (point, rows) in enumerate(zip(plan.points, lengths.keep, strict=True)):
        feed[f"keep_{i}"] = carrier(rows)
        chosen = places([before], [rows - text], text) if before else np.arange(rows)
        feed[f"pick_{i}"] = torch.from_numpy(chosen)
        merging = lengths.merging or point.merging(before, rows - text)
        feed |= {f"{name}_{i}": carrier(n) for name, n in zip(("merge", "recycle"), merging, strict=True)}
        before = rows - text if before else 0
    return feed


def positions_of(language: LanguageModel, start: int, rows: int, is_visual: torch.Tensor | None = None) -> torch.Tensor:
    """Positions of consecutive rows, [1,S], or [3,1,S] with visual rows on a square grid of their own."""
    line = torch.arange(start, start + rows)
    if language.position_axes == 1:
        return line[None]
    axes = line.repeat(3, 1)
    if is_visual is not None:
        visual = is_visual[0].nonzero()[:, 0]
        axes[:, visual] = visual[0] + torch.stack([0 * visual, *(f(visual - visual[0]) for f in (_row, _column))])
    return axes[:, None]


def _row(place: torch.Tensor) -> torch.Tensor:
    return place // 4


def _column(place: torch.Tensor) -> torch.Tensor:
    return place % 4


def empty_past(program: DecoderProgram, language: LanguageModel, dtype: torch.dtype, lengths: list[int]) -> Tensors:
    """A cache of the given length per segment, filled with zeros."""
    shape = (1, language.kv_heads, 0, language.head_dim)
    past: Tensors = {}
    for segment, length in zip(program.segments, lengths, strict=True):
        for i in segment:
            past |= {n: torch.zeros(*shape[:2], length, shape[3], dtype=dtype) for n in past_names(i)}
    return past

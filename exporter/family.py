"""What a model family is: where its parts hang, and the few lines that turn pixels into visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from graphs.errors import BadArtefact
from graphs.spec import VisualGrid


@dataclass(frozen=True)
class Family:
    """One record per Hugging Face architecture; everything else of the exporter is shared.

    model_class: returns the transformers class (imported late).
    language: the module with ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``.
    visual_embeds: (model, pixel_values [N,3,H,W] in the model's dtype) → [V, D], images in order.
    grid: the visual tokens of one image, from the configuration; UsageError where it cannot be had.
    """

    name: str
    architecture: str
    model_class: Callable[[], Any]
    language: Callable[[nn.Module], Any]
    visual_embeds: Callable[[Any, torch.Tensor], torch.Tensor]
    grid: Callable[[Any], VisualGrid]


def family_of(architectures: Sequence[str] | None, families: Sequence[Family]) -> Family:
    """The record for a checkpoint's ``architectures``; BadArtefact lists the known ones and near misses."""
    known = {family.architecture: family for family in families}
    for name in architectures or ():
        if name in known:
            return known[name]
    got = ", ".join(architectures or ()) or "none"
    near = get_close_matches(got, known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else "; convert the checkpoint or open an issue for its family"
    raise BadArtefact(f"unknown architecture {got}; known are {', '.join(sorted(known))}{hint}")

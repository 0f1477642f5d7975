"""What a model family is: where its parts hang, and the few lines that turn pixels into visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import nn

from exporter.looking import Look, MergingTower, Tensors
from graphs.errors import BadArtefact, UsageError
from graphs.families import REFUSED
from graphs.spec import VisualGrid

Dims = dict[str, tuple[int | str, ...]]
SEED = 20241


@dataclass(frozen=True)
class Family:
    """One record per Hugging Face architecture; everything else of the exporter is shared.

    model_class: returns the transformers class (imported late).
    language: the module with ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``.
    visual: (model, the vision stage's inputs, pixels in the model's dtype) → ``visual_embeds`` [V, D], images in
    order, and ``visual_deepstack_i`` [V, D] where the family has them.
    grid: how an image becomes visual tokens, from the configuration; UsageError where it cannot be had.
    dims: the vision stage's inputs in the file's order, each with its dimensions ("4*V" is a multiple).
    example: valid vision inputs for 1 or 2 images of different shapes, pixels random; counts: visual tokens of each,
    where images are packed.
    look: visual while a policy watches the tower. merging: the tower for merging inside, None where it cannot be.
    deepstack: how many decoder layers have visual features added behind them, from the configuration.
    prepare: what has to be set on a fresh skeleton before it is traced or run.
    """

    name: str
    architecture: str
    model_class: Callable[[], Any]
    language: Callable[[nn.Module], Any]
    visual: Callable[[Any, Tensors], Tensors]
    grid: Callable[[Any], VisualGrid]
    dims: Callable[[VisualGrid], Dims] = lambda grid: {"pixel_values": ("N", 3, grid.image_height, grid.image_width)}
    example: Callable[[VisualGrid, int], Tensors] = lambda grid, images: {"pixel_values": tiles(grid, images)}
    counts: Callable[[VisualGrid, int], Sequence[int]] = lambda grid, images: [grid.tokens] * images
    look: Callable[[Any, Tensors], Look] | None = None
    merging: Callable[[Any], MergingTower] | None = None
    position_axes: Literal[1, 3] = 1
    deepstack: Callable[[Any], int] = lambda config: 0
    prepare: Callable[[Any], None] = lambda model: None


def class_of(name: str) -> Callable[[], Any]:
    """A transformers class, imported late."""

    def load() -> Any:
        import transformers

        return getattr(transformers, name)

    return load


def tiles(grid: VisualGrid, count: int) -> torch.Tensor:
    """Random pixels, fp32 [count,3,H,W]."""
    draw = torch.Generator().manual_seed(SEED)
    return torch.randn(count, 3, grid.image_height, grid.image_width, generator=draw)


# Tower → the strategy under which its features are a grid: CLIP has a class token, which "default" drops, SigLIP none.
GRIDS = {"clip_vision_model": "default", "siglip_vision_model": "full"}


def refuse_no_grid(config: Any) -> None:
    """UsageError for a CLIP-like tower, or a choice of its features, that gives another number of them than patches."""
    tower, chosen = config.vision_config.model_type, config.vision_feature_select_strategy
    if tower not in GRIDS:
        raise UsageError(
            f"vision towers of type {tower} are not supported: how their features form a grid is not known; known are "
            f"{', '.join(GRIDS)}"
        )
    if chosen != GRIDS[tower]:
        raise UsageError(
            f"vision_feature_select_strategy is {chosen!r}, but with a tower of type {tower} only {GRIDS[tower]!r} "
            "gives a grid of visual tokens; export a checkpoint with that strategy"
        )


def tower_features(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """The selected layers of a CLIP-like tower, side by side: [N,3,H,W] → [N,L,C] (LLaVA and its successors).

    As get_image_features does, which cannot be traced itself: it splits by a static batch.
    """
    config = model.config
    hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    layers = config.vision_feature_layer
    if out := [i for i in ([layers] if isinstance(layers, int) else layers) if not -len(hidden) <= i < len(hidden)]:
        raise BadArtefact(
            f"vision_feature_layer names {out[0]}, but the tower gives {len(hidden)} states, its input and one behind "
            "each layer; correct config.json"
        )
    chosen = [hidden[i] for i in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [h[:, 1:] for h in chosen]
    return torch.cat(chosen, dim=-1)


def family_of(architectures: Sequence[str] | None, families: Sequence[Family]) -> Family:
    """The record for a checkpoint's ``architectures``; BadArtefact lists the known ones and near misses."""
    known = {family.architecture: family for family in families}
    for name in architectures or ():
        if name in known:
            return known[name]
    got = ", ".join(architectures or ()) or "none"
    if reasons := [f"{r.name}: {r.reason}" for r in REFUSED if r.architecture in (architectures or ())]:
        raise BadArtefact(
            f"architecture {got} is not supported ({reasons[0]}); saccade show families lists those that are, "
            "use one of them"
        )
    near = get_close_matches(got, known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else "; convert the checkpoint or open an issue for its family"
    raise BadArtefact(f"unknown architecture {got}; known are {', '.join(sorted(known))}{hint}")

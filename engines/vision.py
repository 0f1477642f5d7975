"""The vision stage with its prune point: which visual tokens of the prompt are there at all.

Legend: V visual tokens of the images, K those that stay, S prompt rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engines.families import Seen
from engines.policies import chosen
from engines.sessions.session import Value
from graphs.layouts.budgets import vision_feeds
from graphs.spec import visual_names

if TYPE_CHECKING:
    from engines.model import Model


@dataclass(frozen=True, eq=False)
class Features:
    """values: visual_embeds [K, D] and deepstack features. kept: int64 [K], which of the V they are; None: all."""

    values: Mapping[str, Value]
    kept: np.ndarray | None = None

    def rows(self, is_visual_S: np.ndarray) -> np.ndarray:
        """The prompt's rows that are there, int64: all text, and the placeholders of kept tokens."""
        if self.kept is None:
            return np.arange(len(is_visual_S))
        stays_S = ~is_visual_S
        stays_S[np.flatnonzero(is_visual_S)[self.kept]] = True
        return np.flatnonzero(stays_S)


def features_of(model: Model, seen: Seen, input_ids_S: np.ndarray, keep: float | None = None) -> Features:
    """Run the vision stage and its prune point; ``keep`` is a share instead of the plan's own.

    Raises UsageError for a share that the point cannot have.
    """
    spec, session = model.spec, model.session("vision")
    point, names = spec.plan.vision, visual_names(spec.language)
    if point is None:
        return Features(session.run(seen.feeds, device=names))
    if point.on_host:
        out = session.run(seen.feeds, host=names)
        embeds_VD, text_GD = out["visual_embeds"], out["visual_embeds"][:0]
        if point.score == "cdpruner":
            behind = int(np.flatnonzero(input_ids_S == spec.tokens.image)[-1]) + 1
            text_GD = model.to_host(model.embed_text(input_ids_S[behind:].tolist()))[0]
        kept_K = chosen(point, embeds_VD, text_GD, seen.tokens, keep)
        return Features({name: np.ascontiguousarray(value[kept_K]) for name, value in out.items()}, kept_K)
    feeds = vision_feeds(point, spec.grid, seen.tokens, keep)
    values = session.run({**seen.feeds, **feeds}, host=("kept_vision",), device=names)
    return Features({name: values[name] for name in names}, values["kept_vision"])

"""The vision stage with its prune point: which visual tokens of the prompt are there at all.

Legend: V visual tokens of the images, K those that stay, S prompt rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engines.policies import chosen
from engines.session import Value

if TYPE_CHECKING:
    from engines.model import Model


@dataclass(frozen=True, eq=False)
class Seen:
    """visual_embeds: [K, D]. kept: int64 [K], which of the V tokens they are; None where all are there."""

    visual_embeds: Value
    kept: np.ndarray | None = None

    def rows(self, is_visual_S: np.ndarray) -> np.ndarray:
        """The prompt's rows that are there, int64: all text, and the placeholders of kept tokens."""
        if self.kept is None:
            return np.arange(len(is_visual_S))
        stays_S = ~is_visual_S
        stays_S[np.flatnonzero(is_visual_S)[self.kept]] = True
        return np.flatnonzero(stays_S)


def see(
    model: Model, pixel_values: np.ndarray, input_ids_S: np.ndarray, images: int = 1, keep: float | None = None
) -> Seen:
    """Run the vision stage and its prune point; ``keep`` is a share instead of the plan's own.

    Raises UsageError for a share that the point cannot have.
    """
    point, session = model.spec.plan.vision, model.session("vision")
    if point is None:
        return Seen(session.run({"pixel_values": pixel_values}, device=("visual_embeds",))["visual_embeds"])
    is_visual_S = input_ids_S == model.spec.tokens.image
    if point.on_host:
        embeds_VD = session.run({"pixel_values": pixel_values}, host=("visual_embeds",))["visual_embeds"]
        after = input_ids_S[int(np.flatnonzero(is_visual_S)[-1]) + 1 :]
        text = model.to_host(model.embed_text(after.tolist()))[0] if point.score == "cdpruner" else embeds_VD[:0]
        kept_K = chosen(point, embeds_VD, text, images, keep)
        return Seen(np.ascontiguousarray(embeds_VD[kept_K]), kept_K)
    lengths = point.carriers(int(is_visual_S.sum()), images, keep)
    feeds: dict[str, Value] = {name: np.zeros(length, np.int32) for name, length in lengths.items()}
    out = session.run({"pixel_values": pixel_values, **feeds}, host=("kept_vision",), device=("visual_embeds",))
    return Seen(out["visual_embeds"], out["kept_vision"])

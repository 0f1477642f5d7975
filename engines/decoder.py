"""One decoder graph, run for a prefill, a decode step or a chunk on top of a past.

Legend: S rows of the chunk, D width, T = P_0 + S keys, R rows with logits, V vocabulary.
The carriers guide, keep_i and tail are read for their length only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from engines.budgets import Keep, checked_priority, cuts_behind, image_index
from engines.cache import Cache, empty_cache, form_of, grown
from engines.sessions.session import Session, Value
from graphs.errors import OperationFailed, UsageError
from graphs.plan import PruningPlan
from graphs.spec import ExportSpec, deepstack_names


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows of a conversation that are fed together.

    inputs_embeds: [1, S, D], host or device. is_visual: bool [S]. positions: original ones,
    int64 [S] ascending, or [3, S] where the model has three axes; None for text that follows the cache.
    deepstack: features by input name, [1, S, D]; those that are missing are zeros, as for text.
    visual_tokens: how many the images have originally, None where all of them are here.
    images: the same for each image, with image_of: int64, the image of each visual row; both are needed only by
    points per image, and left out the visual rows are one image's.
    """

    inputs_embeds: Value
    is_visual: np.ndarray
    positions: np.ndarray | None = None
    deepstack: Mapping[str, Value] = field(default_factory=dict)
    visual_tokens: int | None = None
    images: tuple[int, ...] = ()
    image_of: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.is_visual)


@dataclass(frozen=True, eq=False)
class Step:
    """What a run gave.

    logits: float32 [R, V]. kept: per prune point the rows of the chunk that went on, int64 ascending.
    received: what each cached and new row received from the guide rows, where the plan gives guidance: float32 [T] of
    this run, or what makes it later. Of a decoder that writes in place it stays on the device, [1, C_0], and goes on
    from ``so_far``.
    """

    logits: np.ndarray
    kept: tuple[np.ndarray, ...]
    received: Value | None
    cache: Cache


class Decoder:
    """A decoder session with the host's side of the contract: lengths, positions and their rules."""

    def __init__(self, session: Session, spec: ExportSpec) -> None:
        self._session = session
        self._spec = spec
        self._nothing = empty_cache(spec)
        self._dtype = {t.name: t.dtype for t in spec.stages["decoder"].inputs}
        self._kept_names = tuple(f"kept_{i}" for i in range(len(spec.plan.points)))
        self._form = form_of(spec, session)

    def run(
        self,
        chunk: Chunk,
        cache: Cache | None = None,
        keep: Keep = None,
        tail: int = 1,
        priority_S: np.ndarray | None = None,
        so_far: Value | None = None,
        guided: bool = True,
    ) -> Step:
        """Feed a chunk on top of a cache (None: of nothing).

        keep: share of the image's visual tokens behind each prune point, None for the plan's own.
        tail: how many of the last rows get logits. priority_S: float [S], where the plan prunes by it.
        so_far: the last step's ``received``, where a decoder that writes in place is to add to it. guided: False where
        nobody reads ``received``: of a plan that prunes by no such rows it is then of one, the fewest a graph takes.
        Raises UsageError where the plan cannot serve the chunk, OperationFailed for NaN in the logits.
        """
        rows, cache = len(chunk), cache or self._nothing
        position_S = self._positions(chunk, cache)
        cuts = cuts_behind(self._spec.plan, chunk.is_visual, keep, chunk.visual_tokens, chunk.images, chunk.image_of)
        prunes = any(cut.rows < rows for cut in cuts)
        cache, held = self._form.prepare(cache, (rows, *(cut.rows for cut in cuts)), so_far)
        feeds: dict[str, Value] = {
            "position_ids": position_S[None] if position_S.ndim == 1 else position_S[:, None],
            "tail": np.zeros(tail, np.int32),
            **self._feeds_of(chunk, guided),
            **{name: value for cut in cuts for name, value in cut.feeds.items()},
            **cache.values,
            **held,
        }
        if self._spec.plan.uses_priority:
            feeds["priority"] = checked_priority(priority_S, chunk.is_visual, prunes)
        host = ("logits", *(self._kept_names if prunes else ()))
        out = self._session.run(feeds, host=host, device=self._form.device, in_place=self._form.in_place)
        logits_RV = out["logits"][0].astype(np.float32, copy=False)
        if not np.isfinite(logits_RV.max(axis=-1)).all():
            if cache.room:
                cache.room.spoiled = True
            raise OperationFailed(
                "the decoder's logits are not numbers (NaN or infinite), so no token can be chosen; "
                "replay the golden tensors with: saccade verify"
            )
        # Where nothing is dropped the host knows which rows stay.
        indices = [out[name][0] for name in self._kept_names] if prunes else [np.arange(rows) for _ in cuts]
        kept = composed(rows, indices)
        return Step(logits_RV, kept, self._form.received(out), grown(cache, out, position_S, kept))

    def _positions(self, chunk: Chunk, cache: Cache) -> np.ndarray:
        """Original positions of the chunk's rows, int64 [S] or [3, S]; UsageError for more than the model has."""
        language, position_S = self._spec.language, chunk.positions
        if position_S is None:
            line = np.arange(cache.next_position, cache.next_position + len(chunk), dtype=np.int64)
            position_S = line if language.position_axes == 1 else np.tile(line, (3, 1))
        if (last := int(position_S.max())) >= language.max_positions:
            raise UsageError(
                f"the conversation would be {last + 1} tokens long, but the model has "
                f"{language.max_positions} positions; shorten it"
            )
        return position_S

    def _feeds_of(self, chunk: Chunk, guided: bool) -> dict[str, Value]:
        """What the graph is told of the chunk's rows, whatever the cache holds and the cuts drop."""
        plan, language = self._spec.plan, self._spec.language
        zeros = (1, len(chunk), language.width)
        feeds: dict[str, Value] = {
            "inputs_embeds": chunk.inputs_embeds,
            **{name: np.zeros(zeros, self._dtype[name]) for name in deepstack_names(language)},
            **chunk.deepstack,
        }
        if plan.uses_visual:
            feeds["is_visual"] = chunk.is_visual[None]
        if plan.uses_image:
            feeds["image_index"] = image_index(chunk.is_visual, chunk.image_of)[None]
        if plan.uses_guide:
            rated = guide_rows(plan, chunk.is_visual)
            feeds["guide"] = np.zeros(rated if guided or plan.points else 1, np.int32)
        return feeds


def following(positions: np.ndarray, rows: int) -> np.ndarray:
    """Positions of text behind positions [S] or [3, S], of the same axes."""
    line = int(positions.max()) + 1 + np.arange(rows, dtype=np.int64)
    return np.broadcast_to(line, (*positions.shape[:-1], rows))


def guide_rows(plan: PruningPlan, is_visual_S: np.ndarray) -> int:
    """Return G, how many trailing rows guide: what the plan says, but every row of a chunk without an image.

    Raises UsageError where an image has no text behind it.
    """
    visual = np.flatnonzero(is_visual_S)
    if not len(visual):
        return len(is_visual_S)
    text = len(is_visual_S) - 1 - int(visual[-1])
    if not text:
        raise UsageError(
            "the question is not in the same chunk as its image, and guidance is computed from the text rows "
            "behind the image; feed image and question together"
        )
    return plan.guide_rows(text)


def composed(rows: int, kept: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Turn indices into the rows of the segment before into rows of the chunk, point after point."""
    reached = np.arange(rows)
    result = []
    for kept_S in kept:
        reached = reached[kept_S]
        result.append(reached)
    return tuple(result)

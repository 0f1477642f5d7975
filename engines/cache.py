"""The KV cache of a conversation: one length per segment of layers, values that never leave the device.

A decoder's cache has one of two forms. ``Concatenated``: a run returns new tensors, a chunk longer. ``InPlace``: a run
writes the chunk's rows behind the filled ones of a buffer, and no past row is copied. A cache is immutable in both:
the views of one room share its buffers, each with lengths of its own, and whoever would write over rows that a living
view still counts on moves to a room of its own first.

Legend: Hkv key-value heads, P_j cached rows of segment j, C_j rows that its buffers hold, d head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from engines.sessions.session import NOTHING, Later, Session, Value
from graphs.spec import RECEIVED_BEFORE, ExportSpec, length_name, past_names, present_names

RECEIVED = "attention_received"
SPARE_ROWS = 128  # that a new room has beyond what is asked for, at least; more where the cache is long
SPARE_SHARE = 16  # … one row for so many


class Room:
    """Buffers that one or more views of a cache share: input name → [1, Hkv, C_j, d], and who looks at them.

    spoiled: a run wrote what is no number behind the filled rows, so the next one must not read these buffers.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        self.values = values
        self.spoiled = False
        self.views: weakref.WeakSet[Cache] = weakref.WeakSet()

    def takes(self, view: Cache, filled: Mapping[str, int]) -> bool:
        """Whether a view may be filled up to these rows here: there is room, and no other view has rows there.

        filled: a buffer of each segment → its rows.
        """
        if self.spoiled or any(self.values[name].shape[2] < rows for name, rows in filled.items()):
            return False
        others = [other.lengths for other in self.views if other is not view]
        return not any(n > own for lengths in others for n, own in zip(lengths, view.lengths, strict=True))


@dataclass(frozen=True, eq=False)
class Cache:
    """Immutable: a run returns the next one, and an older one can be continued a second time.

    values: input name of the decoder → [1, Hkv, P_j, d] on the device, or the buffers [1, Hkv, C_j, d] of ``room``.
    positions: per segment the original positions of its rows, int64 [P_j], ascending, or [3, P_j].
    room: where the cache is written in place, None where it is concatenated or has not begun.
    """

    values: Mapping[str, Value]
    positions: tuple[np.ndarray, ...]
    next_position: int
    room: Room | None = None

    def __post_init__(self) -> None:
        if self.room:
            self.room.views.add(self)

    @property
    def lengths(self) -> tuple[int, ...]:
        """P_j of every segment."""
        return tuple(p.shape[-1] for p in self.positions)


def empty_cache(spec: ExportSpec) -> Cache:
    """Return the cache of a conversation that has not begun: every P_j is 0."""
    language = spec.language
    dtype = {t.name: t.dtype for t in spec.stages["decoder"].inputs}
    values = {
        name: np.zeros((1, language.kv_heads, 0, language.head_dim), dtype=dtype[name])
        for layer in range(language.layers)
        for name in past_names(layer)
    }
    segments = spec.plan.segments(language.layers)
    shape = (0,) if language.position_axes == 1 else (3, 0)
    return Cache(values, tuple(np.zeros(shape, np.int64) for _ in segments), 0)


class Concatenated:
    """A run returns caches that are a chunk longer, and what this run's rows received; the host adds that up."""

    in_place: Mapping[str, str] = NOTHING

    def __init__(self, spec: ExportSpec, session: Session) -> None:
        self._session = session
        presents = tuple(present for _, present in _pairs(spec.language.layers))
        self.device = (*presents, RECEIVED) if spec.plan.guidance else presents

    def prepare(self, cache: Cache, more: Sequence[int], so_far: Value | None) -> tuple[Cache, Mapping[str, Value]]:
        """Return what ``InPlace.prepare`` does: the same view, and no more feeds."""
        return cache, {}

    def received(self, out: Mapping[str, Value]) -> Value | None:
        """What each row received in this run, float32 [T], or what makes it later; None without guidance."""
        received = out.get(RECEIVED)
        if received is None or isinstance(received, Later):
            return received
        return self._session.to_host(received)[0].astype(np.float32)


class InPlace:
    """A run writes into the buffers of a room, and adds what its rows received to what earlier ones did."""

    def __init__(self, spec: ExportSpec, session: Session) -> None:
        self._session, self._guidance = session, spec.plan.guidance
        self._segments = spec.plan.segments(spec.language.layers)
        self.in_place = {present: past for past, present in _pairs(spec.language.layers)}
        self.device = (RECEIVED,) if self._guidance else ()

    def prepare(self, cache: Cache, more: Sequence[int], so_far: Value | None) -> tuple[Cache, Mapping[str, Value]]:
        """Return the same view where ``more`` rows per segment can be written behind it, and the feeds that say where.

        so_far: what the rows received in earlier steps, the last run's output; None: nothing.
        Raises OperationFailed where the session's buffers are of a size that this does not fit into.
        """
        ready = self._with_room(cache, more)
        lengths = enumerate(ready.lengths)
        feeds: dict[str, Value] = {length_name(j): np.array([n], np.int64) for j, n in lengths if self._segments[j]}
        if self._guidance:
            feeds[RECEIVED_BEFORE] = self._before(ready, so_far, moved=ready is not cache)
        return ready, feeds

    def received(self, out: Mapping[str, Value]) -> Value | None:
        """What each row received so far, [1, C_0] on the device; None without guidance."""
        return out.get(RECEIVED)

    def _with_room(self, cache: Cache, more: Sequence[int]) -> Cache:
        """The same view here, or in a room of its own."""
        filled = [held + rows for held, rows in zip(cache.lengths, more, strict=True)]
        firsts = {past_names(layers[0])[0]: rows for layers, rows in zip(self._segments, filled, strict=True) if layers}
        if cache.room and cache.room.takes(cache, firsts):
            return cache
        values: dict[str, Value] = {}
        for segment, held, rows in zip(self._segments, cache.lengths, filled, strict=True):
            wanted = rows + max(SPARE_ROWS, rows // SPARE_SHARE)
            sources = {name: cache.values[name] for layer in segment for name in past_names(layer)}
            values |= self._session.buffers(sources, held, rows, wanted) if sources else {}
        return Cache(values, cache.positions, cache.next_position, Room(values))

    def _before(self, cache: Cache, so_far: Value | None, moved: bool) -> Value:
        """What the rows received in earlier steps, as long as the cache's buffers: [1, C_0]."""
        rows = next(iter(cache.values.values())).shape[2]
        if so_far is None:
            return np.zeros((1, rows), np.float32)
        if not moved:
            return so_far
        before = self._session.to_host(so_far)[:, : cache.lengths[0]]
        return np.pad(before, ((0, 0), (0, rows - before.shape[1])))


def form_of(spec: ExportSpec, session: Session) -> Concatenated | InPlace:
    """Return how a decoder's caches grow in a session."""
    return InPlace(spec, session) if session.form == "in-place" else Concatenated(spec, session)


def grown(cache: Cache, outputs: Mapping[str, Value], position_S: np.ndarray, kept: tuple[np.ndarray, ...]) -> Cache:
    """Return the cache after a run.

    outputs: the run's ``present_*`` values; none of a decoder that writes in place. position_S: original positions of
    the chunk's rows. kept: per prune point the rows of the chunk that reach the segment behind it.
    """
    values = cache.values
    if not cache.room:
        values = {past: outputs[present] for past, present in _pairs(len(cache.values) // 2)}
    rows = (np.arange(position_S.shape[-1]), *kept)
    segments = zip(cache.positions, rows, strict=True)
    positions = tuple(np.concatenate([old, position_S[..., r]], axis=-1) for old, r in segments)
    return Cache(values, positions, int(position_S.max()) + 1, cache.room)


@lru_cache
def _pairs(layers: int) -> tuple[tuple[str, str], ...]:
    """Cache inputs and the outputs that continue them."""
    return tuple(pair for i in range(layers) for pair in zip(past_names(i), present_names(i), strict=True))


def cut(cache: Cache, spec: ExportSpec, position: int, to_host: Callable[[Value], np.ndarray]) -> Cache:
    """Return the cache without the rows from a position on; the row that stands there must be text.

    On the first axis every row before a text row has a smaller position, in every family. In place nothing is copied:
    the shorter view looks at the same buffers. It moves when it is continued while the longer one is still held.
    """
    if position >= cache.next_position:
        return cache
    if cache.room:
        return Cache(cache.values, _before(cache, position), position, cache.room)
    return on_host(cache, spec, position, to_host)


def on_host(cache: Cache, spec: ExportSpec, position: int, to_host: Callable[[Value], np.ndarray]) -> Cache:
    """Return the rows before a position as a cache of its own, whose values nothing writes to; see ``cut``."""
    positions, values = _before(cache, position), dict(cache.values)
    for rows, segment in zip(positions, spec.plan.segments(spec.language.layers), strict=True):
        for name in (name for layer in segment for name in past_names(layer)):
            values[name] = to_host(values[name])[:, :, : rows.shape[-1]].copy()
    return Cache(values, positions, position)


def _before(cache: Cache, position: int) -> tuple[np.ndarray, ...]:
    """Per segment the positions of its rows before one."""
    counts = [int((p[0] < position).sum()) if p.ndim > 1 else int((p < position).sum()) for p in cache.positions]
    return tuple(p[..., :count] for p, count in zip(cache.positions, counts, strict=True))

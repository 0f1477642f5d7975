"""The KV cache of a conversation: one length per segment of layers, values that never leave the device.

Legend: Hkv key-value heads, P_j cached rows of segment j, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from engines.sessions.session import Value
from graphs.spec import ExportSpec, past_names, present_names


@dataclass(frozen=True, eq=False)
class Cache:
    """Immutable: a run returns the next one, and an older one can be continued a second time.

    values: input name of the decoder → [1, Hkv, P_j, d], on the device.
    positions: per segment the original positions of its rows, int64 [P_j], ascending, or [3, P_j].
    """

    values: Mapping[str, Value]
    positions: tuple[np.ndarray, ...]
    next_position: int

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


def present_outputs(spec: ExportSpec) -> tuple[str, ...]:
    """Return the decoder's cache outputs, in the order of its layers."""
    return tuple(name for layer in range(spec.language.layers) for name in present_names(layer))


def grown(cache: Cache, outputs: Mapping[str, Value], position_S: np.ndarray, kept: tuple[np.ndarray, ...]) -> Cache:
    """Return the cache after a run.

    outputs: the run's ``present_*`` values. position_S: original positions of the chunk's rows.
    kept: per prune point the rows of the chunk that reach the segment behind it.
    """
    values = {}
    for layer in range(len(cache.values) // 2):
        for past, present in zip(past_names(layer), present_names(layer), strict=True):
            values[past] = outputs[present]
    rows = (np.arange(position_S.shape[-1]), *kept)
    segments = zip(cache.positions, rows, strict=True)
    positions = tuple(np.concatenate([old, position_S[..., r]], axis=-1) for old, r in segments)
    return Cache(values, positions, int(position_S.max()) + 1)


def cut(cache: Cache, spec: ExportSpec, position: int, to_host: Callable[[Value], np.ndarray]) -> Cache:
    """Return the cache without the rows from a position on; the row that stands there must be text.

    On the first axis every row before a text row has a smaller position, in every family.
    """
    if position >= cache.next_position:
        return cache
    counts = [int((p[0] < position).sum()) if p.ndim > 1 else int((p < position).sum()) for p in cache.positions]
    values = dict(cache.values)
    for count, segment in zip(counts, spec.plan.segments(spec.language.layers), strict=True):
        for name in (name for layer in segment for name in past_names(layer)):
            values[name] = np.ascontiguousarray(to_host(values[name])[:, :, :count])
    positions = tuple(p[..., :count] for p, count in zip(cache.positions, counts, strict=True))
    return Cache(values, positions, position)

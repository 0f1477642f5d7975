"""Cache buffers of the host that ONNX Runtime writes in place, lent to one conversation after another.

A short conversation's buffers cost more Python than memory: an array, a value and a binding for each of some fifty
caches. So the small ones are kept when nobody holds them any more, and with them how they were bound.

Legend: N caches of one segment, Hkv key-value heads, C rows, d head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from engines.sessions.session import Value

KEPT_BYTES = 4 << 20  # of one piece, at most: beyond, what is saved is lost in what is computed
KEPT = 4  # idle pieces of a session
NEAR = 64  # rows that a kept piece may have more or less than is wanted


@dataclass(frozen=True)
class Bound:
    """A binding, and what need not be bound again: a decode step has some fifty caches and five other inputs.

    buffers: input name → what is bound to it and to its output; the other outputs were bound before those.
    """

    binding: ort.IOBinding
    buffers: Mapping[str, ort.OrtValue]

    def serves(self, written: Mapping[str, Value]) -> bool:
        """Whether it is bound to these buffers."""
        return all(getattr(written[name], "value", None) is value for name, value in self.buffers.items())


class Piece:
    """The memory of one segment's buffers, [N, 1, Hkv, C, d], as arrays and as values, which are the same memory.

    bound: names of what is returned beside the caches → how the last such run was bound, where this piece was first.
    """

    def __init__(self, whole: np.ndarray) -> None:
        self.whole = whole
        self.values = [ort.OrtValue.ortvalue_from_numpy(array) for array in whole]
        self.bound: dict[tuple[str, ...], Bound] = {}

    def suits(self, count: int, like: np.ndarray, rows: int, wanted: int) -> bool:
        """Whether it may be lent for so many arrays of this form with another number of rows."""
        n, one, heads, capacity, width = self.whole.shape
        same = (n, one, heads, width) == (count, *like.shape[:2], like.shape[3]) and self.whole.dtype == like.dtype
        return same and rows <= capacity and abs(capacity - wanted) <= NEAR


class HostBuffer:
    """One array of a piece, while it is lent: ``array`` and ``value`` are the same memory."""

    def __init__(self, piece: Piece, at: int, lease: object) -> None:
        self.piece, self.array, self.value = piece, piece.whole[at], piece.values[at]
        self.shape = self.array.shape
        self._lease = lease  # all buffers of one lending hold it, and the piece is idle when the last lets go


class Shelf:
    """Pieces that nobody holds, small and few."""

    def __init__(self) -> None:
        self._idle: list[Piece] = []

    def lend(self, count: int, like: np.ndarray, rows: int, wanted: int) -> list[HostBuffer]:
        """N buffers of ``rows`` rows or more, near ``wanted``; like: [1, Hkv, any, d]. What they hold is any."""
        suiting = (piece for piece in tuple(self._idle) if piece.suits(count, like, rows, wanted))
        piece = next((piece for piece in suiting if self._taken(piece)), None)
        if not piece:
            piece = Piece(np.empty((count, *like.shape[:2], wanted, like.shape[3]), like.dtype))
        lease = Lease()
        weakref.finalize(lease, self._put, piece).atexit = False
        return [HostBuffer(piece, at, lease) for at in range(len(piece.values))]

    def _taken(self, piece: Piece) -> bool:
        """Take it, unless another thread was faster."""
        try:
            self._idle.remove(piece)
        except ValueError:
            return False
        return True

    def _put(self, piece: Piece) -> None:
        if piece.whole.nbytes <= KEPT_BYTES:
            self._idle.append(piece)
            del self._idle[:-KEPT]


class Lease:
    """One lending of a piece."""

"""Weights made from an export's: one safetensors file, each tensor written in pieces after every graph is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphs.weights import NewTensor, write_safetensors

CHUNK = 1 << 22  # values made at a time
ALIGNED = 64  # bytes: a cache line
HEADER = 1 << 20  # a fixed place for safetensors' header, so that offsets are known before the last weight is
Pieces = Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class _Place:
    at: int
    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    pieces: Pieces


class DerivedWeights:
    """``place`` gives a tensor its place in ``folder / file``, once per key; ``write`` fills the file."""

    def __init__(self, folder: Path, file: str = "weights.safetensors", align: int = ALIGNED) -> None:
        self.folder, self.file = folder, file
        self._align = align
        self._places: dict[tuple[object, ...], _Place] = {}
        self._size = 0

    @property
    def is_needed(self) -> bool:
        """Whether any weight was placed."""
        return bool(self._places)

    def place(
        self, key: tuple[object, ...], name: str, dtype: ir.DataType, shape: tuple[int, ...], pieces: Pieces
    ) -> ir.ExternalTensor:
        """A tensor's place; ``pieces`` makes its values in order when the file is written.

        key: tensors of one key are one tensor; what is read under another shape of as many bytes is a view of it.
        """
        if key not in self._places:
            self._places[key] = _Place(self._size, self._stored_as(name), dtype, shape, pieces)
            self._size += -(-_bytes(shape, dtype) // self._align) * self._align
        length = _bytes(shape, dtype)
        return ir.ExternalTensor(
            self.file,
            HEADER + self._places[key].at,
            length,
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.folder,
        )

    def write(self) -> None:
        """Fill the file; OperationFailed where a name table of this many weights does not fit."""
        tensors = [_new(place) for place in self._places.values()]
        write_safetensors(self.folder / self.file, tensors, header_bytes=HEADER, align=self._align)

    def _stored_as(self, name: str) -> str:
        """The next tensor's name in the file, where several may have the same in their graphs."""
        return f"{len(self._places)}.{name}"


def _new(place: _Place) -> NewTensor:
    """A tensor as safetensors has it: int4 is stored as bytes of two values."""
    kind, shape = place.dtype.numpy(), place.shape
    if place.dtype == ir.DataType.INT4:
        kind, shape = np.dtype(np.uint8), (_bytes(shape, place.dtype),)
    return NewTensor(place.name, kind.name, shape, lambda: (piece.astype(kind, copy=False) for piece in place.pieces()))


def _bytes(shape: tuple[int, ...], dtype: ir.DataType) -> int:
    return int(prod(shape) * dtype.itemsize)

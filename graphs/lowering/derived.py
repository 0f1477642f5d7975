"""Weights made from an export's: one safetensors file, each tensor written in pieces after every graph is known."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphs.errors import OperationFailed
from graphs.lowering.weights import HEADER

CHUNK = 1 << 22  # values made at a time
ALIGNED = 64  # bytes: a cache line
# int4 is stored as bytes of two values
SAFETENSORS_NAME = {
    ir.DataType.INT4: "U8",
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.UINT8: "U8",
    ir.DataType.INT8: "I8",
}
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

    def __init__(self, folder: Path, file: str = "weights.safetensors") -> None:
        self.folder, self.file = folder, file
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
            self._places[key] = _Place(self._size, name, dtype, shape, pieces)
            self._size += -(-_bytes(shape, dtype) // ALIGNED) * ALIGNED
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
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for i, p in enumerate(self._places.values()):
            if p.at > end:
                header[f"{i}.padding"] = {"dtype": "U8", "shape": [p.at - end], "data_offsets": [end, p.at]}
            end = p.at + _bytes(p.shape, p.dtype)
            name = SAFETENSORS_NAME[p.dtype]
            header[f"{i}.{p.name}"] = {"dtype": name, "shape": _shape(p), "data_offsets": [p.at, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > HEADER - 8:
            raise OperationFailed(f"{len(self._places)} weights are more than one file can name; report this")
        with (self.folder / self.file).open("wb") as out:
            out.write(struct.pack("<Q", HEADER - 8) + text.ljust(HEADER - 8))
            for p in self._places.values():
                out.write(b"\0" * (HEADER + p.at - out.tell()))
                for piece in p.pieces():
                    out.write(np.ascontiguousarray(piece, np.uint8 if _halves(p.dtype) else p.dtype.numpy()).data)
                assert out.tell() == HEADER + p.at + _bytes(p.shape, p.dtype)


def _halves(dtype: ir.DataType) -> bool:
    return dtype == ir.DataType.INT4


def _bytes(shape: tuple[int, ...], dtype: ir.DataType) -> int:
    return int(prod(shape) * dtype.itemsize)


def _shape(place: _Place) -> list[int]:
    return [_bytes(place.shape, place.dtype)] if _halves(place.dtype) else list(place.shape)

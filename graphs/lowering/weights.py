"""Weights in another float type: one safetensors file, written as a stream after every graph that reads it is known."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphs.errors import BadArtefact, OperationFailed

CHUNK = 1 << 22  # values converted at a time
SAFETENSORS_NAME = {ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16", ir.DataType.BFLOAT16: "BF16"}
Key = tuple[str, int, int]


class ConvertedWeights:
    """External tensors in ``dtype``: those that have it stay where they are, the others move into ``folder / file``.

    ``rebind`` names the place of each weight, once per weight however many graphs read it; ``write`` fills the file.
    """

    def __init__(self, folder: Path, file: str = "weights.safetensors") -> None:
        self.folder, self.file = folder, file
        self._places: dict[Key, tuple[int, ir.ExternalTensor, ir.DataType]] = {}
        self._size = 0

    @property
    def is_needed(self) -> bool:
        """Whether any weight has to be converted."""
        return bool(self._places)

    @property
    def bytes(self) -> int:
        """Size of all converted weights."""
        return self._size

    def rebind(self, tensor: ir.ExternalTensor, dtype: ir.DataType) -> ir.ExternalTensor:
        """The place of a weight in ``dtype``; offsets count from the end of a header that ``write`` adds."""
        if tensor.dtype == dtype:
            return tensor
        key = (str(tensor.path), tensor.offset or 0, tensor.length or tensor.nbytes)
        if key not in self._places:
            self._places[key] = (self._size, tensor, dtype)
            self._size += tensor.size * _width(dtype)
        return self._external(self._places[key][0], tensor, dtype)

    def _external(self, at: int, tensor: ir.ExternalTensor, dtype: ir.DataType) -> ir.ExternalTensor:
        length = tensor.size * _width(dtype)
        return ir.ExternalTensor(
            self.file, HEADER + at, length, dtype, shape=tensor.shape, name=str(tensor.name), base_dir=self.folder
        )

    def write(self) -> None:
        """Fill the file; OperationFailed names a weight that ``dtype`` cannot hold."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for at, tensor, dtype in self._places.values():
            end = at + tensor.size * _width(dtype)
            header[f"{at}.{tensor.name}"] = {
                "dtype": SAFETENSORS_NAME[dtype],
                "shape": list(tensor.shape.numpy()),
                "data_offsets": [at, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > HEADER - 8:
            raise OperationFailed(f"{len(self._places)} weights are more than one converted file can name; report this")
        with (self.folder / self.file).open("wb") as out:
            out.write(struct.pack("<Q", HEADER - 8) + text.ljust(HEADER - 8))
            for _, tensor, dtype in self._places.values():
                for wide in _chunks(tensor):
                    with np.errstate(over="ignore"):
                        converted = wide.astype(dtype.numpy())
                    if not np.isfinite(converted.astype(np.float32)).all():
                        raise OperationFailed(
                            f"weight {tensor.name} leaves the range of {dtype.name.lower()}; choose another --precision"
                        )
                    out.write(converted.tobytes())


HEADER = 1 << 20  # a fixed place for safetensors' header, so that offsets are known before the last weight is


def _width(dtype: ir.DataType) -> int:
    """Bytes of one value; onnx-ir gives a fraction, for types below a byte."""
    return int(dtype.itemsize)


def _chunks(tensor: ir.ExternalTensor) -> Iterator[np.ndarray]:
    dtype = tensor.dtype.numpy()
    with Path(tensor.path).open("rb") as file:
        file.seek(tensor.offset or 0)
        left = tensor.size
        while left:
            count = min(left, CHUNK)
            data = file.read(count * dtype.itemsize)
            if len(data) != count * dtype.itemsize:
                raise BadArtefact(f"{tensor.path} ended early while its weights were read; export the checkpoint again")
            yield np.frombuffer(data, dtype)
            left -= count

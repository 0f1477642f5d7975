"""Weights in another float type: one safetensors file, written as a stream after every graph that reads it is known."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphs.errors import BadArtefact, OperationFailed
from graphs.lowering.derived import CHUNK, DerivedWeights


class ConvertedWeights(DerivedWeights):
    """External tensors in another type: those that have it stay where they are, the others move into ``folder / file``.

    ``rebind`` names the place of each weight, once per weight however many graphs read it; ``write`` fills the file,
    and raises OperationFailed for a weight that the type cannot hold.
    """

    def __init__(self, folder: Path, file: str = "weights.safetensors") -> None:
        super().__init__(folder, file, align=1)

    def rebind(self, tensor: ir.ExternalTensor, dtype: ir.DataType) -> ir.ExternalTensor:
        """The place of a weight in ``dtype``; offsets count from the end of a header that ``write`` adds."""
        if tensor.dtype == dtype:
            return tensor
        key = (str(tensor.path), tensor.offset or 0, tensor.length or tensor.nbytes)
        shape = tuple(int(size) for size in tensor.shape.numpy())
        return self.place(key, str(tensor.name), dtype, shape, partial(_converted, tensor, dtype))

    def _stored_as(self, name: str) -> str:
        return f"{self._size}.{name}"


def _converted(tensor: ir.ExternalTensor, dtype: ir.DataType) -> Iterator[np.ndarray]:
    """A weight's values in ``dtype``; OperationFailed where it cannot hold one."""
    stored = tensor.dtype.numpy()
    with Path(tensor.path).open("rb") as file:
        file.seek(tensor.offset or 0)
        left = tensor.size
        while left:
            count = min(left, CHUNK)
            data = file.read(count * stored.itemsize)
            if len(data) != count * stored.itemsize:
                raise BadArtefact(f"{tensor.path} ended early while its weights were read; export the checkpoint again")
            with np.errstate(over="ignore"):
                converted = np.frombuffer(data, stored).astype(dtype.numpy())
            if not np.isfinite(converted.astype(np.float32)).all():
                raise OperationFailed(
                    f"weight {tensor.name} leaves the range of {dtype.name.lower()}; choose another --precision"
                )
            yield converted
            left -= count

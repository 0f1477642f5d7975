"""Where the constants of a graph lie: inside the .onnx or in a weight file, and how to read their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from graphs.files import path_inside
from graphs.rules.rule import Stage, nodes_of

HEAD = 4096


@dataclass(frozen=True)
class Constant:
    """An initialiser or Constant of a stage; ``location`` is None where its bytes lie in the .onnx itself."""

    stage: Stage
    tensor: Any
    location: str | None
    offset: int
    length: int

    @property
    def name(self) -> str:
        """Its name in the graph."""
        return str(self.tensor.name)

    @property
    def where(self) -> str:
        """Stage file and name, as a finding says it."""
        return f"{self.stage.interface.file}: {self.name}"

    @cached_property
    def path(self) -> Path | None:
        """The file its bytes lie in, None where that is not inside the export folder."""
        if self.location is None:
            return self.stage.folder / self.stage.interface.file
        return path_inside(self.stage.folder, self.location)

    @property
    def is_readable(self) -> bool:
        """Whether the bytes can be had at all; other rules say why not."""
        if self.location is None:
            return True
        return self.path is not None and self.path.is_file() and self.offset + self.length <= self.path.stat().st_size

    @property
    def wanted_bytes(self) -> int:
        """Bytes by dtype and shape."""
        return prod(self.tensor.dims) * _item_bytes(self.tensor.data_type)

    def bytes(self, limit: int | None = None) -> np.ndarray:
        """The first ``limit`` bytes (all without it) as uint8, mapped and not loaded where they lie in a file."""
        if self.location is None:
            import onnx

            return np.frombuffer(onnx.numpy_helper.to_array(self.tensor).tobytes()[:limit], np.uint8)
        length = self.length if limit is None else min(limit, self.length)
        if length == 0 or self.path is None:
            return np.zeros(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r", self.offset, (length,))

    @property
    def place(self) -> tuple[object, ...]:
        """Two constants of one place share their bytes."""
        if self.location is None:
            return (self.stage.name, self.name)
        return (self.location, self.offset, self.length)

    def digest(self, limit: int | None = None) -> str:
        """SHA-256 of the bytes."""
        return hashlib.sha256(self.bytes(limit).data).hexdigest()


def constants_of(stage: Stage) -> Iterator[Constant]:
    """All initialisers and Constant tensors of a stage, nested graphs and function bodies included."""
    graphs = [stage.model.graph, *stage.model.functions]
    for tensor in stage.model.graph.initializer:
        yield _constant(stage, tensor)
    for graph in graphs:
        for node in nodes_of(graph):
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield _constant(stage, attribute.t)
                for tensor in attribute.g.initializer if attribute.HasField("g") else ():
                    yield _constant(stage, tensor)


def _constant(stage: Stage, tensor: Any) -> Constant:
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return Constant(stage, tensor, None, 0, prod(tensor.dims) * _item_bytes(tensor.data_type))
    said = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = (_count(said.get(key)) for key in ("offset", "length"))
    missing = prod(tensor.dims) * _item_bytes(tensor.data_type) if length is None else length
    return Constant(stage, tensor, said.get("location", ""), offset or 0, missing)


def _count(text: str | None) -> int | None:
    """A decimal count; what is none becomes a huge one, which lies in no file."""
    if text is None:
        return None
    return int(text) if text.isascii() and text.isdigit() else 1 << 62


def _item_bytes(data_type: int) -> int:
    import onnx

    try:
        return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)
    except (KeyError, ValueError):
        return 0

"""Where the constants of a graph lie: inside the .onnx or in a weight file, and how to read their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from graphs.files import path_inside
from graphs.rules.rule import Stage, label, nodes_of

HEAD = 4096
DIGITS = 19  # of a count that any file may have
Content: TypeAlias = bytes


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
            return self._content is not None
        return self.path is not None and self.path.is_file() and self.offset + self.length <= self.path.stat().st_size

    @property
    def wanted_bytes(self) -> int:
        """Bytes by dtype and shape."""
        return _bytes_of(self.tensor)

    @cached_property
    def _content(self) -> Content | None:
        return content_of(self.tensor)

    def bytes(self, limit: int | None = None) -> np.ndarray:
        """The first ``limit`` bytes (all without it) as uint8, mapped and not loaded where they lie in a file."""
        if self.location is None:
            return np.frombuffer((self._content or b"")[:limit], np.uint8)
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
    for tensor in _initializers(stage.model.graph):
        yield _constant(stage, tensor)
    for attribute, _ in _attributes(stage):
        for tensor in (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors:
            yield _constant(stage, tensor)
        sparse = (attribute.sparse_tensor,) if attribute.HasField("sparse_tensor") else ()
        for both in (*sparse, *attribute.sparse_tensors):
            yield from (_constant(stage, both.values), _constant(stage, both.indices))
        for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
            yield from (_constant(stage, tensor) for tensor in _initializers(graph))


def lists_of(stage: Stage) -> Iterator[tuple[str, int]]:
    """Node and attribute, and bytes, of all numbers and texts that attributes hold outside tensors."""
    for attribute, where in _attributes(stage):
        size = 4 * len(attribute.floats) + 8 * len(attribute.ints) + len(attribute.s)
        yield f"{where}.{attribute.name}", size + sum(map(len, attribute.strings))


def content_of(tensor: Any) -> Content | None:
    """The bytes of a tensor's values where they lie in the .onnx; None where they do not fit its shape and type."""
    import onnx

    if tensor.data_type == onnx.TensorProto.STRING:
        return b"\0".join(tensor.string_data) if len(tensor.string_data) == prod(tensor.dims) else None
    try:
        return bytes(onnx.numpy_helper.to_array(tensor).tobytes())
    except Exception:  # what a damaged tensor raises is of many kinds
        return None


def _initializers(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)


def _attributes(stage: Stage) -> Iterator[tuple[Any, str]]:
    """Every attribute, of nested nodes and functions' defaults too, and the node or function that has it."""
    for function in stage.model.functions:
        yield from ((attribute, function.name) for attribute in function.attribute_proto)
    for graph in (stage.model.graph, *stage.model.functions):
        for node in nodes_of(graph):
            yield from ((attribute, label(node)) for attribute in node.attribute)


def _constant(stage: Stage, tensor: Any) -> Constant:
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return Constant(stage, tensor, None, 0, _bytes_of(tensor))
    said = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = (_count(said.get(key)) for key in ("offset", "length"))
    return Constant(
        stage, tensor, said.get("location", ""), offset or 0, _bytes_of(tensor) if length is None else length
    )


def _count(text: str | None) -> int | None:
    """A decimal count; what is none becomes a huge one, which lies in no file."""
    if text is None:
        return None
    return int(text) if text.isascii() and text.isdigit() and len(text) < DIGITS else 1 << 62


def _bytes_of(tensor: Any) -> int:
    """Bytes by dtype and shape; a tensor of text has those of its text."""
    if tensor.string_data:
        return sum(map(len, tensor.string_data))
    dtype = dtype_of(tensor)
    return max(0, prod(tensor.dims)) * dtype.itemsize if dtype is not None else 0


def dtype_of(tensor: Any) -> np.dtype | None:
    """The type of a tensor's values; None where ONNX has no such type."""
    import onnx

    try:
        return onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except (KeyError, ValueError):
        return None

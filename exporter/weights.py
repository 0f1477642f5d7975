"""Weights on their way out: one copy of each, beside the .onnx files, never all of them in memory.

Where every weight already has the wanted dtype, the checkpoint's own files are cloned (or used in
place) and the graphs point into them; else one safetensors file is written, converted as a stream.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from exporter.checkpoint import DTYPES
from graphs.errors import BadArtefact, OperationFailed
from graphs.files import clone_or_copy
from graphs.weights import SINGLE_FILE, NewTensor, TensorSlice, write_safetensors

Placing = Literal["clone", "copy", "in-place", "converted"]
CHUNK = 1 << 22  # values converted at a time


@dataclass(frozen=True)
class PlacedWeights:
    """Parameter name → its place in ``folder``; ``how`` says what was done to get it there."""

    folder: Path
    slices: dict[str, TensorSlice]
    how: Placing

    @property
    def files(self) -> list[Path]:
        """The files that the graphs point into."""
        return sorted({s.file for s in self.slices.values()})


def place_weights(slices: Mapping[str, TensorSlice], dtype: str, folder: Path, *, in_place: bool) -> PlacedWeights:
    """Bring the weights a set of graphs uses into ``folder`` in ``dtype``.

    ``in_place`` leaves them where they are, which needs the checkpoint's dtype to be the wanted one.
    """
    stored = {s.dtype for s in slices.values()}
    if stored == {dtype}:
        if in_place:
            return PlacedWeights(folder, dict(slices), "in-place")
        moved = {s.file: folder / s.file.name for s in slices.values()}
        how = {clone_or_copy(old, new) for old, new in moved.items()}
        placed = {name: replace(s, file=moved[s.file]) for name, s in slices.items()}
        return PlacedWeights(folder, placed, "copy" if "copy" in how else "clone")
    return PlacedWeights(folder, _converted(slices, dtype, folder / SINGLE_FILE), "converted")


def _converted(slices: Mapping[str, TensorSlice], dtype: str, target: Path) -> dict[str, TensorSlice]:
    """Write one safetensors file in ``dtype``; OperationFailed names a weight that is not finite in it."""
    sources: dict[TensorSlice, str] = {}
    for name, s in slices.items():  # what two names share is written once, under the first
        sources.setdefault(s, name)
    new = [NewTensor(name, dtype, s.shape, partial(_narrowed, name, s, dtype)) for s, name in sources.items()]
    written = write_safetensors(target, new)
    return {name: written[sources[s]] for name, s in slices.items()}


def _narrowed(name: str, s: TensorSlice, dtype: str) -> Iterator[np.ndarray]:
    """A weight's values in ``dtype``, a chunk at a time; OperationFailed where one is not finite."""
    for chunk in _chunks(s):
        narrowed = chunk.to(DTYPES[dtype])
        if not bool(torch.isfinite(narrowed).all()):
            what = "leaves the range of" if bool(torch.isfinite(chunk).all()) else "is not finite in"
            raise OperationFailed(
                f"weight {name} {what} {dtype if 'range' in what else 'the checkpoint'}; "
                "export with --dtype float32, or repair the checkpoint"
            )
        yield narrowed.numpy()


def _chunks(s: TensorSlice) -> Iterator[torch.Tensor]:
    with s.file.open("rb") as f:
        f.seek(s.offset)
        left = s.length
        while left:
            size = min(left, CHUNK * DTYPES[s.dtype].itemsize)
            yield _read(f, size, s)
            left -= size


def _read(f: BufferedReader, size: int, s: TensorSlice) -> torch.Tensor:
    data = bytearray(size)
    if f.readinto(data) != size:
        raise BadArtefact(f"{s.file} ended early while its weights were read; download the checkpoint again")
    return torch.frombuffer(data, dtype=DTYPES[s.dtype])


def weight_from_slice(s: TensorSlice) -> torch.Tensor:
    """One weight in memory, in its stored dtype and shape."""
    if not s.length:
        return torch.empty(s.shape, dtype=DTYPES[s.dtype])
    with s.file.open("rb") as f:
        f.seek(s.offset)
        return _read(f, s.length, s).reshape(s.shape)


@contextmanager
def streamed(model: nn.Module, slices: Mapping[str, TensorSlice]) -> Iterator[None]:
    """Inside the block each module that runs has its own parameters filled from file, and emptied again after.

    So eager PyTorch runs a model of any size in the memory of its largest module.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    handles = []
    for module in model.modules():
        # Parameters beside submodules (class tokens, newline rows) are small, and read without running their module.
        if any(True for _ in module.children()):
            for p in module.parameters(recurse=False):
                if names[id(p)] in slices:
                    p.data = weight_from_slice(slices[names[id(p)]]).to(p.dtype)
            continue
        own = [p for p in module.parameters(recurse=False) if names[id(p)] in slices]
        if not own:
            continue
        empty = [p.data for p in own]

        def fill(_: nn.Module, __: Any, own: list[nn.Parameter] = own) -> None:
            for p in own:
                p.data = weight_from_slice(slices[names[id(p)]]).to(p.dtype)

        def drop(_: nn.Module, __: Any, ___: Any, own: list[nn.Parameter] = own, empty: Any = empty) -> None:
            for p, data in zip(own, empty, strict=True):
                p.data = data

        handles += [module.register_forward_pre_hook(fill), module.register_forward_hook(drop)]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()

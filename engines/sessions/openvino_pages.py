"""A decoder's caches in OpenVINO: blocks of 32 rows, which one infer request's attentions read and append to in place.

OpenVINO's PagedAttention takes a cache as an input that it writes to, and is told where the rows lie. Here they lie one
after another, for there is one sequence: block i holds the rows from 32·i on.

Legend: Hkv key-value heads, d head width, P_j cached rows of segment j, T_j those and the run's, N blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov

BLOCK = 32  # rows; the CPU plugin's only size
SPARE_BLOCKS, SPARE_SHARE = 4, 16  # that are made beyond what is asked for: at least, and one for so many
LENGTHS: dict[str, tuple[int, ...]] = {"held": (1,), "begins": (2,), "blocks": (-1,), "block_begins": (2,), "total": ()}


def length_inputs(segment: str) -> dict[str, tuple[int, ...]]:
    """The inputs, all int32, that say how long a segment is: name → shape, in the order of ``LENGTHS``.

    P_j, where the run's rows begin and end, which blocks there are, where their numbers begin and end, T_j.
    """
    return {f"{name}_{segment}": shape for name, shape in LENGTHS.items()}


class Pages:
    """An infer request with its cache inputs, [N, Hkv, 32, d] each, and their lengths.

    segments: name → its cache inputs. states: what else the request keeps from run to run, by name. Every row behind
    the filled ones holds a number: a product with zero reads it.
    """

    def __init__(self, request: Any, segments: Mapping[str, tuple[str, ...]]) -> None:
        self.request, self._segments = request, segments
        self.states = {state.name: state for state in request.query_state()}
        self._tensors: dict[str, ov.Tensor] = {}
        self._blocks: dict[str, int] = {}
        self._told: dict[str, dict[str, np.ndarray]] = {}
        for segment in segments:
            told = {name: np.zeros([abs(n) for n in shape], np.int32) for name, shape in LENGTHS.items()}
            self._told[segment] = told
            for name in told:
                self._tell(segment, name)

    @property
    def nbytes(self) -> int:
        """Bytes of its cache inputs."""
        return sum(tensor.byte_size for tensor in self._tensors.values())

    def shrink(self) -> None:
        """Give back its caches, which are made again as far as they are needed."""
        for segment in self._segments:
            self._blocks.pop(segment, None)
            self._make_room(segment, 1)

    def hold(self, segment: str, held: int, total: int) -> None:
        """Make room for the first ``total`` rows, and say that a run appends to the first ``held``."""
        told, blocks = self._told[segment], -(-total // BLOCK)
        self._make_room(segment, blocks)
        told["held"][0], told["begins"][1] = held, total - held
        told["block_begins"][1], told["total"][...] = blocks, total
        if len(told["blocks"]) != blocks:
            told["blocks"] = np.arange(blocks, dtype=np.int32)
            self._tell(segment, "blocks")

    def rows(self, name: str, count: int) -> np.ndarray:
        """The first rows of a cache input, float32 [1, Hkv, count, d]."""
        data_NVBd = self._tensors[name].data[: -(-count // BLOCK)]
        if self._is_narrow(name):
            data_NVBd = (data_NVBd.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        blocks, heads, size, width = data_NVBd.shape
        return np.array(data_NVBd.transpose(1, 0, 2, 3).reshape(1, heads, blocks * size, width)[:, :, :count])

    def fill(self, segment: str, rows: Mapping[str, np.ndarray]) -> None:
        """Begin anew with the first rows of every cache input of a segment, as ``rows`` gives them."""
        count = next(iter(rows.values())).shape[2]
        self._make_room(segment, blocks := -(-count // BLOCK))
        for name in self._segments[segment]:
            data_NVBd = self._tensors[name].data
            data_NVBd[...] = 0
            _, heads, size, width = data_NVBd.shape
            padded = np.zeros((heads, blocks * size, width), np.float32)
            padded[:, :count] = rows[name][0]
            in_blocks = padded.reshape(heads, blocks, size, width).transpose(1, 0, 2, 3)
            if self._is_narrow(name):
                data_NVBd.view(np.uint16)[:blocks] = np.ascontiguousarray(in_blocks).view(np.uint32) >> 16
            else:
                data_NVBd[:blocks] = in_blocks

    def _make_room(self, segment: str, blocks: int) -> None:
        held = self._blocks.get(segment, 0)
        if held and held >= blocks:
            return
        wanted = blocks + max(SPARE_BLOCKS, blocks // SPARE_SHARE)
        compiled = self.request.get_compiled_model()
        for name in self._segments[segment]:
            port = compiled.input(name)
            sizes = (wanted, *(size.get_length() for size in list(port.partial_shape)[1:]))
            made = ov.Tensor(port.element_type, ov.Shape(sizes))
            if held:
                made.data[:held] = self._tensors[name].data
            made.data[held:] = 0
            self._tensors[name] = made
            self.request.set_tensor(name, made)
        self._blocks[segment] = wanted

    def _is_narrow(self, name: str) -> bool:
        return bool(self._tensors[name].element_type == ov.Type.bf16)

    def _tell(self, segment: str, name: str) -> None:
        tensor = ov.Tensor(self._told[segment][name], shared_memory=True)
        self.request.set_tensor(f"{name}_{segment}", tensor)

"""A graph in OpenVINO's runtime: the files that ONNX Runtime runs, on the CPU or an Intel GPU.

A decoder's caches are blocks of an infer request on the CPU, which append in place (``openvino_pages``). What a run
hands out for them are ``Rows``: those of a request, up to a length. The newest ones are continued where they are. For
older ones, whose rows are still the first of the blocks, a request of its own takes a copy; so no run ever changes what
a ``Rows`` stands for. On a GPU caches go in and out as tensors.

Legend: Hkv key-value heads, P_j cached rows of segment j, d head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino as ov

from engines.sessions.openvino_device import CPU, chosen_device, kept_core
from engines.sessions.openvino_graph import Dims, read_graph
from engines.sessions.openvino_guidance import ASKED, GUIDANCE, TOLD, Asked, Guide
from engines.sessions.openvino_pages import Pages
from engines.sessions.session import GRAPH_DISAGREES, NOTHING, Value, refuse_misfed
from graphs.console import warn
from graphs.errors import BadArtefact, OperationFailed, SaccadeError
from graphs.spec import CacheForm, FloatType
from graphs.versions import require_once

PRECISIONS: dict[FloatType, str] = {"float32": "f32", "float16": "f32", "bfloat16": "bf16"}  # fp16 as ONNX Runtime does
# Values of a row that share a scale where products with weights of 8 or 4 bits round their activations to 8 bits: four
# times OpenVINO's own choice, and the block of 4-bit weights (benchmarks/LOG.md). 0: they stay as they are.
GROUPS: dict[FloatType, int] = {"float32": 0, "float16": 0, "bfloat16": 128}
KEPT, KEPT_BYTES = 4, 64 << 20  # idle requests of a session, and the caches that one of them may keep
PRECISION = "INFERENCE_PRECISION_HINT"
AS_IT_IS = {PRECISION: "f32"}
CACHES = {"f32": ov.Type.f32, "bf16": ov.Type.bf16}


@dataclass(eq=False)
class Room:
    """Where a conversation's caches are. newest: the run whose rows they end with; None after a failed one.

    keys: of a decoder that guides, those of the rows so far as float32 [1, L·V, S, D], in parts.
    """

    pages: Pages
    newest: object | None = None
    keys: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, eq=False)
class Rows:
    """A cache input after a run: the first ``shape[2]`` of its rows, [1, Hkv, P_j, d]. run: which one gave it."""

    room: Room
    run: object
    name: str
    shape: tuple[int, ...]


class _Grown(NamedTuple):
    """What continues a cache input: which one, its segment, Hkv and d."""

    past: str
    segment: str
    heads: int
    width: int


class OpenVinoSession:
    """An ``engines.sessions.session.Session`` over openvino.CompiledModel.

    dtype: what it computes in: float32, float16 (in fp32, as ONNX Runtime does on a CPU) or bfloat16; of those that it
    multiplies with weights which are narrow in the file, activations in bfloat16 are rounded to 8 bits. Raises
    BackendMissing where the device is not there, BadArtefact where the file cannot be read or compiled.
    """

    form: CacheForm = "concat"

    def __init__(self, file: Path, threads: int | None = None, dtype: FloatType = "float32") -> None:
        self._file = Path(file)
        if not self._file.is_file():
            raise BadArtefact(f"{self._file} is missing; build the bundle again")
        require_once("openvino")
        core = kept_core()
        device = chosen_device(core)
        try:
            settings = _settings(core, device, threads, dtype)
            # A core of its own, for it keeps what converts this graph's nodes.
            read = read_graph(ov.Core(), self._file, CACHES[settings[PRECISION]] if device == CPU else None)
            with read.packing():
                self._compiled = core.compile_model(read.model, device, settings)
        except SaccadeError:
            raise
        except Exception as e:  # the binding's exceptions share no base class
            raise BadArtefact(
                f"OpenVINO cannot open {self._file} ({_first_line(e)}); "
                "replay its golden tensors with: saccade verify, or build the bundle again"
            ) from None
        self._packing: Callable[[], AbstractContextManager[None]] = read.packing
        self._files = read.files  # whose memory the constants are, and which they do not keep
        self._inputs, self._segments, self._states = read.inputs, read.segments, read.states
        self._ends = {str(read.inputs[past][2]): read.outputs[present][2] for present, past in read.grown.items()}
        self._grown = {present: _grown(past, read.inputs[past]) for present, past in read.grown.items()}
        self._pasts = frozenset(read.grown.values())
        places = [(dim, (name, i)) for name, dims in read.inputs.items() for i, dim in enumerate(dims)]
        self._symbols = {dim: place for dim, place in places if isinstance(dim, str)}
        self._guide = Guide(core, device, settings | AS_IT_IS, read.guiding) if read.guiding else None
        self._idle: list[Pages] = []

    def run(
        self,
        feeds: Mapping[str, Value],
        host: Collection[str] = (),
        device: Collection[str] = (),
        in_place: Mapping[str, str] = NOTHING,
    ) -> dict[str, Value]:
        """Run once; see ``engines.sessions.session.Session.run``. Blocks are in place of ``in_place``."""
        assert not in_place
        refuse_misfed(self._file, self._inputs, feeds, GRAPH_DISAGREES)
        sizes = {symbol: feeds[name].shape[axis] for symbol, (name, axis) in self._symbols.items()}
        ends = {segment: _size(dim, sizes) for segment, dim in self._ends.items()}
        room = self._room_for({name: feeds[name] for name in self._pasts})
        values = {name: np.ascontiguousarray(value) for name, value in feeds.items() if name not in self._pasts}
        # Until the run is over nobody may take the rows for those of an earlier one.
        room.newest = None
        try:
            for segment, end in ends.items():
                room.pages.hold(segment, sizes[segment], end)
            with self._packing():
                room.pages.request.infer(values, share_inputs=True, share_outputs=True)
        except Exception as e:
            raise OperationFailed(
                f"OpenVINO failed in {self._file.name} ({_first_line(e)}); check the bundle with: saccade verify"
            ) from None
        self._packing = nullcontext  # the first run packed what opening did not
        room.newest = run = object()
        if self._guide:
            room.keys = (*room.keys, np.array(room.pages.request.get_tensor(TOLD).data))
        results: dict[str, Value] = {}
        for name in (*host, *device):
            grown, asked = self._grown.get(name), self._guide and name == GUIDANCE
            if not grown and not asked:
                results[name] = np.array(room.pages.request.get_tensor(name).data)
                continue
            if grown:
                shape = (1, grown.heads, ends[grown.segment], grown.width)
                handle: Value = Rows(room, run, grown.past, shape)
            else:
                handle = _asked(room, next(iter(ends.values())))
            results[name] = self.to_host(handle) if name in host else handle
        return results

    def to_host(self, value: Value) -> np.ndarray:
        """Copy the rows of a cache to numpy, or make what is made later; arrays pass through."""
        if isinstance(value, Asked):
            assert self._guide
            return self._guide.received(value)
        if isinstance(value, Rows):
            return value.room.pages.rows(value.name, value.shape[2])
        return np.asarray(value)

    def largest(self, name: str) -> None:
        """Lengths are bounded by memory alone."""

    def _room_for(self, pasts: Mapping[str, Value]) -> Room:
        """Where a run that begins with these caches takes place: theirs, or a new one that holds a copy of them."""
        first = next(iter(pasts.values()), None)
        if isinstance(first, Rows) and all(_is_newest(first.room, name, value) for name, value in pasts.items()):
            return first.room
        held = {name: self.to_host(value) for name, value in pasts.items()}
        pages = self._idle.pop() if self._idle else Pages(self._compiled.create_infer_request(), self._segments)
        for segment, names in self._segments.items():
            pages.fill(segment, {name: held[name] for name in names})
        pages.request.reset_state()
        for state, name in self._states.items():
            if held[name].shape[2]:
                pages.states[state].state = ov.Tensor(np.ascontiguousarray(held[name]))
        room = Room(pages)
        weakref.finalize(room, self._put, pages).atexit = False
        if self._guide and first is not None and first.shape[2]:
            past = [held[name].astype(np.float32) for name in self._guide.pasts]
            room.keys = (np.concatenate(past, axis=1),)
        return room

    def _put(self, pages: Pages) -> None:
        """Keep what a conversation that is over computed in for another one; few of them, and no large caches."""
        if pages.nbytes > KEPT_BYTES:
            pages.shrink()
        self._idle.append(pages)
        del self._idle[:-KEPT]


def _asked(room: Room, keys: int) -> Asked:
    """What a run's guide rows asked of this many keys, of which the last row sees the last."""
    queries = np.array(room.pages.request.get_tensor(ASKED).data)
    return Asked((queries,), (np.arange(keys - queries.shape[2], keys),), room.keys)


def _settings(core: ov.Core, device: str, threads: int | None, dtype: FloatType) -> dict[str, Any]:
    """fp32 stays fp32, caches too; OpenVINO's own choice would be bf16 and caches of 8 bits."""
    precision = PRECISIONS[dtype]
    if precision == "bf16" and "BF16" not in core.get_property(device, "OPTIMIZATION_CAPABILITIES"):
        warn(f"{core.get_property(device, 'FULL_DEVICE_NAME')} has no bf16, so it computes in fp32, which takes longer")
        precision = "f32"
    settings: dict[str, Any] = {PRECISION: precision, "PERFORMANCE_HINT": "LATENCY"}
    if device == CPU:
        settings["KV_CACHE_PRECISION"] = precision
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = GROUPS[dtype]
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
    return settings


def _is_newest(room: Room, name: str, value: Value) -> bool:
    """Whether a cache of a room ends with the rows of a value, and is the one for this input."""
    return isinstance(value, Rows) and value.room is room and value.run is room.newest and value.name == name


def _grown(past: str, dims: Dims) -> _Grown:
    """Of a cache input and its dimensions, [1, Hkv, P_j, d]."""
    _, heads, segment, width = dims
    return _Grown(past, str(segment), int(heads), int(width))


def _size(dim: int | str, sizes: Mapping[str, int]) -> int:
    """A dimension as spec.json writes it: a number, a symbol, or a sum of them."""
    if isinstance(dim, int):
        return dim
    return sum(int(term) if term.isdigit() else sizes[term] for term in dim.replace(" ", "").split("+"))


def _first_line(error: Exception) -> str:
    # OpenVINO's messages begin with the places in its sources that a failure went through.
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and " failed at src/" not in line]
    told = [line for line in lines if not line.startswith(("Exception from", "While validating"))]
    return " ".join(told)[:300] if told else type(error).__name__

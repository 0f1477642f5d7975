"""A graph in OpenVINO's runtime: the files that ONNX Runtime runs, on the CPU or an Intel GPU.

A decoder's caches are states of an infer request on the CPU, which append in place (``openvino_graph``). What a run
hands out for them are ``Rows``: a request's state, up to a length. The newest ones are continued where they are. For
older ones, whose rows are still the first of the state, a request of its own takes a copy; so no run ever changes what
a ``Rows`` stands for. On a GPU caches go in and out as tensors.

Legend: Hkv key-value heads, P_j cached rows of segment j, d head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from engines.sessions.openvino_device import CPU, chosen_device
from engines.sessions.openvino_graph import BEAM, Dims, read_graph
from engines.sessions.openvino_guidance import ASKED, GUIDANCE, TOLD, Asked, Guide
from engines.sessions.session import NOTHING, Value
from graphs.errors import BackendMissing, BadArtefact, OperationFailed, SaccadeError
from graphs.spec import CacheForm, FloatType
from graphs.talk import warn

# Kinds of nodes in a compiled model: fused with its cache, an attention reads two states.
ATTENTION, STATE = "ScaledDotProductAttention", "MemoryInput"
PRECISIONS: dict[FloatType, str] = {"float32": "f32", "float16": "f32", "bfloat16": "bf16"}  # fp16 as ONNX Runtime does
# Values of a row that share a scale where products with weights of 8 or 4 bits round their activations to 8 bits: four
# times OpenVINO's own choice, and the block of 4-bit weights (benchmarks/LOG.md). 0: they stay as they are.
GROUPS: dict[FloatType, int] = {"float32": 0, "float16": 0, "bfloat16": 128}
AS_IT_IS = {"INFERENCE_PRECISION_HINT": "f32"}
ONE_SEQUENCE = np.zeros(1, np.int32)


@dataclass(eq=False)
class Room:
    """An infer request and its states. newest: the run whose rows the states end with; None after a failed one.

    keys: of a decoder that guides, those of the rows so far as float32 [1, L·V, S, D], in parts.
    """

    request: Any
    states: dict[str, Any]
    newest: object | None = None
    keys: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, eq=False)
class Rows:
    """A cache input after a run: the first ``shape[2]`` rows of a state, [1, Hkv, P_j, d]. run: which one gave it."""

    room: Room
    run: object
    state: str
    shape: tuple[int, ...]


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
        core = ov.Core()
        device = chosen_device(core)
        try:
            read = read_graph(core, self._file, with_states=device == CPU)
            settings = _settings(core, device, threads, dtype)
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
        self._states, self._grown = read.states, read.grown
        self._inputs, self._outputs = read.inputs, read.outputs
        places = [(dim, (name, i)) for name, dims in read.inputs.items() for i, dim in enumerate(dims)]
        self._symbols = {dim: place for dim, place in places if isinstance(dim, str)}
        self._guide = Guide(core, device, settings | AS_IT_IS, read.guiding) if read.guiding else None
        if read.states:
            _refuse_unfused(self._compiled, len(read.grown) // 2, self._file)
        self._idle: list[Any] = []

    def run(
        self,
        feeds: Mapping[str, Value],
        host: Collection[str] = (),
        device: Collection[str] = (),
        in_place: Mapping[str, str] = NOTHING,
    ) -> dict[str, Value]:
        """Run once; see ``engines.sessions.session.Session.run``. States are in place of ``in_place``."""
        assert not in_place
        if set(feeds) != set(self._inputs):
            missing, unknown = sorted(set(self._inputs) - set(feeds)), sorted(set(feeds) - set(self._inputs))
            raise OperationFailed(
                f"{self._file.name} was fed wrongly: missing {missing}, unknown {unknown}; "
                "spec.json and the graph disagree, export the checkpoint again"
            )
        room = self._room_for({name: feeds[name] for name in self._grown.values()})
        values = {name: np.ascontiguousarray(feeds[name]) for name in feeds.keys() - room.states.keys()}
        if room.states:
            values[BEAM] = ONE_SEQUENCE
        # Until the run is over nobody may take the states for those of an earlier one.
        room.newest = None
        try:
            with self._packing():
                room.request.infer(values, share_inputs=True, share_outputs=True)
        except Exception as e:
            raise OperationFailed(
                f"OpenVINO failed in {self._file.name} ({_first_line(e)}); check the bundle with: saccade verify"
            ) from None
        self._packing = nullcontext  # the first run packed what opening did not
        room.newest = run = object()
        if self._guide:
            room.keys = (*room.keys, np.array(room.request.get_tensor(TOLD).data))
        sizes = {symbol: feeds[name].shape[axis] for symbol, (name, axis) in self._symbols.items()}
        shapes: dict[Dims, tuple[int, ...]] = {}  # a cache output is as long as the others of its segment
        results: dict[str, Value] = {}
        for name in (*host, *device):
            past, asked = self._grown.get(name), self._guide and name == GUIDANCE
            if not past and not asked:
                results[name] = np.array(room.request.get_tensor(name).data)
                continue
            dims = self._outputs[name]
            if not (shape := shapes.get(dims, ())):
                shape = shapes[dims] = tuple(_size(dim, sizes) for dim in dims)
            handle = Rows(room, run, past, shape) if past else _asked(room, shape[1])
            results[name] = self.to_host(handle) if name in host else handle
        return results

    def to_host(self, value: Value) -> np.ndarray:
        """Copy the rows of a state to numpy, or make what is made later; arrays pass through."""
        if isinstance(value, Asked):
            assert self._guide
            return self._guide.received(value)
        if isinstance(value, Rows):
            return np.array(value.room.states[value.state].state.data[:, :, : value.shape[2]])
        return np.asarray(value)

    def _room_for(self, pasts: Mapping[str, Value]) -> Room:
        """Where a run that begins with these caches takes place: theirs, or a new one that holds a copy of them."""
        first = next(iter(pasts.values()), None)
        if isinstance(first, Rows) and all(_is_newest(first.room, name, value) for name, value in pasts.items()):
            return first.room
        request = self._idle.pop() if self._idle else self._compiled.create_infer_request()
        states = {state.name: state for state in request.query_state()}
        room = Room(request, states)
        weakref.finalize(room, self._idle.append, request)
        if states:
            request.reset_state()
            held = {name: self.to_host(value) for name, value in pasts.items()}
            for state, name in self._states.items():
                if held[name].shape[2]:
                    states[state].state = ov.Tensor(np.ascontiguousarray(held[name]))
            if self._guide and first is not None and first.shape[2]:
                past = [held[name].astype(np.float32) for name in self._guide.pasts]
                room.keys = (np.concatenate(past, axis=1),)
        return room


def _asked(room: Room, keys: int) -> Asked:
    """What a run's guide rows asked of this many keys, of which the last row sees the last."""
    queries = np.array(room.request.get_tensor(ASKED).data)
    return Asked((queries,), (np.arange(keys - queries.shape[2], keys),), room.keys)


def _settings(core: ov.Core, device: str, threads: int | None, dtype: FloatType) -> dict[str, Any]:
    """fp32 stays fp32, caches too; OpenVINO's own choice would be bf16 and caches of 8 bits."""
    precision = PRECISIONS[dtype]
    if precision == "bf16" and "BF16" not in core.get_property(device, "OPTIMIZATION_CAPABILITIES"):
        warn(f"{core.get_property(device, 'FULL_DEVICE_NAME')} has no bf16, so it computes in fp32, which takes longer")
        precision = "f32"
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if device == CPU:
        settings["KV_CACHE_PRECISION"] = precision
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = GROUPS[dtype]
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
    return settings


def _refuse_unfused(compiled: Any, attentions: int, file: Path) -> None:
    """BackendMissing unless every attention became the node that appends in place: another aligns causality wrongly."""
    nodes = [node for node in compiled.get_runtime_model().get_ops() if _kind(node) == ATTENTION]
    found = sum(STATE in [_kind(i.get_source_output().get_node()) for i in node.inputs()] for node in nodes)
    if found != attentions:
        raise BackendMissing(
            f"OpenVINO {ov.get_version()} appends to the cache in place in {found} of the {attentions} attentions of "
            f"{file.name}, and the others would be wrong; use --target cpu, or pip install 'saccade[openvino]'"
        )


def _is_newest(room: Room, name: str, value: Value) -> bool:
    """Whether a state of a room ends with the rows of a value, and is the one for this input."""
    return isinstance(value, Rows) and value.room is room and value.run is room.newest and value.state == name


def _kind(node: Any) -> str:
    """What a node of a compiled model is there."""
    return str(node.get_rt_info()["layerType"].astype(str))


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

"""CUDA and TensorRT by stand-ins: device memory is the host's, an engine is a lowered file run by ONNX Runtime.

What the session does with them is real: addresses, shapes, profiles, copies and frees, and so the numbers. Every call
of CUDA is put to cuda-python first, which takes its arguments or refuses them, and does nothing without a driver. A
captured run reads and writes the addresses that it was captured with, which must still be live and bound in its
context; what may not be done while capturing (allocating, freeing, copying from pageable memory, waiting) breaks it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from cuda.bindings import runtime

KINDS = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(int32)": ("INT32", np.int32),
    "tensor(bool)": ("BOOL", np.bool_),
}
PROFILES: dict[str, Any] = {}  # lowered file → its profiles, in the engine's order
DESERIALISED: list[tuple[bytes, bool]] = []  # what was asked of any runtime, and whether it allowed host code
stand_in_cuda: list[Any] = []  # every device that was made, the newest last


# With a driver the same arguments would be acted on, and these addresses are the host's.
HAS_DRIVER = int(runtime.cudaGetDeviceCount()[0]) == 0


def put_to_the_binding(cls: type) -> type:
    """The class with every call of CUDA put to the real one of its name first."""
    for name, method in [(n, m) for n, m in vars(cls).items() if n.startswith("cuda") and callable(m)]:
        setattr(cls, name, _behind(getattr(runtime, name), method))
    return cls


def _behind(real: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: Any, *arguments: Any) -> Any:
        if not HAS_DRIVER:
            real(*arguments)
        return method(self, *arguments)

    return call


@put_to_the_binding
class Cuda:
    """``cuda.bindings.runtime`` over the host's memory; ``live`` are the addresses that were not given back."""

    def __getattr__(self, name: str) -> Any:
        """Constants and enumerations are the binding's own; a call that is not written here is none."""
        found = getattr(runtime, name)
        if not isinstance(found, type | int):
            raise AttributeError(name)
        return found

    def __init__(self, room: int = 1 << 30, sm: int = 89) -> None:
        self.live: dict[int, Any] = {}
        self.room, self.sm, self.copied, self.waits, self.streams = room, sm, [0, 0, 0], 0, 0
        self.recorded: list[Any] | None = None  # the runs captured so far, None where nothing is being captured
        self.kept: dict[int, list[Any]] = {}  # handle of a graph → its runs
        self.broken, self.captures, self.launches, self.graphs = False, 0, 0, 0
        stand_in_cuda.append(self)

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, 1

    def cudaGetDevice(self) -> tuple[int, int]:
        return 0, 0

    def cudaDeviceGetAttribute(self, which: int, device: int) -> tuple[int, int]:
        return 0, self.sm // 10 if which == 75 else self.sm % 10

    def cudaDeviceGetDefaultMemPool(self, device: int) -> tuple[int, Any]:
        return 0, runtime.cudaMemPool_t(1)

    def cudaMemPoolSetAttribute(self, pool: Any, attribute: Any, value: Any) -> tuple[int]:
        self.keeps = int(value)
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, Any]:
        self.streams += 1
        return 0, runtime.cudaStream_t(self.streams)

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        self.waits += 1
        return (self.forbidden(),)

    def forbidden(self) -> int:
        """cudaErrorStreamCaptureUnsupported, and a broken capture, where something is being captured."""
        self.broken |= self.recorded is not None
        return 0 if self.recorded is None else 900

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self.recorded, self.broken = [], False
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, Any]:
        recorded, self.recorded = self.recorded, None
        if self.broken or recorded is None:
            return 901, None
        return 0, runtime.cudaGraph_t(self._handle_of(recorded))

    def _handle_of(self, runs: list[Any]) -> int:
        self.kept[handle := len(self.kept) + 1] = list(runs)
        return handle

    def cudaGetLastError(self) -> tuple[int]:
        return (0,)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[int, Any]:
        self.captures += 1
        self.graphs += 1
        return 0, runtime.cudaGraphExec_t(self._handle_of(self.kept[int(graph)]))

    def cudaGraphDestroy(self, graph: Any) -> tuple[int]:
        return (0,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[int]:
        self.graphs -= 1
        return (0,)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[int]:
        self.launches += 1
        for run in self.kept[int(graph)]:
            run()
        return (0,)

    def at(self, address: int, size: int) -> int:
        """The address, if so many bytes from it on are live."""
        for start, buffer in self.live.items():
            if start <= address and address + size <= start + len(buffer):
                return address
        raise AssertionError(f"{size} bytes at {address} are not on the device")

    def cudaMemsetAsync(self, pointer: int, value: int, size: int, stream: int) -> tuple[int]:
        ctypes.memset(self.at(pointer, size), value, size)
        return (self.forbidden(),)

    def cudaMemcpy2DAsync(
        self, to: int, pitch: int, source: int, from_pitch: int, width: int, height: int, kind: int, stream: int
    ) -> tuple[int]:
        for i in range(height):
            ctypes.memmove(self.at(to + i * pitch, width), self.at(source + i * from_pitch, width), width)
        self.copied[kind - 1] += width * height
        return (self.forbidden(),)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, self.room, 1 << 30

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"said by CUDA"

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        if self.forbidden():
            return 900, 0
        if size > self.room:
            return 2, 0
        buffer = ctypes.create_string_buffer(size)
        self.live[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cudaMallocAsync(self, size: int, stream: int) -> tuple[int, int]:
        return self.cudaMalloc(size)

    def cudaFree(self, pointer: int) -> tuple[int]:
        del self.live[pointer]
        return (self.forbidden(),)

    def cudaFreeAsync(self, pointer: int, stream: int) -> tuple[int]:
        return (self.forbidden() or self.cudaFree(pointer)[0],)  # CUDA would take it into the graph

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        self.copied[kind - 1] += size
        ctypes.memmove(to, source, size)
        return (self.forbidden(),)


class Context:
    """An execution context."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = shape
        return all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address > 0

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """From shapes alone, as TensorRT has it: no address needs to be known, and no value is read."""
        key = tuple(self.shapes[name] for name in self.engine.inputs)
        if key not in self.engine.shapes:
            zeros = {n: np.zeros(self.shapes[n], KINDS[kind][1]) for n, kind in self.engine.inputs.items()}
            self.engine.shapes[key] = {n: value.shape for n, value in self.engine.run(zeros).items()}
        return self.engine.shapes[key][name]

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.capturable

    def execute_async_v3(self, stream: int) -> bool:
        cuda = stand_in_cuda[-1]
        for name, cache in self.engine.aliased.items():
            assert self.addresses[name] == self.addresses[cache], f"{name} is not the buffer of {cache}"
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if cuda.recorded is None:
            self._run(shapes, addresses)
        else:
            cuda.recorded.append(lambda: self._replayed(shapes, addresses))
        return True

    def _replayed(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        assert (self.shapes, self.addresses) == (shapes, addresses), "the context was bound anew since the capture"
        self._run(shapes, addresses)

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feeds = {name: self._read(name, shapes[name], addresses[name]) for name in self.engine.inputs}
        self._write(addresses, self.engine.run(feeds))

    @staticmethod
    def _write(addresses: dict[str, int], results: dict[str, np.ndarray]) -> None:
        for name, value in results.items():
            array = np.ascontiguousarray(value)
            address = stand_in_cuda[-1].at(addresses[name], array.nbytes) if array.nbytes else 0
            ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def _read(self, name: str, shape: tuple[int, ...], address: int) -> np.ndarray:
        kind = KINDS[self.engine.inputs[name]][1]
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        return np.frombuffer(ctypes.string_at(stand_in_cuda[-1].at(address, size), size), kind).reshape(shape)


class Engine:
    """What a lowered file would be built into; its bytes are the file's path."""

    def __init__(self, file: str) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # TensorScatter warns where it is not run in place
        self.session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i.type for i in self.session.get_inputs()}
        self.outputs = {o.name: o.type for o in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.profiles = list(PROFILES[file].values())
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(self.profiles)
        self.contexts: list[Context] = []
        self.capturable = True
        self.shapes: dict[Any, dict[str, tuple[int, ...]]] = {}
        graph = onnx.load(file, load_external_data=False).graph
        self.aliased = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "TensorScatter"}

    def get_tensor_name(self, i: int) -> str:
        return self.names[i]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.inputs else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=KINDS[{**self.inputs, **self.outputs}[name]][0])

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return self.profiles[profile][name]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self.session.run(list(self.outputs), feeds), strict=True))

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliased.get(name)

    def create_execution_context(self, strategy: str) -> Context:
        self.contexts.append(Context(self))
        return self.contexts[-1]


class Logger:
    ERROR = 1

    def __init__(self, level: int) -> None:
        self.level = level


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, data: Any) -> Engine | None:
        DESERIALISED.append((bytes(data), self.engine_host_code_allowed))
        file = bytes(data).decode("utf-8", "replace")
        return Engine(file) if Path(file).is_file() else None


ExecutionContextAllocationStrategy = SimpleNamespace(ON_PROFILE_CHANGE="on profile change")
TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
__version__ = "stand-in"

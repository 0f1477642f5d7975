"""CUDA and TensorRT by stand-ins: device memory is the host's, an engine is a lowered file run by ONNX Runtime.

What the session does with them is real: addresses, shapes, profiles, copies and frees, and so the numbers.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

KINDS = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(int32)": ("INT32", np.int32),
    "tensor(bool)": ("BOOL", np.bool_),
}
PROFILES: dict[str, Any] = {}  # lowered file → its profiles, in the engine's order
DESERIALISED: list[tuple[bytes, bool]] = []  # what was asked of any runtime, and whether it allowed host code


class Cuda:
    """``cuda.bindings.runtime`` over the host's memory; ``live`` are the addresses that were not given back."""

    cudaStreamNonBlocking = 1
    cuuint64_t = int
    cudaMemPoolAttr = SimpleNamespace(cudaMemPoolAttrReleaseThreshold=0)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaError_t = SimpleNamespace(cudaErrorMemoryAllocation=2)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)

    def __init__(self, room: int = 1 << 30, sm: int = 89) -> None:
        self.live: dict[int, Any] = {}
        self.room, self.sm, self.copied, self.waits, self.streams = room, sm, [0, 0], 0, 0

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, 1

    def cudaGetDevice(self) -> tuple[int, int]:
        return 0, 0

    def cudaDeviceGetAttribute(self, which: int, device: int) -> tuple[int, int]:
        return 0, self.sm // 10 if which == 75 else self.sm % 10

    def cudaDeviceGetDefaultMemPool(self, device: int) -> tuple[int, str]:
        return 0, "pool"

    def cudaMemPoolSetAttribute(self, *_: Any) -> tuple[int]:
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        self.streams += 1
        return 0, self.streams

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        self.waits += 1
        return (0,)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, self.room, 1 << 30

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"said by CUDA"

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        if size > self.room:
            return 2, 0
        buffer = ctypes.create_string_buffer(size)
        self.live[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cudaMallocAsync(self, size: int, stream: int) -> tuple[int, int]:
        return self.cudaMalloc(size)

    def cudaFree(self, pointer: int) -> tuple[int]:
        del self.live[pointer]
        return (0,)

    def cudaFreeAsync(self, pointer: int, stream: int) -> tuple[int]:
        return self.cudaFree(pointer)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        self.copied[kind - 1] += size
        ctypes.memmove(to, source, size)
        return (0,)


class Context:
    """An execution context; outputs are computed when their shapes are first asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.results: dict[str, np.ndarray] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.results = {}
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = shape
        return all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address > 0

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if not self.results:
            feeds = {name: self._read(name) for name in self.engine.inputs}
            outputs = list(self.engine.outputs)
            self.results = dict(zip(outputs, self.engine.session.run(outputs, feeds), strict=True))
        return self.results[name].shape

    def execute_async_v3(self, stream: int) -> bool:
        for name, value in self.results.items():
            array = np.ascontiguousarray(value)
            ctypes.memmove(self.addresses[name], array.ctypes.data, array.nbytes)
        return True

    def _read(self, name: str) -> np.ndarray:
        kind, shape = KINDS[self.engine.inputs[name]][1], self.shapes[name]
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        return np.frombuffer(ctypes.string_at(self.addresses[name], size), kind).reshape(shape)


class Engine:
    """What a lowered file would be built into; its bytes are the file's path."""

    def __init__(self, file: str) -> None:
        self.session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i.type for i in self.session.get_inputs()}
        self.outputs = {o.name: o.type for o in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.profiles = list(PROFILES[file].values())
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(self.profiles)
        self.contexts: list[Context] = []

    def get_tensor_name(self, i: int) -> str:
        return self.names[i]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.inputs else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=KINDS[{**self.inputs, **self.outputs}[name]][0])

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return self.profiles[profile][name]

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

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        DESERIALISED.append((data, self.engine_host_code_allowed))
        file = data.decode("utf-8", "replace")
        return Engine(file) if Path(file).is_file() else None


ExecutionContextAllocationStrategy = SimpleNamespace(ON_PROFILE_CHANGE="on profile change")
TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
__version__ = "stand-in"

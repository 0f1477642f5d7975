"""Device memory in the order of one CUDA stream, through cuda-python and numpy.

Every model has its own ``Device``: work of the small and of the large model may overlap, and within a model a tensor
that is dropped is freed behind the work that still reads it, without waiting. Memory comes from the device's pool,
which is told to keep what is given back, so that a decode step asks the driver for nothing.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from graphs.errors import BackendMissing, OperationFailed
from graphs.versions import missing

ROOM_BYTES = 256  # where empty tensors point: TensorRT wants an aligned address even for nothing
KEEP_ALL = 2**64 - 1  # bytes the pool may hold on to

_devices: weakref.WeakValueDictionary[Path, Device] = weakref.WeakValueDictionary()


class DeviceTensor:
    """A dense tensor on the device: pointer (an address), shape, dtype. Freed, in stream order, when it is dropped."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.device, self.shape, self.dtype = device, shape, dtype
        self.nbytes = prod(shape) * dtype.itemsize
        self.pointer = device.room
        if self.nbytes:
            self.pointer = device.allocated(self.nbytes)
            # The finaliser holds the device, so a stream outlives its tensors; at exit the driver frees everything.
            weakref.finalize(self, device.free, self.pointer).atexit = False


class DeviceGraph:
    """Recorded work that can be put on the device's stream again and again."""

    def __init__(self, device: Device, graph: Any) -> None:
        self._device, self._graph = device, graph
        weakref.finalize(self, device.release, graph).atexit = False

    def launch(self) -> None:
        """Enqueue it; OperationFailed where CUDA refuses."""
        self._device.launch(self._graph)


class Device:
    """One stream of the GPU that CUDA names first (CUDA_VISIBLE_DEVICES chooses), made on first use.

    cuda: ``cuda.bindings.runtime``, or what stands in for it. Errors: BackendMissing where cuda-python is not installed
    or CUDA has no device.
    """

    def __init__(self, cuda: Any = None) -> None:
        self._cuda = cuda or cuda_runtime()
        _refuse_no_device(self._cuda)
        stream = self.ask("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        weakref.finalize(self, self._cuda.cudaStreamDestroy, stream).atexit = False
        self._stream, self.stream = stream, int(stream)
        self._read: list[np.ndarray] = []  # arrays of the host that the stream may not have read yet
        # Any thread may drop a tensor or a graph; what is freed on a stream that is captured would be freed by every
        # replay, and to wait for the stream ends the capture.
        self._freeing, self._captures = RLock(), False
        self._dropped: list[Callable[[], None]] = []
        pool = self.ask("cudaDeviceGetDefaultMemPool", self.ask("cudaGetDevice"))
        threshold = self._cuda.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
        self.ask("cudaMemPoolSetAttribute", pool, threshold, _uint64(KEEP_ALL))
        self.room = int(self.ask("cudaMalloc", ROOM_BYTES))
        weakref.finalize(self, self._cuda.cudaFree, self.room).atexit = False

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """A tensor whose values are not set; OperationFailed where the device has no room for it."""
        return DeviceTensor(self, shape, dtype)

    def from_host(self, array: np.ndarray) -> DeviceTensor:
        """A copy of an array on the device, in stream order; the array must not be written to before the next wait."""
        tensor = self.empty(array.shape, array.dtype)
        self.copy(array, tensor)
        return tensor

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """A tensor of zeros."""
        tensor = self.empty(shape, dtype)
        if tensor.nbytes:
            self.ask("cudaMemsetAsync", tensor.pointer, 0, tensor.nbytes, self._stream)
        return tensor

    def copy(self, source: np.ndarray | DeviceTensor, to: DeviceTensor) -> None:
        """Copy an array or a tensor into a tensor of the same shape and type, in stream order."""
        if isinstance(source, DeviceTensor):
            kind, address = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice, source.pointer
        else:
            source = np.ascontiguousarray(source)
            kind, address = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, source.ctypes.data
            # CUDA may stage pageable memory before the call returns, and promises it only for cudaMemcpy.
            self._read += [source] if to.nbytes else []
        if to.nbytes:
            self.ask("cudaMemcpyAsync", to.pointer, address, to.nbytes, kind, self._stream)

    def copy_rows(self, source: DeviceTensor, to: DeviceTensor, rows: int) -> None:
        """Copy the first ``rows`` rows of every head from one cache [1, Hkv, C, d] to another, of any two lengths."""
        _, heads, _, width = to.shape
        line = width * to.dtype.itemsize
        if rows:
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
            pitches = (to.pointer, to.shape[2] * line, source.pointer, source.shape[2] * line)
            self.ask("cudaMemcpy2DAsync", *pitches, rows * line, heads, kind, self._stream)

    def captured(self, work: Callable[[], bool]) -> DeviceGraph:
        """Record what ``work`` puts on the stream as a graph; OperationFailed, with nothing recorded, where it fails.

        Nothing is executed by it. Memory that the work reads and writes must stay where it is.
        """
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        done, collects = False, gc.isenabled()
        gc.disable()  # what is collected may call what no capture allows
        try:
            with self._freeing:
                self._captures = True
            self.ask("cudaStreamBeginCapture", self._stream, mode)
            try:
                done = work()
            finally:
                status, graph = self._cuda.cudaStreamEndCapture(self._stream)
                if not done or int(status):
                    self._cuda.cudaGetLastError()  # a capture that failed is no failure of what comes next
        finally:
            self._give_back_dropped()
            if collects:
                gc.enable()
        if not done:
            raise OperationFailed("TensorRT refused the run while it was captured")
        self._check(status, "cudaStreamEndCapture")
        try:
            return DeviceGraph(self, self.ask("cudaGraphInstantiate", graph, 0))
        finally:
            self._cuda.cudaGraphDestroy(graph)

    def launch(self, graph: Any) -> None:
        """Put a recorded graph on the stream."""
        self.ask("cudaGraphLaunch", graph, self._stream)

    def release(self, graph: Any) -> None:
        """Give a recorded graph back, once the stream has done with it."""
        with self._freeing:
            if self._captures:
                self._dropped.append(partial(self.release, graph))
                return
            self._cuda.cudaStreamSynchronize(self._stream)
            self._cuda.cudaGraphExecDestroy(graph)

    def to_host(self, *tensors: DeviceTensor) -> list[np.ndarray]:
        """Copies of tensors as arrays, once everything before them on the stream is done: one wait for all."""
        arrays = [np.empty(tensor.shape, tensor.dtype) for tensor in tensors]
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        for array, tensor in zip(arrays, tensors, strict=True):
            if tensor.nbytes:
                self.ask("cudaMemcpyAsync", array.ctypes.data, tensor.pointer, tensor.nbytes, kind, self._stream)
        self.wait()
        return arrays

    def wait(self) -> None:
        """Until everything on the stream is done; OperationFailed for what failed there."""
        self.ask("cudaStreamSynchronize", self._stream)
        self._read.clear()

    def allocated(self, size: int) -> int:
        """The address of ``size`` new bytes, in stream order."""
        status, pointer = self._cuda.cudaMallocAsync(size, self._stream)
        if int(status) == int(self._cuda.cudaError_t.cudaErrorMemoryAllocation):
            free, total = self.ask("cudaMemGetInfo")
            raise OperationFailed(
                f"the GPU is out of memory: {size / 1e6:.1f} MB were wanted, {free / 1e6:.1f} of {total / 1e6:.0f} MB "
                "are free; end what else runs there, keep fewer tokens (--keep), or build with a smaller --max-length"
            )
        self._check(status, "cudaMallocAsync")
        return int(pointer)

    def free(self, pointer: int) -> None:
        """Give bytes back behind all work that was enqueued; a failure here follows one that was told already."""
        with self._freeing:
            if self._captures:
                self._dropped.append(partial(self.free, pointer))
                return
            self._cuda.cudaFreeAsync(pointer, self._stream)

    def _give_back_dropped(self) -> None:
        """Nothing is captured any more, so what was dropped meanwhile goes."""
        with self._freeing:
            self._captures = False
            while self._dropped:
                self._dropped.pop()()

    def ask(self, call: str, *arguments: Any) -> Any:
        """Call CUDA; its first result is the status, what follows is the answer. OperationFailed where it refuses."""
        status, *answer = getattr(self._cuda, call)(*arguments)
        self._check(status, call)
        return answer[0] if len(answer) == 1 else tuple(answer)

    def _check(self, status: Any, call: str) -> None:
        if int(status):
            said = self._cuda.cudaGetErrorString(status)[1]
            words = said.decode() if isinstance(said, bytes) else said
            raise OperationFailed(f"CUDA's {call} failed: {words}; CUDA_LAUNCH_BLOCKING=1 shows which kernel it was")


def device_of(folder: Path) -> Device:
    """The device of the model in a folder: its stages share a stream, so one's outputs are another's inputs."""
    key = folder.resolve()
    if (found := _devices.get(key)) is None:
        found = _devices[key] = Device()
    return found


def capability(cuda: Any = None) -> int:
    """The compute capability of the GPU that would be used, as 89; BackendMissing where there is none."""
    cuda = cuda or cuda_runtime()
    _refuse_no_device(cuda)
    of = cuda.cudaDeviceAttr
    major = cuda.cudaDeviceGetAttribute(of.cudaDevAttrComputeCapabilityMajor, 0)[1]
    minor = cuda.cudaDeviceGetAttribute(of.cudaDevAttrComputeCapabilityMinor, 0)[1]
    return 10 * int(major) + int(minor)


def cuda_runtime() -> Any:
    """``cuda.bindings.runtime``; BackendMissing where cuda-python is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as e:
        raise missing("cuda") from e
    return runtime


def _uint64(number: int) -> Any:
    """A number as the runtime's calls take it: the type is in the driver's module alone."""
    from cuda.bindings import driver

    return driver.cuuint64_t(number)


def _refuse_no_device(cuda: Any) -> None:
    status, count = cuda.cudaGetDeviceCount()
    if int(status) or not count:
        said = cuda.cudaGetErrorString(status)[1]
        words = said.decode() if isinstance(said, bytes) else said
        raise BackendMissing(f"CUDA finds no GPU here ({words}): install NVIDIA's driver, or run a bundle for cpu")

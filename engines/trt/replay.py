"""A decode step captured in a CUDA graph: one launch instead of one per layer.

A step may be captured when the next one has the same shapes and the same buffers: then its inputs and outputs live at
addresses that stay, and each step copies its few inputs there, launches, and copies its few outputs away. TensorRT
wants one ordinary run at these shapes and addresses first, and the context as it was then: where others were run in it
since, the step is recorded anew. Nothing that changes from step to step may be on the host
while capturing: how many rows of the cache are filled is an input like any other.
Legend: none; names are the engine's inputs and outputs.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from engines.trt.device import Device, DeviceGraph, DeviceTensor
from graphs.errors import OperationFailed

SWITCH = "SACCADE_CUDA_GRAPHS"  # 0: launch every step's kernels one by one
Shape = tuple[int, ...]


def wanted() -> bool:
    """Whether steps are to be captured: yes, unless the environment says no."""
    return os.environ.get(SWITCH, "1") != "0"


class Step:
    """One shape of run at fixed addresses.

    shared: output → the input whose buffer it is. Such buffers are not copied and not kept alive: the step is of their
    addresses, so it serves the next conversation too where memory that was given back is handed out again.
    """

    def __init__(
        self,
        device: Device,
        context: Any,
        inputs: Mapping[str, Any],
        dtypes: Mapping[str, np.dtype[Any]],
        outputs: Collection[str],
        shared: Mapping[str, str],
    ) -> None:
        self._device, self.context = device, context
        self._graph: DeviceGraph | None = None
        buffers = set(shared.values())
        self._shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        self._bind_shapes()
        self.tensors: dict[str, DeviceTensor] = {
            name: device.empty(self._shapes[name], dtypes[name]) for name in inputs if name not in buffers
        }
        self._copied = list(self.tensors)
        self.given_out = [name for name in outputs if name not in shared]
        for name in self.given_out:
            self.tensors[name] = device.empty(tuple(context.get_tensor_shape(name)), dtypes[name])
        self._addresses = {name: tensor.pointer for name, tensor in self.tensors.items()}
        self._addresses |= {name: inputs[name].pointer for name in buffers}
        self._addresses |= {output: self._addresses[given] for output, given in shared.items()}

    def take(self, inputs: Mapping[str, Any]) -> None:
        """Copy a step's inputs, arrays of the host or tensors of the device, to where the step reads them."""
        for name in self._copied:
            if inputs[name] is not None:  # of a carrier only the length is read
                self._device.copy(inputs[name], self.tensors[name])

    def run(self) -> None:
        """Run once, kernel by kernel, at the fixed addresses."""
        self._bind_shapes()
        for name, address in self._addresses.items():
            self._ask(self.context.set_tensor_address(name, address), f"the address of {name}")
        self._ask(self.context.execute_async_v3(self._device.stream), "the run")

    def capture(self) -> None:
        """Record the run that was just done; OperationFailed, with nothing recorded, where it cannot be."""
        capturable = getattr(self.context, "is_stream_capturable", None)
        if capturable is not None and not capturable(self._device.stream):
            raise OperationFailed("TensorRT says that this engine's run cannot be captured")
        self._graph = self._device.captured(lambda: self.context.execute_async_v3(self._device.stream))

    def forget(self) -> None:
        """Drop what was recorded: its context was given other shapes or addresses since."""
        self._graph = None

    @property
    def captured(self) -> bool:
        """Whether ``launch`` can be used."""
        return self._graph is not None

    def launch(self) -> None:
        """Run the recorded step on what its inputs hold now."""
        assert self._graph is not None
        self._graph.launch()

    def _bind_shapes(self) -> None:
        for name, shape in self._shapes.items():
            self._ask(self.context.set_input_shape(name, shape), f"the shape {shape} of {name}")

    def _ask(self, took: bool, what: str) -> None:
        if not took:
            raise OperationFailed(f"TensorRT refused {what} of a step that is to be replayed")

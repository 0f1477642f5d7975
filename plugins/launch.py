"""Cubins on a CUDA stream through cuda-python's driver API: no torch, no Triton, nothing compiled."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from graphs.errors import BackendMissing, OperationFailed
from graphs.versions import missing
from plugins.cubin_file import Cubin, serving
from plugins.table import Variant

PLAIN_SHARED = 48 * 1024  # bytes a program may have without asking for more
SCRATCH_POINTERS = 2  # Triton 3.7 ends every kernel with two pointers that ours leave unused (plugins/cubins.py checks)


class Launcher:
    """Loads the cubins that fit this device, each once per context, and launches them.

    cubins: of every variant that ``launch`` will be asked for. driver: cuda.bindings.driver, or what stands in for it.
    """

    def __init__(self, cubins: Sequence[Cubin], driver: Any = None) -> None:
        self.cubins, self.driver = cubins, driver or _driver()
        self.loaded: dict[tuple[int, Variant], tuple[Any, Cubin]] = {}

    def launch(self, variant: Variant, values: Mapping[str, int], stream: int) -> None:
        """Put one launch on ``stream`` of the current context.

        values: name → device address or number, for every argument and every size of the grid. Errors:
        BackendMissing where no cubin runs on this device, OperationFailed where CUDA refuses.
        """
        function, cubin = self._function(variant)
        kinds = [ctypes.c_void_p if kind.startswith("*") else ctypes.c_int for kind in variant.arguments.values()]
        arguments = (
            (*(values[name] for name in variant.arguments), *[0] * SCRATCH_POINTERS),
            (*kinds, *[ctypes.c_void_p] * SCRATCH_POINTERS),
        )
        grid, block = variant.grid(values), (variant.warps * 32, 1, 1)
        self._ask("cuLaunchKernel", function, *grid, *block, cubin.shared, stream, arguments, 0)

    def _function(self, variant: Variant) -> tuple[Any, Cubin]:
        key = int(self._ask("cuCtxGetCurrent")), variant
        if key not in self.loaded:
            attribute = self.driver.CUdevice_attribute
            device = self._ask("cuCtxGetDevice")
            major, minor = (
                self._ask("cuDeviceGetAttribute", which, device)
                for which in (
                    attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                    attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                )
            )
            cubin = serving(self.cubins, variant, 10 * major + minor)
            if cubin is None:
                here = ", ".join(f"{c.sm // 10}.{c.sm % 10}" for c in self.cubins if c.variant == variant) or "nothing"
                raise BackendMissing(
                    f"the engine holds {variant.kernel} for {here}, this device is {major}.{minor}: "
                    f"build it with --sm {major}{minor}"
                )
            module = self._ask("cuModuleLoadData", cubin.image)
            function = self._ask("cuModuleGetFunction", module, variant.kernel.encode())
            if cubin.shared > PLAIN_SHARED:
                dynamic = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._ask("cuFuncSetAttribute", function, dynamic, cubin.shared)
            self.loaded[key] = function, cubin
        return self.loaded[key]

    def _ask(self, call: str, *arguments: Any) -> Any:
        """Call the driver; its first result is the status, the second the answer."""
        status, *answer = getattr(self.driver, call)(*arguments)
        if int(status) != 0:
            raise OperationFailed(f"CUDA's {call} failed with {status!r}: CUDA_LAUNCH_BLOCKING=1 shows where")
        return answer[0] if answer else None


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as e:
        raise missing("cuda") from e
    return driver

"""The NVIDIA driver and the CUDA libraries of this machine, asked through ctypes: no package, no context, no memory.

Source of the calls and their codes: CUDA driver API, initialisation, version and device management.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DRIVER_LIBRARY = "libcuda.so.1"
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE, which cuInit gives where CUDA_VISIBLE_DEVICES hides every GPU, too
SM_MAJOR, SM_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR

# CUDA of the libraries → the first driver that serves it, and the least compute capability it still has, as 75.
LEAST_DRIVER = {12: "525", 13: "580"}
LEAST_SM = {12: 50, 13: 75}

Load = Callable[[str], Any]


def driver_reasons(cuda: int, load: Load | None = None) -> list[str]:
    """Why the driver cannot run libraries of a CUDA major version on its first visible GPU; empty where it can.

    load: opens a shared library or raises OSError.
    """
    try:
        library = (load or ctypes.CDLL)(DRIVER_LIBRARY)
    except OSError:
        return [f"no NVIDIA driver is loaded ({DRIVER_LIBRARY} is not found)"]
    if code := library.cuInit(0):
        return [_no_gpu() if code == NO_DEVICE else f"the NVIDIA driver does not start (cuInit gives {code})"]
    found = []
    version = _asked(library.cuDriverGetVersion)
    if version // 1000 < cuda:
        found.append(
            f"the NVIDIA driver serves CUDA {version // 1000}.{version % 1000 // 10}, and CUDA {cuda} is needed "
            f"(driver {LEAST_DRIVER[cuda]} or newer)"
        )
    if not _asked(library.cuDeviceGetCount):
        return [*found, _no_gpu()]
    device = _asked(library.cuDeviceGet, 0)
    sm = 10 * _asked(library.cuDeviceGetAttribute, SM_MAJOR, device) + _asked(
        library.cuDeviceGetAttribute, SM_MINOR, device
    )
    if sm < LEAST_SM[cuda]:
        least = LEAST_SM[cuda]
        found.append(f"the GPU is of SM {sm // 10}.{sm % 10}, and CUDA {cuda} begins with {least // 10}.{least % 10}")
    return found


def library_reasons(libraries: Mapping[str, str], folder: Path | None = None, load: Load | None = None) -> list[str]:
    """One reason per shared library that cannot be loaded; ``libraries``: its name → what brings it.

    folder: where pip put those that the loader's own path does not reach. Once loaded they are found by name.
    """
    found = []
    for name, remedy in libraries.items():
        at = str(folder / name) if folder and (folder / name).is_file() else name
        try:
            (load or ctypes.CDLL)(at)
        except OSError as e:
            why = "is not found" if at == name and name in str(e) else f"cannot be loaded ({e})"
            found.append(f"{name} {why} ({remedy})")
    return found


def _no_gpu() -> str:
    return "the NVIDIA driver shows no GPU (CUDA_VISIBLE_DEVICES may hide it)"


def _asked(call: Callable[..., int], *arguments: int) -> int:
    """The integer that a call writes through its first argument; 0 where it fails."""
    value = ctypes.c_int(0)
    return 0 if call(ctypes.byref(value), *arguments) else value.value

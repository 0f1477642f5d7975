"""Which device OpenVINO runs on, and why target openvino cannot be had here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from threading import Lock
from typing import Any

from graphs.errors import BackendMissing
from graphs.versions import extras_of

CPU = "CPU"
VARIABLE = "SACCADE_OPENVINO_DEVICE"
# Others of OpenVINO's devices want sizes that are fixed when a graph is compiled (NPU) or are several at once (AUTO).
KINDS = (CPU, "GPU")
MAKING = Lock()  # stages are opened side by side, and each would make a core


def kept_core() -> Any:
    """The one ``openvino.Core`` of this process that loads plugins, and is never destroyed.

    Its CPU plugin gives the thread that loads it a stack for signals of its own (OpenVINO 2026.4.1). With two of them,
    the first destroyed first, the second leaves the thread with the first one's freed stack, and the next signal that
    Python handles (SIGINT, SIGTERM) ends the process with a segmentation fault.
    """
    with MAKING:
        return _core()


@cache
def _core() -> Any:
    import openvino as ov

    return ov.Core()


def chosen_device(core: Any) -> str:
    """The device that SACCADE_OPENVINO_DEVICE names, CPU where it names none; BackendMissing where it is not there."""
    if reasons := _device_reasons(core):
        raise BackendMissing(f"target openvino cannot be run here: {reasons[0]}")
    return _asked()


def reasons(_: Sequence[Any] = ()) -> list[str]:
    """Why OpenVINO cannot run graphs here; empty where it can."""
    if not find_spec("openvino"):
        return [f"openvino is not installed (pip install {extras_of('openvino')})"]
    if _asked() == CPU:
        return []  # it brings its CPU plugin
    return _device_reasons(kept_core())


def _asked() -> str:
    return os.environ.get(VARIABLE) or CPU


def _device_reasons(core: Any) -> list[str]:
    asked, known = _asked(), " or ".join(KINDS)
    if asked.partition(".")[0] not in KINDS:
        return [f"{VARIABLE} is {asked!r}; set it to {known}"]
    if asked not in (found := core.available_devices) and f"{asked}.0" not in found:
        return [f"{VARIABLE} is {asked!r}, and OpenVINO finds {' and '.join(found)} on this machine; unset it"]
    return []

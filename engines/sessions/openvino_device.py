"""Which device OpenVINO runs on, and why target openvino cannot be had here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from graphs.errors import BackendMissing
from graphs.versions import extras_of

CPU = "CPU"
VARIABLE = "SACCADE_OPENVINO_DEVICE"
# Others of OpenVINO's devices want sizes that are fixed when a graph is compiled (NPU) or are several at once (AUTO).
KINDS = (CPU, "GPU")


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
    import openvino as ov

    return _device_reasons(ov.Core())


def _asked() -> str:
    return os.environ.get(VARIABLE) or CPU


def _device_reasons(core: Any) -> list[str]:
    asked, known = _asked(), " or ".join(KINDS)
    if asked.partition(".")[0] not in KINDS:
        return [f"{VARIABLE} is {asked!r}; set it to {known}"]
    if asked not in (found := core.available_devices) and f"{asked}.0" not in found:
        return [f"{VARIABLE} is {asked!r}, and OpenVINO finds {' and '.join(found)} on this machine; unset it"]
    return []

"""Why an rtx engine cannot be run here, told before anything of it is deserialised."""

from __future__ import annotations

from graphs.versions import extras_of, installed_version

DISTRIBUTION = "tensorrt-rtx"


def reasons() -> list[str]:
    """Every reason, the missing driver and library first; never empty, for this release builds engines and runs none."""
    from engines.machine import driver_version

    found = []
    if driver_version() is None:
        found.append("no NVIDIA driver is loaded, and so no GPU of the engines' SM was found")
    if installed_version(DISTRIBUTION) is None:
        found.append(f"{DISTRIBUTION} is not installed (pip install {extras_of(DISTRIBUTION)})")
    return [*found, "this release builds TensorRT-RTX engines and does not run them yet"]

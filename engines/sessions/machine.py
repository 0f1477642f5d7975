"""What this machine and this Python can run, found out without taking any of a device's memory."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec
from pathlib import Path

from engines.targets import TARGETS, why_not
from engines.trt.flavour import FLAVOURS
from graphs.versions import installed_version

EXPORT = ("torch", "onnxscript", "transformers")
DRIVER = Path("/proc/driver/nvidia/version")


def machine_document() -> dict[str, object]:
    """Processor, memory, driver, and for each runtime its version and whether this release drives it."""
    return {
        "schema": "saccade.machine/1",
        "python": platform.python_version(),
        "system": here(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "nvidia_driver": driver_version(),
        "runtimes": {target: _runtime(target) for target in TARGETS},
        "export": {name: installed_version(name) for name in EXPORT},
    }


def machine_in_words(document: dict[str, object]) -> list[str]:
    """The same for a reader."""
    memory = document["memory_bytes"]
    lines = [
        f"{document['system']}, {document['processor']}, {document['cores']} cores, "
        f"{memory / 1e9 if isinstance(memory, int) else 0:.1f} GB",
        f"NVIDIA driver: {document['nvidia_driver'] or 'none'}",
        f"Python {document['python']}",
    ]
    runtimes, export = document["runtimes"], document["export"]
    for target, found in runtimes.items() if isinstance(runtimes, dict) else ():
        lines.append(f"target {target}: {found['state']}")
    if isinstance(export, dict):
        lacking = [name for name, version in export.items() if version is None]
        lines.append(
            f"export: needs {', '.join(lacking)}: pip install 'saccade[export]'" if lacking else "export: ready"
        )
    return lines


def here() -> str:
    """The system and its processor's architecture, as ``Linux x86_64``."""
    return f"{platform.system()} {platform.machine()}"


def _runtime(target: str) -> dict[str, str | None]:
    brought_by = TARGETS[target].distributions
    distribution = next(filter(installed_version, brought_by), brought_by[0])
    if target in FLAVOURS:
        version = FLAVOURS[target].version()
    else:
        version = installed_version(distribution) if find_spec(TARGETS[target].module) else None
    reasons = why_not(target)
    state = f"not here: {'; '.join(reasons)}" if reasons else f"ready, {distribution} {version}"
    return {"distribution": distribution, "version": version, "state": state}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return named[0] if named else platform.processor() or platform.machine()


def driver_version() -> str | None:
    """The loaded NVIDIA driver in its own words, None where there is none."""
    try:
        first = DRIVER.read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return first.partition(":")[2].strip() or first

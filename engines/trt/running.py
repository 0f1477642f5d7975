"""Why an rtx engine cannot be run here, told before anything of it is deserialised."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from engines.bundles.manifest import EngineEntry
from graphs.errors import BackendMissing
from graphs.versions import extras_of, installed_version

DISTRIBUTION = "tensorrt-rtx"


def reasons(engines: Sequence[EngineEntry] = ()) -> list[str]:
    """Every reason, the missing driver and library first.

    engines: those of the bundle that is to be opened, by their manifest.
    """
    from engines.sessions.machine import driver_version

    found = []
    sms = " and ".join(f"{sm // 10}.{sm % 10}" for sm in sorted({sm for engine in engines for sm in engine.sms}))
    if driver_version() is None:
        found.append("no NVIDIA driver is loaded" + (f", and the engines are for GPUs of SM {sms}" if sms else ""))
    installed = installed_version(DISTRIBUTION)
    if installed is None:
        found.append(f"{DISTRIBUTION} is not installed (pip install {extras_of(DISTRIBUTION)})")
    others = sorted({engine.tensorrt for engine in engines} - {installed})
    found += [f"the engines are of {DISTRIBUTION} {v}" + (f", not {installed}" if installed else "") for v in others]
    if not find_spec("cuda"):
        found.append(f"cuda-python is not installed (pip install {extras_of('cuda')})")
    if found:
        return found
    from engines.trt.device import capability

    try:
        here = capability()
    except BackendMissing as e:
        return [str(e)]
    if engines and any(here not in engine.sms for engine in engines):
        return [f"the engines are for GPUs of SM {sms}, and this one is {here // 10}.{here % 10}"]
    return []

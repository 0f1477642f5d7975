"""Why an engine cannot be run, or built, here, told before anything of it is deserialised or written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec

from packaging.version import Version

from engines.bundles.manifest import EngineEntry
from engines.sessions.machine import here
from engines.sessions.nvidia import LEAST_DRIVER, driver_reasons
from engines.trt.flavour import BEYOND, FULL, LEAST_WRITTEN_OUT, RTX, Flavour, out_of_range
from graphs.errors import BackendMissing
from graphs.versions import installed_version

LEAST_AMPERE = 80


def reasons(engines: Sequence[EngineEntry] = ()) -> list[str]:
    """Every reason why TensorRT-RTX cannot run here, the missing driver and library first.

    engines: those of the bundle that is to be opened, by their manifest.
    """
    return _reasons(RTX, engines)


def tensorrt_reasons(engines: Sequence[EngineEntry] = ()) -> list[str]:
    """The same for full TensorRT: 10.16 to 11.x, or 10.3 and newer where every engine was written out for that."""
    return _reasons(FULL, engines)


def _reasons(flavour: Flavour, engines: Sequence[EngineEntry]) -> list[str]:
    found, gpus = [], _gpus(engines)
    if reasons := driver_reasons(_cuda()):
        found += [reasons[0] + (f", and the engines are for {gpus}" if gpus else ""), *reasons[1:]]
    # NVIDIA, support matrix: full TensorRT's engines are not portable across platforms, TensorRT-RTX's are.
    built_on = {engine.platform for engine in engines} - {"", here()} if flavour is FULL else set()
    found += [f"the engines were built on {other}, and this is {here()}" for other in sorted(built_on)]
    installed = flavour.version()
    if installed is None:
        found.append(f"{flavour.distributions[0]} is not installed (pip install {flavour.extra})")
    elif flavour is FULL:
        written_out = all(engine.parser == LEAST_WRITTEN_OUT for engine in engines)
        found += filter(None, [out_of_range(installed, LEAST_WRITTEN_OUT if written_out else "current")])
    found += _versions(flavour, engines, installed)
    if not find_spec("cuda"):
        found.append(f"cuda-python is not installed (pip install {flavour.extra})")
    if found:
        return found
    from engines.trt.device import capability

    try:
        sm = capability()
    except BackendMissing as e:
        return [str(e)]
    this = f"this GPU is of SM {sm // 10}.{sm % 10}"
    if not all(fits(engine, sm) for engine in engines):
        return [f"the engines are for {gpus}, and {this}"]
    if flavour.sms and sm not in flavour.sms:
        return [f"{flavour.title} engines are built for GPUs of SM {_spelled(flavour.sms)}, and {this}"]
    return []


def fits(engine: EngineEntry, sm: int) -> bool:
    """Whether an engine runs on GPUs of a compute capability, as 89."""
    return sm >= LEAST_AMPERE if engine.compatibility.hardware == "ampere-plus" else sm in engine.sms


def _versions(flavour: Flavour, engines: Sequence[EngineEntry], installed: str | None) -> list[str]:
    """A reason per version of the engines that the installed one does not run."""
    name = flavour.distributions[0]
    instead = f", not {installed}" if installed else ""
    exact = {engine.tensorrt for engine in engines if not engine.compatibility.versions} - {installed}
    # NVIDIA: a version-compatible engine of 10 runs on newer 10 and on 11, one of 11 on newer 11.
    older = {engine.tensorrt for engine in engines if engine.compatibility.versions}
    return [
        *(f"the engines are of {name} {built}{instead}" for built in sorted(exact)),
        *(
            f"the engines are for {name} {built} and newer, older than {BEYOND}{instead}"
            for built in sorted(older)
            if installed is None or Version(installed) < Version(built)
        ),
    ]


def _gpus(engines: Sequence[EngineEntry]) -> str:
    """The GPUs that all engines run on, '' without engines."""
    narrow = [engine for engine in engines if engine.compatibility.hardware != "ampere-plus"]
    if engines and not narrow:
        return "GPUs of SM 8.0 and newer"
    sms = {sm for engine in narrow for sm in engine.sms}
    return f"GPUs of SM {_spelled(sms)}" if sms else ""


def _cuda() -> int:
    """CUDA's major version, by the installed cuda-python: 12 on JetPack 6."""
    found = installed_version("cuda-python") or installed_version("cuda-bindings") or str(max(LEAST_DRIVER))
    return min(max(int(found.partition(".")[0]), min(LEAST_DRIVER)), max(LEAST_DRIVER))


def _spelled(sms: Iterable[int]) -> str:
    return " and ".join(f"{sm // 10}.{sm % 10}" for sm in sorted(sms))

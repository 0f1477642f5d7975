"""Full TensorRT by a stand-in: TensorRT-RTX's parser and builder under its name, for the two share their interface.

What full TensorRT alone takes (optimisation level, compatibility, flags, timing cache) is kept from TensorRT-RTX and
written down when a build begins, one JSON line each in $STAND_IN_BUILDS. $STAND_IN_VERSION is the version. The GPU that
is here is an SM 8.9.
"""

import json
import os
from importlib import import_module
from typing import Any

_real = import_module("tensorrt_rtx")
globals().update({name: value for name, value in vars(_real).items() if not name.startswith("__")})
__version__ = os.environ.get("STAND_IN_VERSION", "10.16.1.11")

if __version__.startswith("10.3"):
    # Such an old one knows no attention layer and neither Python plugin class nor the newer compatibility.
    class LayerType:
        """Those that are asked for by name."""

        PLUGIN_V3, CONCATENATION, ELEMENTWISE = (
            getattr(_real.LayerType, name) for name in ("PLUGIN_V3", "CONCATENATION", "ELEMENTWISE")
        )

    del IPluginCreatorV3One  # type: ignore[name-defined]  # noqa: F821


class Timings:
    """A timing cache: a line per build it has seen."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"timed\n"


class Config:
    """A builder's configuration; what only full TensorRT takes stays here, all else goes to TensorRT-RTX's."""

    MINE = ("builder_optimization_level", "hardware_compatibility_level", "flags", "timings")

    def __init__(self, real: Any) -> None:
        self.__dict__["real"] = real
        self.builder_optimization_level: int | None = None
        self.hardware_compatibility_level = _real.HardwareCompatibilityLevel.NONE
        self.flags: set[str] = set()
        self.timings: Timings | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.MINE:
            self.__dict__[name] = value
        else:
            setattr(self.__dict__["real"], name, value)

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag.name)

    def create_timing_cache(self, data: bytes) -> Timings:
        return Timings(b"" if data.strip(b"timed\n") else data)

    def set_timing_cache(self, cache: Timings, ignore_mismatch: bool) -> bool:
        self.timings = cache
        return not ignore_mismatch

    def get_timing_cache(self) -> Timings | None:
        return self.timings


class Builder(_real.Builder):  # type: ignore[name-defined,misc]
    """A builder for the GPU that is here."""

    def create_builder_config(self) -> Any:
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(_real.ComputeCapability.SM89, 0)
        config.builder_optimization_level = 0
        return Config(config)

    def build_serialized_network(self, network: Any, config: Config) -> Any:
        found = {
            "level": config.builder_optimization_level,
            "hardware": config.hardware_compatibility_level.name,
            "flags": sorted(config.flags),
            "typed": network.get_flag(_real.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
            "profiles": config.num_optimization_profiles,
            "workspace": config.real.get_memory_pool_limit(_real.MemoryPoolType.WORKSPACE),
        }
        with open(os.environ["STAND_IN_BUILDS"], "a") as file:  # noqa: PTH123
            file.write(json.dumps(found) + "\n")
        return super().build_serialized_network(network, config.real)

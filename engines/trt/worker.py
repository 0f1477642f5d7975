"""The process that builds one engine: ``python -m engines.trt.worker REQUEST``.

TensorRT aborts its process where it fails, so this one holds nothing but the build. REQUEST is JSON (``Request``);
progress goes to stdout as JSON lines, everything libraries print to stderr, and the answer, what was built and what was
read back from the network, into a JSON file. Built through Polygraphy's loaders, which know both TensorRTs. Networks
are strongly typed, and no precision flag is touched, for TensorRT 11 has none.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.bundles.manifest import Plugins
from engines.trt.bounds import Profile
from engines.trt.flavour import FLAVOURS, Flavour
from engines.trt.reading import reading_of
from graphs.errors import OperationFailed


@dataclass(frozen=True)
class Request:
    """onnx, engine, answer: files to read and to write. sms: as 89. ops: node → op of ours in the file.

    flavour: the target. plugins: what is registered, ``python`` or ``aot``. parse_only: read the network back and build
    nothing. settings: full TensorRT's optimization_level, workspace (bytes), version_compatible, hardware_compatibility
    (a name of HardwareCompatibilityLevel) and kernel_sms, what kernels are compiled for. timings, new_timings: the
    timing cache to begin with, where the file exists, and where it goes; '' for none.
    """

    onnx: str
    engine: str
    answer: str
    sms: list[int]
    profiles: dict[str, Profile]
    ops: dict[str, str]
    flavour: str = "rtx"
    plugins: Plugins = "none"
    parse_only: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    timings: str = ""
    new_timings: str = ""


def main(path: str) -> None:
    """Build what the request asks for."""
    progress = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Polygraphy prints; stdout is the protocol

    def tell(**event: Any) -> None:
        progress.write(json.dumps(event) + "\n")

    request = Request(**json.loads(Path(path).read_text("utf-8")))
    answer = build(request, tell)
    Path(request.answer).write_text(json.dumps(answer), "utf-8")


def build(request: Request, tell: Callable[..., None]) -> dict[str, Any]:
    """Parse, read back, build; the answer's keys are tensorrt, reading, bytes."""
    flavour = FLAVOURS[request.flavour]
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = flavour.polygraphy
    from plugins.trt import imported, load

    trt = (imported if request.plugins == "none" else load)(flavour.module)
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.WARNING
    register_plugins(trt, flavour, request)
    tell(phase="parsing")
    builder, network, parser = NetworkFromOnnxPath(request.onnx, strongly_typed=True)()
    answer: dict[str, Any] = {
        "tensorrt": trt.__version__,
        "reading": reading_of(trt, network, request.ops).document(),
        "bytes": 0,
    }
    let_decompose(trt, network)
    if request.parse_only:
        return answer
    made = config_of(trt, flavour, request, tell)(builder, network)
    timings = timing_cache_of(made, request)
    engine = EngineBytesFromNetwork((builder, network), config=made)()
    with Path(request.engine).open("wb") as file:
        file.write(engine)
    if request.new_timings:
        Path(request.new_timings).write_bytes(bytes(timings.serialize()))
    answer["bytes"] = engine.nbytes
    del parser
    return answer


def register_plugins(trt: Any, flavour: Flavour, request: Request) -> None:
    """Register what serves the nodes that ask for a plugin, compiled for the wanted GPUs."""
    sms = request.settings.get("kernel_sms", request.sms)
    if request.plugins == "python":
        from plugins.registry import register

        register(trt, sms)
    elif request.plugins == "aot":
        from importlib import import_module

        from plugins.aot import register as register_ahead_of_time

        register_ahead_of_time(trt, import_module(f"{flavour.module}.plugin"), min(sms))


def config_of(trt: Any, flavour: Flavour, request: Request, tell: Callable[..., None]) -> Callable[[Any, Any], Any]:
    """What makes the builder's configuration for a builder and a network."""
    from polygraphy.backend.trt import CreateConfig
    from polygraphy.backend.trt import Profile as TrtProfile

    profiles = []
    for shapes in request.profiles.values():
        profile = TrtProfile()
        for name, (least, best, most) in shapes.items():
            profile.add(name, tuple(least), tuple(best), tuple(most))
        profiles.append(profile)
    level = request.settings.get("hardware_compatibility")
    if level and not hasattr(trt.HardwareCompatibilityLevel, level):
        raise OperationFailed(f"TensorRT {trt.__version__} knows no hardware compatibility {level}; build without it")
    workspace = request.settings.get("workspace")
    created = CreateConfig(
        profiles=profiles,
        progress_monitor=monitor_of(trt, tell),
        builder_optimization_level=request.settings.get("optimization_level"),
        memory_pool_limits={trt.MemoryPoolType.WORKSPACE: workspace} if workspace is not None else None,
        version_compatible=request.settings.get("version_compatible"),
        hardware_compatibility_level=getattr(trt.HardwareCompatibilityLevel, level) if level else None,
    )

    def config(builder: Any, network: Any) -> Any:
        made = created(builder, network)
        if flavour.sms:  # from afar: what it builds for is said, not found
            made.num_compute_capabilities = len(request.sms)
            for i, sm in enumerate(request.sms):
                made.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i)
        return made

    return config


def timing_cache_of(config: Any, request: Request) -> Any:
    """The configuration's timing cache, begun with the request's file; OperationFailed for one of another machine."""
    file = Path(request.timings)
    data = file.read_bytes() if request.timings and file.is_file() else b""
    if not data:
        return config.get_timing_cache()
    cache, fresh = (config.create_timing_cache(begun) for begun in (data, b""))
    # What TensorRT cannot read it warns of, and gives an empty cache: then the file must not be replaced.
    unread = cache is None or bytes(cache.serialize()) == bytes(fresh.serialize()) != data
    if unread or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise OperationFailed(
            f"{file} is not a timing cache of this TensorRT and this GPU; name another file with --timing-cache"
        )
    return cache


def let_decompose(trt: Any, network: Any) -> None:
    """Allow every attention to be built from plain layers where no fused kernel takes its types (fp32) or its width."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)  # which 10.3 does not know
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def monitor_of(trt: Any, tell: Callable[..., None]) -> Any:
    """TensorRT's progress as events ``phase`` with ``step`` of ``steps``."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            tell(phase=phase_name, steps=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell(phase=phase_name, step=step, steps=self.steps.get(phase_name, 0))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


if __name__ == "__main__":
    main(sys.argv[1])

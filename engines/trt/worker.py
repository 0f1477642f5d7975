"""The process that builds one engine: ``python -m engines.trt.worker REQUEST``.

TensorRT aborts its process where it fails, so this one holds nothing but the build. REQUEST is JSON (``Request``);
progress goes to stdout as JSON lines, everything libraries print to stderr, and the answer, what was built and what was
read back from the network, into a JSON file. Built through Polygraphy's loaders, which know TensorRT-RTX.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.trt.bounds import Profile
from engines.trt.reading import reading_of


@dataclass(frozen=True)
class Request:
    """onnx, engine, answer: files to read and to write. sms: as 89. ops: node → op of ours in the file.

    plugins: whether plugins are registered. parse_only: read the network back and build nothing.
    """

    onnx: str
    engine: str
    answer: str
    sms: list[int]
    profiles: dict[str, Profile]
    ops: dict[str, str]
    plugins: bool = False
    parse_only: bool = False


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
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    import tensorrt_rtx as trt
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.backend.trt import Profile as TrtProfile
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.WARNING
    if request.plugins:
        from plugins.registry import register

        register(trt, request.sms)
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
    profiles = []
    for shapes in request.profiles.values():
        profile = TrtProfile()
        for name, (least, best, most) in shapes.items():
            profile.add(name, tuple(least), tuple(best), tuple(most))
        profiles.append(profile)
    created = CreateConfig(profiles=profiles, progress_monitor=monitor_of(trt, tell))

    def config(builder: Any, network: Any) -> Any:
        made = created(builder, network)
        made.num_compute_capabilities = len(request.sms)
        for i, sm in enumerate(request.sms):
            made.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i)
        return made

    engine = EngineBytesFromNetwork((builder, network), config=config)()
    with Path(request.engine).open("wb") as file:
        file.write(engine)
    answer["bytes"] = engine.nbytes
    del parser
    return answer


def let_decompose(trt: Any, network: Any) -> None:
    """Allow every attention to be built from plain layers where no fused kernel takes its types (fp32) or its width."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
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

"""A hand-made export per role, and a stand-in for onnxruntime-gpu: CPU sessions that claim to be a GPU's."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from engines.sessions import ort_gpu
from tests.hand_made import write_export

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("exports")
    return {role: write_export(home / role, role, seed=i) for i, role in enumerate(("small", "large"))}


class Binding:
    """A binding that notes where outputs were to stay, and leaves them on the host."""

    def __init__(self, real: Any, bound: dict[str, str]) -> None:
        self._real, self._bound = real, bound

    def bind_output(self, name: str, device: str) -> None:
        self._bound[name] = device
        self._real.bind_output(name, "cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class StandIn:
    """onnxruntime.InferenceSession of a build with CUDA: computes on the CPU, tells what the real one was seen to tell.

    on_cpu: names of the nodes that it says are on the CPU. loads: providers that can be loaded.
    """

    on_cpu: Collection[str] = ()
    loads: Collection[str] = (CUDA,)
    opened: list[StandIn]

    def __init__(self, model: bytes, options: Any, providers: Any, enable_fallback: int) -> None:
        assert enable_fallback == 0
        self.asked = providers
        self.bound: dict[str, str] = {}
        self._real = onnxruntime.InferenceSession(model, options, providers=[CPU])
        type(self).opened.append(self)

    def get_providers(self) -> list[str]:
        return [name for name, _ in self.asked if name in self.loads] + [CPU]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        first = self.get_providers()[0]
        return [
            SimpleNamespace(ep_name=CPU if node.name in self.on_cpu else first, get_nodes=lambda node=node: [node])
            for part in self._real.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]

    def io_binding(self) -> Binding:
        return Binding(self._real.io_binding(), self.bound)

    def run_with_iobinding(self, binding: Binding) -> None:
        self._real.run_with_iobinding(binding._real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type[StandIn]]:
    """``stand_in(on_cpu=…, loads=…)``: from now on GPU sessions are of that class, which is returned."""

    def install(**tells: Any) -> type[StandIn]:
        told = type("Told", (StandIn,), {"opened": [], **tells})
        module = SimpleNamespace(InferenceSession=told, set_default_logger_severity=lambda level: None)
        monkeypatch.setattr(ort_gpu, "ort", module)
        return told

    return install

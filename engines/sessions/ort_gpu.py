"""A graph in ONNX Runtime on a GPU: its CUDA provider, or a TensorRT provider of its own with CUDA behind it.

Caches, embeddings and features stay in the GPU's memory from run to run; only outputs asked for as ``host`` are copied.
Where the nodes went is read back from the session, because ONNX Runtime says nothing when it puts one on the CPU.
Its own guard, session.disable_cpu_ep_fallback, refuses arithmetic on shapes too, which is wanted there.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import onnxruntime as ort

from engines.sessions.ort_providers import CUDA, RTX, TENSORRT, Provider
from engines.sessions.ort_session import ERRORS_ONLY, WEIGHTS_FOLDER, OrtSession
from engines.sessions.placement import Placement, inlined, placement_of, shape_nodes
from graphs.console import warn
from graphs.errors import BackendMissing

DECODER_OUTPUT = "logits"  # the stage that gives it runs once per token


class GpuSession(OrtSession):
    """An ``engines.sessions.session.Session`` on the first visible GPU.

    placement: where the nodes went. Raises BackendMissing where the provider is not loaded, or leaves work of the
    decoder to the CPU; work of another stage there is warned of.
    """

    device = "cuda"
    placement: Placement

    def __init__(self, file: Path, provider: Provider, threads: int | None = None) -> None:
        self._provider = provider
        ort.set_default_logger_severity(ERRORS_ONLY)
        super().__init__(file, threads)

    def _opened(self, options: ort.SessionOptions) -> ort.InferenceSession:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.add_session_config_entry(WEIGHTS_FOLDER, str(self._file.parent))
        model = inlined(self._file)
        decodes = any(output.name == DECODER_OUTPUT for output in model.graph.output)
        wanted = self._provider if self._provider.decodes or not decodes else CUDA
        chosen = (wanted,) if wanted is CUDA else (wanted, CUDA)
        # Without enable_fallback=0 the binding prints on stdout and opens a session on the CPU instead.
        session = ort.InferenceSession(
            model.SerializeToString(),
            options,
            providers=[(provider.name, dict(provider.options)) for provider in chosen],
            enable_fallback=0,
        )
        if lacking := [provider.name for provider in chosen if provider.name not in session.get_providers()]:
            raise BackendMissing(
                f"target {self._provider.target}: ONNX Runtime did not load {' and '.join(lacking)} and would run on "
                "the CPU instead; see its message above; saccade show machine says what it needs"
            )
        assigned = [
            (part.ep_name, node.op_type, node.name)
            for part in session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]
        self.placement = placement_of(assigned, shape_nodes(model))
        self._check(wanted, decodes)
        return session

    def _check(self, wanted: Provider, decodes: bool) -> None:
        found = self.placement
        if found.work:
            count = len(found.work)
            left = f"{self._file.name}: {wanted.name} leaves {count} nodes to the CPU: {found.work_in_words()}"
            if decodes:
                raise BackendMissing(f"{left}; each token would be copied there and back, so use --target cpu")
            warn(left)
        if wanted.name not in found.providers:
            warn(f"{self._file.name}: {wanted.name} took none of the nodes; target cuda does the same")


# The files are those that the CPU runs, fp16 or fp32; the TensorRT providers leave the decoder to CUDA.
cuda_session = partial(GpuSession, provider=CUDA)
tensorrt_session = partial(GpuSession, provider=TENSORRT)
rtx_session = partial(GpuSession, provider=RTX)

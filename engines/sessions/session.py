"""What a runtime has to offer: one protocol, one table of targets, nothing else.

A session runs one graph. Tensors go in by name, as numpy arrays or as values that an earlier run
left on the device; they come back as numpy arrays (``host``) or stay where they are (``device``),
so that a KV cache is handed from step to step without a copy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from graphs.errors import BackendMissing, UsageError
from graphs.spec import FloatType

# A tensor on the host (numpy.ndarray) or a runtime's own handle of one on its device.
Value: TypeAlias = Any

# target → the class that serves it
SESSIONS = {
    "openvino": "engines.sessions.openvino_session:OpenVinoSession",
    "cpu": "engines.sessions.ort_session:OrtSession",
    "cuda": "engines.sessions.ort_gpu:cuda_session",
    "ort-tensorrt": "engines.sessions.ort_gpu:tensorrt_session",
    "ort-rtx": "engines.sessions.ort_gpu:rtx_session",
    "rtx": "engines.trt.session:rtx_session",
}


class Session(Protocol):
    """One opened graph."""

    def run(
        self, feeds: Mapping[str, Value], host: Collection[str] = (), device: Collection[str] = ()
    ) -> dict[str, Value]:
        """Run once; ``host`` outputs come back as numpy arrays, ``device`` outputs as handles, others not at all.

        Raises OperationFailed where the runtime refuses or fails.
        """

    def to_host(self, value: Value) -> np.ndarray:
        """Copy a handle (or pass an array through) to the host."""


def open_session(
    file: Path, target: str = "cpu", threads: int | None = None, dtype: FloatType | None = None
) -> Session:
    """Open one graph file for a target.

    threads: how many CPU threads a run may use, None for the runtime's own choice. dtype: what the graph is computed
    in, where the target can choose (its ``precisions``); None for what the file says. Raises UsageError for an unknown
    target, BackendMissing where its runtime is not installed, BadArtefact where the file cannot be read.
    """
    from engines.bundles.targets import TARGETS

    refuse_unrunnable(target)
    if target not in SESSIONS:
        raise UsageError(f"no runtime serves target {target!r} here; known are {', '.join(sorted(SESSIONS))}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}, but a run needs at least 1; leave it out for the runtime's choice")
    module, _, name = SESSIONS[target].partition(":")
    chosen = {"dtype": dtype} if dtype and TARGETS[target].precisions else {}
    try:
        session: Session = getattr(import_module(module), name)(file, threads=threads, **chosen)
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] in {"engines", "graphs", "plugins"}:
            raise
        raise BackendMissing(
            f"target {target} needs {e.name}, which this Python lacks: run pip install 'saccade[{target}]'"
        ) from None
    return session


def refuse_unrunnable(target: str, engines: Sequence[Any] = ()) -> None:
    """BackendMissing, with every reason at once, for a target that this machine or this release cannot run.

    engines: the ``EngineEntry`` of a bundle, so that its SM and version can be told.
    """
    from engines.bundles.targets import TARGETS, why_not

    reasons = why_not(target, engines) if target in TARGETS else []
    if reasons:
        raise BackendMissing(
            f"target {target} cannot be run here: {'; '.join(reasons)}; build the pair for --target cpu too"
        )
